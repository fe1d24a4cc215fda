//! Waits between attempts to reach a controller: decorrelated jitter, so that a fleet that lost its controller at once
//! does not come back at once.

use rand::{Rng, RngExt};
use std::time::Duration;

/// The shortest wait; a controller that restarts is found soon.
const SHORTEST: Duration = Duration::from_millis(100);

/// The longest wait: how late a sidecar may notice that controllers are back. Ten thousand of them then come back within a second, as
/// fast as two cores can greet them; until then they cost a refused packet each every half a second. Those that a controller has no
/// time for are turned away by its system, and come again.
const LONGEST: Duration = Duration::from_secs(1);

/// The next wait is random between the shortest and three times the last one.
#[derive(Debug)]
pub struct Backoff {
    last: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new()
    }
}

impl Backoff {
    /// The next failure is the first one.
    #[must_use]
    pub const fn new() -> Self {
        Self { last: SHORTEST }
    }

    /// How long to wait now.
    pub fn next(&mut self, rng: &mut impl Rng) -> Duration {
        let highest = (self.last * 3).min(LONGEST);
        self.last = rng.random_range(SHORTEST..=highest);
        self.last
    }

    /// It worked: the next failure starts anew.
    pub const fn reset(&mut self) {
        self.last = SHORTEST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    proptest! {
        #[test]
        fn waits_stay_in_bounds_and_differ(seed: u64) {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut backoff = Backoff::new();
            let waits: Vec<_> = (0..50).map(|_| backoff.next(&mut rng)).collect();
            prop_assert!(waits.iter().all(|wait| (SHORTEST..=LONGEST).contains(wait)));
            prop_assert!(waits[1..].iter().any(|wait| *wait != waits[0]));
            backoff.reset();
            prop_assert!(backoff.next(&mut rng) <= SHORTEST * 3);
        }
    }
}
