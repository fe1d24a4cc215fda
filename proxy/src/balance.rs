//! Which endpoint a connection goes to. Pure: what the candidates carry, the turn, the key of the source and randomness are
//! arguments.
//!
//! Called by [`crate::routes`] for every attempt. Whether an endpoint may be chosen is not decided here: a candidate fits or it does
//! not ([`Candidates::fits`]). Most do, so two random ones are looked at before all are: what a choice costs does not depend on how
//! many endpoints the service has. Nothing is allocated.
//!
//! An endpoint in its slow start has a *warmth* below 1000. Where loads are compared, its load counts for as much more; where
//! they are not, as much of its turns go to others. `maglev` does without: what it is for is that sources stay where they are.

pub(crate) mod ewma;
pub(crate) mod maglev;
pub(crate) mod nearness;
pub(crate) mod subsets;

use maglev::Table;
use rand::{Rng, RngExt};
use weft_model::traffic::Balance;

/// The warmth of an endpoint that gets its share.
pub(crate) const WARM: u64 = 1_000;

/// How often random candidates are drawn before all are looked at. If half of them fit, that comes to it in a third of the
/// choices; if nearly all fit, never.
const DRAWS: usize = 4;

/// What is chosen among. Numbers of candidates are below [`count`](Self::count).
pub(crate) trait Candidates {
    /// How many there are, those that do not fit too.
    fn count(&self) -> usize;
    /// Whether this one may be chosen.
    fn fits(&self, index: usize) -> bool;
    /// How many connections it has.
    fn live(&self, index: usize) -> u64;
    /// From 1 to [`WARM`].
    fn warmth(&self, index: usize) -> u64;
    /// How long connects to it take, in microseconds; none if none was measured.
    fn connect_us(&self, index: usize) -> Option<u64>;
}

/// Chooses a candidate that fits; none if none does. `turn` counts the choices made for the service so far, `source` is the
/// same for connections of the same source, `table` is there for [`Balance::Maglev`].
pub(crate) fn pick(
    balance: Balance,
    candidates: &impl Candidates,
    turn: usize,
    table: Option<&Table>,
    source: u64,
    rng: &mut impl Rng,
) -> Option<usize> {
    match (balance, table) {
        (Balance::LeastConnections, _) => lesser(candidates, rng, |index| candidates.live(index) + 1),
        (Balance::PeakEwma, _) => lesser(candidates, rng, |index| peak(candidates, index)),
        (Balance::RoundRobin, _) => {
            let next = turn.checked_rem(candidates.count())?;
            // A turn of one that does not fit goes to any: its neighbour does not get it twice.
            if candidates.fits(next) && is_warm(candidates, next, rng) {
                Some(next)
            } else {
                anyone(candidates, rng)
            }
        }
        (Balance::Maglev, Some(table)) => {
            let found = table.find(source, |index| candidates.fits(index));
            found.or_else(|| anyone(candidates, rng))
        }
        (Balance::Random, _) | (Balance::Maglev, None) => anyone(candidates, rng),
    }
}

/// The one of two that costs less for its warmth: power of two choices.
fn lesser(candidates: &impl Candidates, rng: &mut impl Rng, cost: impl Fn(usize) -> u64) -> Option<usize> {
    let (one, other) = two(candidates, rng)?;
    if one == other {
        return Some(one);
    }
    // One of them in a slow start that is half as warm costs twice as much.
    let price = |index, of| u128::from(cost(index)) * u128::from(candidates.warmth(of));
    Some(if price(other, one) < price(one, other) { other } else { one })
}

/// What [`Balance::PeakEwma`] compares. One that was never measured is tried before all others, but by one connection only,
/// until that has shown how long it takes.
fn peak(candidates: &impl Candidates, index: usize) -> u64 {
    let live = candidates.live(index);
    match candidates.connect_us(index) {
        Some(connect_us) => connect_us.max(1).saturating_mul(live + 1),
        None if live == 0 => 0,
        None => u64::MAX,
    }
}

/// Any one, each with the same probability but for its warmth.
fn anyone(candidates: &impl Candidates, rng: &mut impl Rng) -> Option<usize> {
    let count = candidates.count();
    if count == 0 {
        return None;
    }
    for _ in 0..DRAWS {
        let index = rng.random_range(0..count);
        if candidates.fits(index) && is_warm(candidates, index, rng) {
            return Some(index);
        }
    }
    Some(scan(candidates, rng)?.0)
}

/// Whether its turn is taken.
fn is_warm(candidates: &impl Candidates, index: usize, rng: &mut impl Rng) -> bool {
    let warmth = candidates.warmth(index);
    warmth >= WARM || rng.random_range(0..WARM) < warmth
}

