//! How long a connection that carries bytes may last, by its traffic policy. Nothing is allocated and no timer runs for a
//! connection that nothing limits: one is made when it has an age or an idle time, or when one of its directions has ended.
//!
//! Called by [`crate::outbound`]; the sidecar at the other end learns it from the reset.

use crate::connections::Close;
use crate::tunnel::copy::Counters;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};
use weft_model::CloseReason;
use weft_model::traffic::ConnectionPolicy;

/// How many times in a quiet time it is looked whether bytes moved. A connection ends when it was quiet for the whole time, never
/// before, and at most this part of it later; bytes themselves set no timer.
const LOOKS: u32 = 8;

/// Copies until that ends, or the connection has lasted for as long as it may. What copies stays where it is: it is most of what a
/// connection holds, and would be there twice.
pub(crate) async fn within<T>(
    policy: &ConnectionPolicy,
    counters: &Counters,
    started: Instant,
    mut copying: Pin<&mut impl Future<Output = T>>,
) -> Result<T, Close> {
    let mut over: Option<Pin<Box<dyn Future<Output = Close> + Send + '_>>> = None;
    let mut half_open = None;
    poll_fn(|cx| {
        if let Poll::Ready(copied) = copying.as_mut().poll(cx) {
            return Poll::Ready(Ok(copied));
        }
        let is_half_open = counters.half_open();
        if half_open != Some(is_half_open) {
            half_open = Some(is_half_open);
            let limits = Limits::of(policy, is_half_open, started);
            over = limits.map(|limits| Box::pin(limits.over(counters)) as _);
        }
        match &mut over {
            Some(over) => over.as_mut().poll(cx).map(Err),
            None => Poll::Pending,
        }
    })
    .await
}

/// What ends a connection, in the state in which it is.
#[derive(Clone, Copy, Debug)]
struct Limits {
    ends_at: Option<(Instant, Duration)>,
    quiet: Option<(Duration, &'static str)>,
}

impl Limits {
    /// None if nothing does.
    fn of(policy: &ConnectionPolicy, half_open: bool, started: Instant) -> Option<Self> {
        let milliseconds = |ms: Option<u32>| ms.map(|ms| Duration::from_millis(ms.into()));
        let max_age = milliseconds(policy.max_age_ms);
        let idle = milliseconds(policy.idle_timeout_ms).map(|time| (time, "no byte moved"));
        let half_open_timeout = milliseconds(policy.half_open_timeout_ms).filter(|_| half_open);
        let half_open = half_open_timeout.map(|time| (time, "one direction ended and no byte moved"));
        let quiet = idle.into_iter().chain(half_open).min();
        let ends_at = max_age.map(|age| (started + age, age));
        (ends_at.is_some() || quiet.is_some()).then_some(Self { ends_at, quiet })
    }

    /// Waits until it is over.
    async fn over(self, counters: &Counters) -> Close {
        let mut moved = counters.total();
        let mut since = Instant::now();
        loop {
            let now = Instant::now();
            let total = counters.total();
            if total != moved {
                (moved, since) = (total, now);
            }
            if let Some((ends_at, age)) = self.ends_at
                && now >= ends_at
            {
                return Close::local(CloseReason::MaxAge, format!("it has lasted {}", written(age)));
            }
            if let Some((time, what)) = self.quiet
                && now >= since + time
            {
                return Close::local(CloseReason::IdleTimeout, format!("{what} for {}", written(time)));
            }
            let look = self.quiet.map(|(time, _)| (now + time / LOOKS).min(since + time));
            let ends_at = self.ends_at.map(|(ends_at, _)| ends_at);
            // One of the two is there.
            let Some(next) = look.into_iter().chain(ends_at).min() else {
                return std::future::pending().await;
            };
            sleep_until(next).await;
        }
    }
}

fn written(time: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use std::pin::pin;
    use tokio::time::sleep;

    const HOUR: u32 = 3_600_000;

    fn policy(half_open: Option<u32>, idle: Option<u32>, max_age: Option<u32>) -> ConnectionPolicy {
        ConnectionPolicy { half_open_timeout_ms: half_open, idle_timeout_ms: idle, max_age_ms: max_age }
    }

    /// How it ends, and after how long.
    async fn ended(
        policy: ConnectionPolicy,
        counters: &Counters,
        copying: impl Future<Output = ()>,
    ) -> (Option<CloseReason>, u128) {
        let started = Instant::now();
        let result = within(&policy, counters, started, pin!(copying)).await;
        (result.err().map(|close| close.reason), started.elapsed().as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn an_age_is_kept_exactly_whatever_moves() {
        let counters = Counters::default();
        let busy = async {
            loop {
                sleep(Duration::from_secs(1)).await;
                counters.moved(1);
            }
        };
        let ended = ended(policy(Some(HOUR), Some(5_000), Some(60_000)), &counters, busy).await;
        assert_eq!(ended, (Some(CloseReason::MaxAge), 60_000));
    }

    #[tokio::test(start_paused = true)]
    async fn quiet_is_counted_from_the_last_byte_and_ends_it_at_most_an_eighth_late() {
        let counters = Counters::default();
        let quiet = ended(policy(None, Some(80_000), None), &counters, pending()).await;
        assert_eq!(quiet, (Some(CloseReason::IdleTimeout), 80_000));
        let once = async {
            sleep(Duration::from_secs(45)).await;
            counters.moved(1);
            pending::<()>().await;
        };
        let (reason, after) = ended(policy(None, Some(80_000), None), &counters, once).await;
        assert_eq!(reason, Some(CloseReason::IdleTimeout));
        assert!((125_000..=135_000).contains(&after), "{after}");
    }

    #[tokio::test(start_paused = true)]
    async fn half_open_is_counted_once_one_direction_ended() {
        let counters = Counters::default();
        let half = async {
            sleep(Duration::from_secs(7_200)).await;
            counters.set_half_open();
            pending::<()>().await;
        };
        let ended_half = ended(policy(Some(HOUR), None, None), &counters, half).await;
        assert_eq!(ended_half, (Some(CloseReason::IdleTimeout), 3 * u128::from(HOUR)));
        // One that is set to be idle for longer than to be half open.
        let both = ended(policy(Some(1_000), Some(5_000), None), &counters, pending()).await;
        assert_eq!(both, (Some(CloseReason::IdleTimeout), 1_000));
    }

    #[tokio::test(start_paused = true)]
    async fn what_nothing_limits_has_no_timer_and_ends_by_itself() {
        assert!(Limits::of(&policy(Some(HOUR), None, None), false, Instant::now()).is_none());
        assert!(Limits::of(&policy(None, None, None), true, Instant::now()).is_none());
        let counters = Counters::default();
        let ended =
            ended(policy(None, Some(2_000), Some(2_000)), &counters, sleep(Duration::from_secs(1))).await;
        assert_eq!(ended, (None, 1_000));
    }
}
