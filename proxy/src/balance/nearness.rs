//! Which part of a service's connections goes to endpoints of which locality. Pure.
//!
//! Localities are ordered, the nearest first. Each can take as much of all connections as the share of its endpoints that are healthy is of the
//! threshold: all of them from the threshold on, as much less below as fewer are healthy. The nearest takes what it can, the next one what is left, and
//! so on. If all together can take less than everything, each takes in proportion to what it can: somebody has to.
//!
//! Called by [`crate::routes`], which knows who is near and who is healthy.

/// How many there are at most: the client's zone, its region, and elsewhere.
pub(crate) const LEVELS: usize = 3;

/// Everything, in the unit in which shares are told.
pub(crate) const WHOLE: u32 = 1_000;

/// What a locality has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Level {
    /// Endpoints that can be used.
    pub(crate) healthy: usize,
    /// Endpoints of which that is known.
    pub(crate) of: usize,
}

/// What each locality takes, of [`WHOLE`] or, if they cannot take everything together, of their sum. All are 0 if nobody is healthy.
pub(crate) fn shares(levels: &[Level], threshold_percent: u8) -> [u32; LEVELS] {
    let mut left = WHOLE;
    let mut shares = [0; LEVELS];
    for (share, level) in shares.iter_mut().zip(levels) {
        let enough = u128::from(threshold_percent) * level.of as u128;
        let can = (level.healthy as u128 * 100 * u128::from(WHOLE)).checked_div(enough).unwrap_or(0);
        // One healthy endpoint of very many is more than none.
        let can = can.max(u128::from(level.healthy > 0));
        *share = u32::try_from(can).unwrap_or(WHOLE).min(left);
        left -= *share;
    }
    shares
}

/// Which locality a connection goes to: each as often as its share, if `roll` takes every value as often as every other. None if no locality takes
/// any.
pub(crate) fn draw(shares: &[u32; LEVELS], roll: u64) -> Option<usize> {
    let all: u32 = shares.iter().sum();
    let mut at = roll.checked_rem(all.into())?;
    shares.iter().position(|share| {
        let share = u64::from(*share);
        let here = at < share;
        at = at.saturating_sub(share);
        here
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn level(healthy: usize, of: usize) -> Level {
        Level { healthy, of }
    }

    fn levels() -> impl Strategy<Value = Vec<Level>> {
        let one = (0..60_usize, 0..60_usize).prop_map(|(one, other)| level(one.min(other), one.max(other)));
        prop::collection::vec(one, 0..=LEVELS)
    }

    #[test]
    fn the_nearest_takes_all_down_to_the_threshold_and_then_as_much_less() {
        let far = level(9, 10);
        for (healthy, near, next) in
            [(10, 1_000, 0), (7, 1_000, 0), (6, 857, 143), (5, 714, 286), (1, 142, 858), (0, 0, 1_000)]
        {
            assert_eq!(shares(&[level(healthy, 10), far], 70), [near, next, 0], "{healthy} of 10");
        }
        // At a threshold of 100 each one that is missing counts.
        assert_eq!(shares(&[level(9, 10), far, far], 100), [900, 100, 0]);
        // The second is short too, and the third gets what is left.
        assert_eq!(shares(&[level(1, 10), level(1, 10), level(1, 1)], 50), [200, 200, 600]);
        assert_eq!(shares(&[level(1, 10), level(1, 10)], 100), [100, 100, 0], "half each: somebody has to");
        assert_eq!(shares(&[level(0, 0), level(0, 3), level(2, 2)], 70), [0, 0, 1_000]);
        assert_eq!(shares(&[level(1, 1_000_000), level(0, 3)], 100), [1, 0, 0]);
        assert_eq!(shares(&[level(0, 3)], 70), [0; LEVELS]);
    }

    proptest! {
        /// The same by fractions, one locality after the other.
        #[test]
        fn shares_are_what_the_rule_says(levels in levels(), threshold in 1..=100_u8) {
            let shares = shares(&levels, threshold);
            let mut left = 1.0_f64;
            for (level, share) in levels.iter().zip(shares) {
                let healthy = if level.of == 0 { 0.0 } else { level.healthy as f64 / level.of as f64 };
                let takes = (healthy / (f64::from(threshold) / 100.0)).min(left);
                // Each is rounded down, and what that leaves goes to the next.
                prop_assert!((f64::from(share) / f64::from(WHOLE) - takes).abs() < 0.004, "{shares:?} of {levels:?}");
                left -= takes;
            }
            prop_assert!(shares.iter().sum::<u32>() <= WHOLE);
            let anybody = levels.iter().any(|level| level.healthy > 0);
            prop_assert_eq!(shares.iter().any(|share| *share > 0), anybody);
        }

        /// Whoever is drawn has a share; over all rolls each is drawn exactly as often as it is to be.
        #[test]
        fn each_is_drawn_as_often_as_its_share(levels in levels(), threshold in 1..=100_u8, roll: u64) {
            let shares = shares(&levels, threshold);
            let all: u32 = shares.iter().sum();
            prop_assert_eq!(draw(&shares, roll).is_some(), all > 0);
            prop_assert!(draw(&shares, roll).is_none_or(|level| shares[level] > 0));
            let mut drawn = [0; LEVELS];
            for roll in 0..u64::from(all) {
                drawn[draw(&shares, roll).unwrap()] += 1;
            }
            prop_assert_eq!(drawn, shares);
        }
    }
}
