//! What probes say of the app's health. Pure: results in, what changed out.

use weft_model::health::Health;

/// The result of one probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Probed {
    /// The app accepted on every port.
    Good,
    /// It did not, for a reason that may pass.
    Bad,
    /// Nobody listens where it should: there is no doubt about that.
    Refused,
}

/// Counts probe results: so many good ones in a row make the app healthy, so many bad ones unhealthy, one refusal at once.
///
/// The first good one of this process makes it healthy by itself, so that a mesh comes up as fast as its apps do: an app that
/// was never seen up does not flap by coming up.
#[derive(Debug)]
pub(super) struct Observer {
    rise: u32,
    fall: u32,
    health: Health,
    seen_good: bool,
    /// Results in a row that speak against `health`, the last one good or bad.
    against: (bool, u32),
}

impl Observer {
    pub(super) const fn new(rise: u32, fall: u32) -> Self {
        Self { rise, fall, health: Health::Unknown, seen_good: false, against: (false, 0) }
    }

    pub(super) const fn health(&self) -> Health {
        self.health
    }

    /// Takes a result in; it takes `doubt` more times as many bad ones while the observer doubts itself. True if the
    /// health changed.
    pub(super) fn observe(&mut self, probed: Probed, doubt: u8) -> bool {
        let good = probed == Probed::Good;
        let settled = matches!((good, self.health), (true, Health::Healthy) | (false, Health::Unhealthy));
        if settled {
            self.against = (good, 0);
            return false;
        }
        let count = if self.against.0 == good { self.against.1.saturating_add(1) } else { 1 };
        self.against = (good, count);
        let needed = match probed {
            Probed::Good if self.seen_good => self.rise,
            Probed::Bad => self.fall.saturating_mul(u32::from(doubt) + 1),
            Probed::Good | Probed::Refused => 1,
        };
        if count < needed {
            return false;
        }
        self.seen_good |= good;
        self.health = if good { Health::Healthy } else { Health::Unhealthy };
        self.against = (good, 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::Probed::{Bad, Good, Refused};
    use super::*;
    use proptest::prelude::*;

    /// The second letter of what the health is after each.
    fn after(observer: &mut Observer, doubt: u8, probed: &[Probed]) -> String {
        let letter = |probed: &Probed| {
            observer.observe(*probed, doubt);
            char::from(observer.health().as_str().as_bytes()[1])
        };
        probed.iter().map(letter).collect()
    }

    #[test]
    fn so_many_in_a_row_decide_but_for_the_first_good_one() {
        let mut observer = Observer::new(2, 3);
        let results = [Bad, Good, Bad, Bad, Good, Bad, Bad, Bad, Good, Bad, Good, Good];
        // unknown, healthy with the first good one, unhealthy with the third bad one in a row, healthy with the second good one
        assert_eq!(after(&mut observer, 0, &results), "neeeeeennnne");
    }

    #[test]
    fn a_refusal_counts_at_once_and_the_first_good_one_after_it() {
        assert_eq!(after(&mut Observer::new(2, 3), 0, &[Refused, Good, Refused, Good, Good]), "nenne");
    }

    #[test]
    fn who_doubts_itself_needs_more_to_call_the_app_down() {
        let mut observer = Observer::new(2, 2);
        assert_eq!(after(&mut observer, 2, &[Good, Bad, Bad, Bad, Bad, Bad, Bad]), "eeeeeen");
        let mut observer = Observer::new(2, 2);
        assert_eq!(after(&mut observer, 7, &[Good, Refused]), "en", "a refusal leaves no doubt");
    }

    proptest! {
        #[test]
        fn a_change_is_told_exactly_when_there_is_one(
            results in prop::collection::vec(prop::sample::select(&[Good, Bad, Refused][..]), 0..60),
            rise in 1u32..5, fall in 1u32..5, doubt in 0u8..8,
        ) {
            let mut observer = Observer::new(rise, fall);
            for (index, probed) in results.iter().enumerate() {
                let before = observer.health();
                prop_assert_eq!(observer.observe(*probed, doubt), observer.health() != before);
                let good = *probed == Good;
                let run = results[..=index].iter().rev().take_while(|other| (**other == Good) == good).count();
                if run >= if good { rise } else { fall * (u32::from(doubt) + 1) } as usize {
                    prop_assert_eq!(observer.health() == Health::Healthy, good);
                }
                if *probed == Refused {
                    prop_assert_eq!(observer.health(), Health::Unhealthy);
                }
            }
        }
    }
}
