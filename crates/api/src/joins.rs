//! A limit on joins that fail. The secret in a token cannot be guessed at any rate; the limit keeps whoever tries from
//! taking the controller's time and filling its log.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Failures that may come at once: a rollout whose tokens all expired.
const BURST: f64 = 256.0;
/// Failures per second after that.
const PER_SECOND: f64 = 32.0;

/// A bucket of failures that are still allowed.
#[derive(Debug)]
pub(crate) struct FailedJoins {
    bucket: Mutex<(f64, Instant)>,
}

impl FailedJoins {
    pub(crate) fn new() -> Self {
        Self { bucket: Mutex::new((BURST, Instant::now())) }
    }

    /// Whether another join may be tried; if not, when.
    pub(crate) fn admit(&self) -> Result<(), Duration> {
        let left = self.refill(0.0);
        if left >= 1.0 { Ok(()) } else { Err(Duration::from_secs_f64((1.0 - left) / PER_SECOND)) }
    }

    /// A join failed.
    pub(crate) fn count(&self) {
        self.refill(1.0);
    }

    fn refill(&self, taken: f64) -> f64 {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let grown = bucket.0 + now.duration_since(bucket.1).as_secs_f64() * PER_SECOND;
        *bucket = ((grown.min(BURST) - taken).max(0.0), now);
        bucket.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn failures_are_limited_and_forgiven() {
        let joins = FailedJoins::new();
        let mut admitted = 0;
        while joins.admit().is_ok() {
            joins.count();
            admitted += 1;
        }
        assert_eq!(admitted, 256);
        let wait = joins.admit().unwrap_err();
        tokio::time::advance(wait + Duration::from_millis(1)).await;
        assert!(joins.admit().is_ok());
    }
}
