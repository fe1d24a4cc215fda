//! How much an observer doubts itself, as in Lifeguard (Dadgar, Phillips and Currey, 2018): a sidecar that is itself starved or
//! cut off sees sick apps where there are none, so it waits longer, and for more evidence, before it calls one sick.
//!
//! Two things make it doubt: that its own timers fire late, each time one degree more, each time in time one less; and that it
//! hears no controller, one degree for as long as that lasts.

use std::time::Duration;
use weft_model::health::DOUBT_MAX;

/// How late a timer may fire without being a sign of anything; a busy machine is some ten milliseconds late.
const LATE: Duration = Duration::from_millis(250);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    late: u8,
    cut_off: bool,
}

impl Doubt {
    /// A timer fired so late.
    pub(super) fn fired(&mut self, late: Duration) {
        self.late = if late > LATE { (self.late + 1).min(DOUBT_MAX) } else { self.late.saturating_sub(1) };
    }

    /// Whether heartbeats of controllers are missing.
    pub(super) const fn set_cut_off(&mut self, cut_off: bool) {
        self.cut_off = cut_off;
    }

    /// From 0 to [`DOUBT_MAX`].
    pub(super) fn score(&self) -> u8 {
        (self.late + u8::from(self.cut_off)).min(DOUBT_MAX)
    }

    /// How long a probe may take.
    pub(super) fn timeout(&self, base: Duration) -> Duration {
        base.saturating_mul(u32::from(self.score()) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubt_grows_with_each_late_timer_and_passes_one_by_one() {
        let mut doubt = Doubt::default();
        assert_eq!((doubt.score(), doubt.timeout(Duration::from_secs(1))), (0, Duration::from_secs(1)));
        for _ in 0..20 {
            doubt.fired(Duration::from_secs(3));
        }
        doubt.set_cut_off(true);
        assert_eq!((doubt.score(), doubt.timeout(Duration::from_secs(1))), (7, Duration::from_secs(8)));
        for left in (1..=7).rev() {
            doubt.fired(Duration::from_millis(20));
            assert_eq!(doubt.score(), left);
        }
        doubt.fired(Duration::ZERO);
        doubt.set_cut_off(false);
        assert_eq!(doubt.score(), 0);
    }
}
