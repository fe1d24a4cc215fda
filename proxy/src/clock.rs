//! The one place that reads the wall clock. Durations are measured with `tokio::time::Instant` instead.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::time::Instant;
use weft_model::Timestamp;

/// Now, by this machine's clock.
#[expect(clippy::disallowed_methods, reason = "everything else takes its time from here")]
pub(crate) fn now() -> Timestamp {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX))
}

/// When a coming moment is by this machine's clock, if nobody sets that meanwhile.
pub(crate) fn at(moment: Instant, since: Instant) -> Timestamp {
    let ahead = moment.saturating_duration_since(since).as_millis();
    Timestamp(now().0.saturating_add(i64::try_from(ahead).unwrap_or(i64::MAX)))
}

/// Milliseconds since this was first asked, and one more, so that 0 is never now. Never goes back, whatever happens to the
/// machine's clock: for what threads keep in one word.
pub(crate) fn uptime_ms() -> u64 {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let first = *FIRST.get_or_init(Instant::now);
    u64::try_from(first.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
}

/// A time as records show it: RFC 3339 in UTC.
pub(crate) fn rfc3339(time: Timestamp) -> String {
    jiff::Timestamp::from_millisecond(time.0).map(|time| time.to_string()).unwrap_or_default()
}
