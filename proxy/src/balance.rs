//! Which endpoint a connection goes to. Pure: live counts, the turn and randomness are arguments.
//!
//! Called by [`crate::outbound`] for every attempt. Whether an endpoint may be chosen at all is not decided here: the
//! candidates are the eligible ones that were not tried yet.

use rand::{Rng, RngExt};
use weft_model::traffic::Balance;

/// Chooses one of `live.len()` candidates; `live[i]` says how many connections candidate `i` has. `turn` counts the
/// choices made for the service so far. None if there is no candidate.
pub(crate) fn pick(balance: Balance, live: &[usize], turn: usize, rng: &mut impl Rng) -> Option<usize> {
    match live.len() {
        0 => None,
        1 => Some(0),
        count => Some(match balance {
            Balance::LeastConnections => {
                // Two different ones, so that the fuller one of two is never chosen.
                let first = rng.random_range(0..count);
                let second = (first + rng.random_range(1..count)) % count;
                if live[second] < live[first] { second } else { first }
            }
            Balance::RoundRobin => turn % count,
            Balance::Random => rng.random_range(0..count),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    const ALL: [Balance; 3] = [Balance::LeastConnections, Balance::RoundRobin, Balance::Random];

    /// Opens `count` connections that all stay, and says how many each endpoint got.
    fn spread(balance: Balance, endpoints: usize, count: usize, seed: u64) -> Vec<usize> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut live = vec![0; endpoints];
        for turn in 0..count {
            let picked = pick(balance, &live, turn, &mut rng).unwrap();
            live[picked] += 1;
        }
        live
    }

    proptest! {
        #[test]
        fn what_is_picked_is_a_candidate(live in prop::collection::vec(0usize..9, 0..9), turn: usize, seed: u64) {
            for balance in ALL {
                let picked = pick(balance, &live, turn, &mut SmallRng::seed_from_u64(seed));
                prop_assert_eq!(picked.is_some(), !live.is_empty());
                prop_assert!(picked.is_none_or(|index| index < live.len()));
            }
        }

        #[test]
        fn the_fullest_endpoint_is_not_picked_by_least_connections(
            mut live in prop::collection::vec(0usize..9, 2..9), full in 0usize..9, seed: u64,
        ) {
            let full = full % live.len();
            live[full] = 10;
            let picked = pick(Balance::LeastConnections, &live, 0, &mut SmallRng::seed_from_u64(seed));
            prop_assert_ne!(picked, Some(full));
        }

        #[test]
        fn two_choices_keep_loads_together(endpoints in 2usize..20, seed: u64) {
            let live = spread(Balance::LeastConnections, endpoints, endpoints * 50, seed);
            // The theory's bound is log log n + O(1) above the mean; 6 is far outside it.
            prop_assert!(live.iter().all(|count| *count <= 56), "{live:?}");
        }

        #[test]
        fn round_robin_is_even(endpoints in 1usize..20, rounds in 1usize..9, seed: u64) {
            let live = spread(Balance::RoundRobin, endpoints, endpoints * rounds, seed);
            prop_assert!(live.iter().all(|count| *count == rounds), "{live:?}");
        }
    }

    #[test]
    fn random_reaches_every_endpoint() {
        assert!(spread(Balance::Random, 5, 1_000, 7).iter().all(|count| *count > 100));
    }
}
