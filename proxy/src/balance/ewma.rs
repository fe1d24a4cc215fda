//! How long connects to an endpoint take, as an average that follows a rise at once and a fall slowly (peak EWMA, after
//! Finagle's): one slow connect is enough to prefer others, and time has to show that it was chance. Pure.

/// In which time the average forgets all but a third of what was, in milliseconds: some connects of an endpoint in use.
const DECAY_MS: f64 = 10_000.0;

/// An average and when it was true, in one word, so that threads share it without a lock. 0 if nothing was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ewma(pub(crate) u64);

impl Ewma {
    /// The average now, in microseconds; none if nothing was measured. It falls while nothing is measured, so that an
    /// endpoint that was slow is tried again.
    pub(crate) fn microseconds(self, now_ms: u64) -> Option<u64> {
        if self.0 == 0 {
            return None;
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it is positive, and falls from 32 bits"
        )]
        let average = (f64::from(self.average()) * self.kept(now_ms)) as u64;
        Some(average)
    }

    /// With one more connect, which took so long and ended now.
    pub(crate) fn with(self, took_us: u64, now_ms: u64) -> Self {
        let took = u32::try_from(took_us).unwrap_or(u32::MAX).max(1);
        let average = match self.microseconds(now_ms) {
            Some(average) if u64::from(took) < average => {
                let kept = self.kept(now_ms);
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "it lies between two numbers of 32 bits"
                )]
                let mixed = (f64::from(self.average()) * kept + f64::from(took) * (1.0 - kept)) as u32;
                mixed.max(1)
            }
            Some(_) | None => took,
        };
        Self(u64::from(average) << 32 | now_ms & u64::from(u32::MAX))
    }

    const fn average(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Which part of the average is left. The time is kept in 32 bits: after 50 days without a connect it is any part.
    fn kept(self, now_ms: u64) -> f64 {
        #[expect(clippy::cast_possible_truncation, reason = "the lower half, as it is kept")]
        let passed = (now_ms as u32).wrapping_sub(self.0 as u32);
        (-f64::from(passed) / DECAY_MS).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_rise_counts_at_once_and_a_fall_slowly() {
        let calm = Ewma::default().with(200, 1_000).with(200, 2_000);
        assert_eq!(calm.microseconds(2_000), Some(200));
        let peak = calm.with(50_000, 2_100);
        assert_eq!(peak.microseconds(2_100), Some(50_000));
        let later = peak.with(200, 3_100).microseconds(3_100).unwrap();
        assert!((45_000..46_000).contains(&later), "{later}");
        assert!(peak.microseconds(62_100).unwrap() < 150);
        assert_eq!(Ewma::default().microseconds(5), None);
    }

    proptest! {
        #[test]
        fn the_average_lies_between_the_least_and_the_most(
            samples in prop::collection::vec((1..10_000_000_u64, 0..1_000_u64), 1..50), start: u64,
        ) {
            let (mut ewma, mut now) = (Ewma::default(), start);
            for (took, time) in &samples {
                now = now.wrapping_add(*time);
                ewma = ewma.with(*took, now);
            }
            let average = ewma.microseconds(now).unwrap();
            prop_assert!(average <= samples.iter().map(|sample| sample.0).max().unwrap());
            prop_assert!(average >= samples.last().unwrap().0.min(samples.iter().map(|sample| sample.0).min().unwrap()) / 2);
        }
    }
}