/// Two different ones that fit, each pair with the same probability; the same twice if only one fits.
fn two(candidates: &impl Candidates, rng: &mut impl Rng) -> Option<(usize, usize)> {
    let count = candidates.count();
    if count > 1 {
        for _ in 0..DRAWS {
            let one = rng.random_range(0..count);
            let other = (one + rng.random_range(1..count)) % count;
            if candidates.fits(one) && candidates.fits(other) {
                return Some((one, other));
            }
        }
    }
    scan(candidates, rng)
}

/// The same by looking at all, once: a reservoir of two.
fn scan(candidates: &impl Candidates, rng: &mut impl Rng) -> Option<(usize, usize)> {
    let mut kept = [None; 2];
    let fitting = (0..candidates.count()).filter(|index| candidates.fits(*index));
    for (seen, index) in fitting.enumerate() {
        let place = if seen < 2 { seen } else { rng.random_range(0..=seen) };
        if let Some(place) = kept.get_mut(place) {
            *place = Some(index);
        }
    }
    match kept {
        // Which of the two comes first is to be random too: whoever takes one takes the first.
        [Some(one), Some(other)] if rng.random() => Some((other, one)),
        [Some(one), other] => Some((one, other.unwrap_or(one))),
        [None, _] => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;
    use std::cell::Cell;

    #[derive(Clone, Debug)]
    struct Endpoint {
        fits: bool,
        live: u64,
        warmth: u64,
        connect_us: Option<u64>,
    }

    const FREE: Endpoint = Endpoint { fits: true, live: 0, warmth: WARM, connect_us: Some(100) };

    /// Counts how many are looked at.
    #[derive(Debug, Default)]
    struct Endpoints(Vec<Endpoint>, Cell<usize>);

    impl Candidates for Endpoints {
        fn count(&self) -> usize {
            self.0.len()
        }
        fn fits(&self, index: usize) -> bool {
            self.1.set(self.1.get() + 1);
            self.0[index].fits
        }
        fn live(&self, index: usize) -> u64 {
            self.0[index].live
        }
        fn warmth(&self, index: usize) -> u64 {
            self.0[index].warmth
        }
        fn connect_us(&self, index: usize) -> Option<u64> {
            self.0[index].connect_us
        }
    }

    fn endpoints(count: usize) -> Endpoints {
        Endpoints(vec![FREE; count], Cell::default())
    }

    fn table(count: usize) -> Table {
        let names: Vec<String> = (0..count).map(|index| format!("api-{index}")).collect();
        Table::build(names.iter().map(String::as_str))
    }

    /// Opens `count` connections that all stay, and says how many each endpoint got.
    fn spread(balance: Balance, endpoints: &mut Endpoints, count: usize, seed: u64) -> Vec<u64> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let table = table(endpoints.count());
        let before: Vec<u64> = endpoints.0.iter().map(|endpoint| endpoint.live).collect();
        for turn in 0..count {
            let source = rng.random();
            let picked = pick(balance, endpoints, turn, Some(&table), source, &mut rng).unwrap();
            endpoints.0[picked].live += 1;
        }
        endpoints.0.iter().zip(before).map(|(endpoint, before)| endpoint.live - before).collect()
    }

    fn endpoint() -> impl Strategy<Value = Endpoint> {
        (any::<bool>(), 0..9_u64, 1..=WARM, prop::option::of(0..1_000_u64))
            .prop_map(|(fits, live, warmth, connect_us)| Endpoint { fits, live, warmth, connect_us })
    }

    proptest! {
        #[test]
        fn what_is_picked_fits_and_something_is_picked_if_anything_does(
            list in prop::collection::vec(endpoint(), 0..9), turn: usize, source: u64, seed: u64,
        ) {
            let table = table(list.len());
            let endpoints = Endpoints(list, Cell::default());
            for balance in Balance::ALL {
                for table in [None, Some(&table)] {
                    let mut rng = SmallRng::seed_from_u64(seed);
                    let picked = pick(balance, &endpoints, turn, table, source, &mut rng);
                    prop_assert_eq!(picked.is_some(), endpoints.0.iter().any(|endpoint| endpoint.fits));
                    prop_assert!(picked.is_none_or(|index| endpoints.0[index].fits));
                }
            }
        }

        #[test]
        fn the_fullest_endpoint_is_not_picked_by_least_connections(
            live in prop::collection::vec(0..9_u64, 2..9), full in 0..9_usize, out: u8, seed: u64,
        ) {
            let mut endpoints = endpoints(live.len());
            for (index, (endpoint, live)) in endpoints.0.iter_mut().zip(live).enumerate() {
                endpoint.live = live;
                endpoint.fits = out & (1 << index) == 0;
            }
            let full = full % endpoints.count();
            endpoints.0[full] = Endpoint { live: 10, ..FREE };
            prop_assume!(endpoints.0.iter().filter(|endpoint| endpoint.fits).count() > 1);
            let mut rng = SmallRng::seed_from_u64(seed);
            let picked = pick(Balance::LeastConnections, &endpoints, 0, None, 0, &mut rng);
            prop_assert_ne!(picked, Some(full));
        }

        #[test]
        fn two_choices_keep_loads_together(count in 2..20_usize, seed: u64) {
            let got = spread(Balance::LeastConnections, &mut endpoints(count), count * 50, seed);
            // The theory's bound is log log n + O(1) above the mean; 6 is far outside it.
            prop_assert!(got.iter().all(|count| *count <= 56), "{got:?}");
        }

        #[test]
        fn round_robin_is_even(count in 1..20_usize, rounds in 1..9_usize, seed: u64) {
            let got = spread(Balance::RoundRobin, &mut endpoints(count), count * rounds, seed);
            prop_assert!(got.iter().all(|count| *count == rounds as u64), "{got:?}");
        }

        #[test]
        fn a_choice_in_a_large_service_looks_at_few(seed: u64, turn: usize) {
            for balance in Balance::ALL {
                let endpoints = endpoints(10_000);
                let mut rng = SmallRng::seed_from_u64(seed);
                pick(balance, &endpoints, turn, None, 0, &mut rng).unwrap();
                prop_assert!(endpoints.1.get() <= 2, "{balance:?} looks at {}", endpoints.1.get());
            }
        }
    }

    #[test]
    fn turns_of_those_that_do_not_fit_go_to_all_others() {
        for balance in [Balance::RoundRobin, Balance::Random, Balance::Maglev, Balance::LeastConnections] {
            let mut endpoints = endpoints(5);
            endpoints.0[2].fits = false;
            let got = spread(balance, &mut endpoints, 4_000, 7);
            assert_eq!(got[2], 0);
            let others = [got[0], got[1], got[3], got[4]];
            assert!(others.iter().all(|count| (850..1_150).contains(count)), "{balance:?}: {got:?}");
        }
    }

    #[test]
    fn a_scan_takes_each_with_the_same_probability() {
        let mut endpoints = endpoints(100);
        for (index, endpoint) in endpoints.0.iter_mut().enumerate() {
            endpoint.fits = index % 25 == 3;
        }
        let mut rng = SmallRng::seed_from_u64(1);
        let mut firsts = [0; 100];
        let mut pairs = [0; 100];
        for _ in 0..8_000 {
            let (one, other) = scan(&endpoints, &mut rng).unwrap();
            assert_ne!(one, other);
            firsts[one] += 1;
            pairs[one] += 1;
            pairs[other] += 1;
        }
        for index in [3, 28, 53, 78] {
            assert!((1_850..2_150).contains(&firsts[index]), "{firsts:?}");
            assert!((3_800..4_200).contains(&pairs[index]), "{pairs:?}");
        }
    }

    #[test]
    fn a_slow_start_gets_its_part_of_a_share() {
        for (balance, least, most) in [
            // Its load is kept at a tenth of the others'.
            (Balance::LeastConnections, 20, 50),
            (Balance::Random, 20, 50),
            (Balance::RoundRobin, 20, 50),
        ] {
            let mut endpoints = endpoints(4);
            endpoints.0[1].warmth = WARM / 10;
            let got = spread(balance, &mut endpoints, 1_000, 3);
            assert!((least..=most).contains(&got[1]), "{balance:?}: {got:?}");
        }
    }

    #[test]
    fn slow_endpoints_get_fewer_by_peak_ewma() {
        let mut endpoints = endpoints(2);
        endpoints.0[0].connect_us = Some(1_000);
        let got = spread(Balance::PeakEwma, &mut endpoints, 110, 5);
        assert!((99..=101).contains(&got[1]), "{got:?}");
    }

    #[test]
    fn one_that_was_never_measured_is_tried_by_one_connection() {
        let mut endpoints = endpoints(2);
        endpoints.0[0].connect_us = None;
        endpoints.0[1].live = 40;
        let got = spread(Balance::PeakEwma, &mut endpoints, 9, 5);
        assert_eq!(got, [1, 8]);
    }
}
