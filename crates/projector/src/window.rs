//! How long what is not urgent waits for company before it is written and published. Pure: it is given the time.
//!
//! Every publication costs a transaction and a notice to everybody whom it concerns. After one, the next that is not urgent waits as
//! long as that one cost: so publishing takes half of the time at most, however fast changes come, and what waits goes out as one
//! notice. Whoever comes when nothing was published lately waits for nothing.

use std::time::Duration;
use tokio::time::Instant;

/// The longest wait, far below the bound within which a change is to reach everybody.
pub(crate) const WINDOW_MAX: Duration = Duration::from_millis(200);
/// What telling one subscriber costs a controller: a look, a patch, an encoded notice, its way through TLS and the kernel. It is
/// paid after the publication, on the same cores, so it is reckoned rather than measured.
const TELL_COST: Duration = Duration::from_micros(20);

/// See the module's documentation.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Window {
    opens: Option<Instant>,
}

impl Window {
    /// Something was published, which took so long to write and told so many subscribers.
    pub(crate) fn published(&mut self, took: Duration, told: usize, now: Instant) {
        self.opens = Some(now + after(took, told));
    }

    /// When what is not urgent may be written; none if now.
    #[must_use]
    pub(crate) fn opens(&self, now: Instant) -> Option<Instant> {
        self.opens.filter(|opens| *opens > now)
    }
}

/// How long to wait after a publication that took so long to write and told so many.
fn after(took: Duration, told: usize) -> Duration {
    let telling = TELL_COST.saturating_mul(u32::try_from(told).unwrap_or(u32::MAX));
    took.saturating_add(telling).min(WINDOW_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nobody_waits_when_nothing_was_published_lately() {
        let (mut window, now) = (Window::default(), Instant::now());
        assert_eq!(window.opens(now), None);
        window.published(Duration::from_millis(3), 100, now);
        let opens = now + Duration::from_millis(5);
        assert_eq!(window.opens(now), Some(opens));
        assert_eq!(window.opens(opens), None);
    }

    proptest! {
        /// It grows with what publishing costs, within its bound.
        #[test]
        fn the_wait_grows_and_is_bounded(took in 0..1_000_u64, more in 0..1_000_u64, told in 0..200_000_usize, others in 0..200_000_usize) {
            let (took, more) = (Duration::from_millis(took), Duration::from_millis(more));
            let wait = after(took, told);
            prop_assert!(wait <= WINDOW_MAX);
            prop_assert!(wait <= after(took + more, told + others));
            prop_assert!(wait == WINDOW_MAX || wait >= took);
        }
    }
}
