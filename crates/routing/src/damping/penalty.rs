//! Points that are forgotten by half in every half-life, in integers: the same on every machine.
//!
//! `2^-x` is a shift by the whole part of `x` and, for each binary digit of the rest, a multiplication with the root of 1/2
//! that belongs to it. Those roots are exact to 64 binary places; of the rest 32 digits count. So a result is within one
//! part in 2^32, and 2^-16 points for the last digit that is kept, of the real one (a test holds it against `f64`).

use serde::{Deserialize, Serialize};
use std::time::Duration;
use weft_model::damping::DampingSettings;

/// Binary places that are kept of points.
const PLACES: u32 = 16;
/// Binary digits of the part of a half-life that count.
const DIGITS: usize = 32;
/// `2^-(2^-k)` for k from 1, with 64 binary places.
const ROOTS: [u64; DIGITS] = roots();
/// After so many half-lives nothing is left of what 64 bits can hold.
const HALF_LIVES_MAX: u64 = 64;

/// Points. See the module's documentation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Penalty(u64);

impl Penalty {
    /// No points.
    pub const ZERO: Self = Self(0);

    /// So many points, at most 2^48.
    #[must_use]
    pub const fn of(points: u64) -> Self {
        Self(points.saturating_mul(1 << PLACES))
    }

    /// Whole points, rounded to the nearest.
    #[must_use]
    pub const fn points(self) -> u64 {
        self.0.saturating_add(1 << (PLACES - 1)) >> PLACES
    }

    /// Thousandths of points, rounded down.
    #[must_use]
    pub const fn milli(self) -> u64 {
        self.0.saturating_mul(1_000) >> PLACES
    }

    /// As a real number.
    #[must_use]
    pub fn as_f64(self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "for showing and comparing, not for folding")]
        let points = self.0 as f64;
        points / f64::from(1_u32 << PLACES)
    }

    /// Both together.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The most points that an endpoint can have: from there it takes `hold_max` to come down to `reuse`.
    #[must_use]
    pub fn most(settings: &DampingSettings) -> Self {
        let (half_life, hold) = (u64::from(settings.half_life_ms.max(1)), u64::from(settings.hold_max_ms));
        // One doubling more than needed, and then the surplus forgotten.
        let doublings = (hold / half_life + 1).min(31);
        let surplus = (doublings * half_life).saturating_sub(hold);
        Self::of(u64::from(settings.reuse) << doublings)
            .decayed(Duration::from_millis(surplus), settings.half_life_ms)
    }

    /// What is left after a while.
    #[must_use]
    pub fn decayed(self, elapsed: Duration, half_life_ms: u32) -> Self {
        let half_life = u64::from(half_life_ms.max(1));
        let elapsed = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let (whole, rest) = (elapsed / half_life, elapsed % half_life);
        if whole >= HALF_LIVES_MAX {
            return Self::ZERO;
        }
        let digits = (rest << DIGITS) / half_life;
        let mut factor: u128 = 1 << 64;
        for (place, root) in ROOTS.iter().enumerate() {
            if digits >> (DIGITS - 1 - place) & 1 == 1 {
                factor = (factor * u128::from(*root)) >> 64;
            }
        }
        let left = ((u128::from(self.0) * factor) >> 64) >> whole;
        Self(u64::try_from(left).unwrap_or(u64::MAX))
    }

    /// How long until fewer points than these are left: the first millisecond at which that is so.
    #[must_use]
    pub fn falls_below(self, points: u32, half_life_ms: u32) -> Duration {
        let bar = Self::of(u64::from(points.max(1)));
        let below = |ms| self.decayed(Duration::from_millis(ms), half_life_ms) < bar;
        // What is left only falls, so where it passes the bar can be bracketed.
        let (mut from, mut to) = (0, u64::from(half_life_ms) * HALF_LIVES_MAX);
        while from < to {
            let middle = u64::midpoint(from, to);
            if below(middle) {
                to = middle;
            } else {
                from = middle + 1;
            }
        }
        Duration::from_millis(to)
    }
}

const fn roots() -> [u64; DIGITS] {
    let mut roots = [0; DIGITS];
    // The root of 1/2, with 64 binary places.
    let mut root = (1_u128 << 127).isqrt();
    let mut place = 0;
    while place < DIGITS {
        #[expect(clippy::cast_possible_truncation, reason = "a root of less than 1 stays less than 1")]
        {
            roots[place] = root as u64;
        }
        root = (root << 64).isqrt();
        place += 1;
    }
    roots
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decay_is_within_the_stated_error_of_the_real_one(
            points in 0..7_000_000_000_u64, ms in 0..100_000_000_u32, half_life in 1_000..3_600_000_u32,
        ) {
            let left = Penalty::of(points).decayed(Duration::from_millis(ms.into()), half_life).as_f64();
            let penalty = Penalty::of(points).as_f64();
            let real = penalty * (-f64::from(ms) / f64::from(half_life)).exp2();
            let error = real / f64::from(u32::MAX) + 1.0 / 65_536.0;
            prop_assert!((left - real).abs() <= error, "{left} for {real}");
        }

        #[test]
        fn nothing_grows_by_waiting(
            points in 0..7_000_000_000_u64, ms in 0..100_000_000_u64, more in 0..5_000_u64, half_life in 1_000..3_600_000_u32,
        ) {
            let after = |ms| Penalty::of(points).decayed(Duration::from_millis(ms), half_life);
            prop_assert!(after(ms + more) <= after(ms));
            prop_assert!(after(0) == Penalty::of(points));
        }

        #[test]
        fn when_it_falls_below_is_exact(points in 0..7_000_000_000_u64, bar in 1..100_000_u32, half_life in 1_000..3_600_000_u32) {
            let penalty = Penalty::of(points);
            let after = penalty.falls_below(bar, half_life);
            prop_assert!(penalty.decayed(after, half_life) < Penalty::of(bar.into()));
            if let Some(before) = after.checked_sub(Duration::from_millis(1)) {
                prop_assert!(penalty.decayed(before, half_life) >= Penalty::of(bar.into()));
            }
        }
    }

    #[test]
    fn the_bound_is_what_takes_the_longest_hold_to_forget() {
        let settings = DampingSettings::default();
        assert_eq!(Penalty::most(&settings), Penalty::of(24_000));
        let odd = DampingSettings { half_life_ms: 20_000, hold_max_ms: 70_000, ..settings };
        let real = 750.0 * 3.5_f64.exp2();
        assert!((Penalty::most(&odd).as_f64() - real).abs() < 0.001);
    }
}
