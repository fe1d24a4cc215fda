//! Times as people read them.

use jiff::Timestamp;
use std::time::Duration;

/// A point in time in UTC, to the second: `2026-03-01T12:00:00Z`; empty for zero, which stands for never.
pub(crate) fn point(ms: i64) -> String {
    match Timestamp::from_millisecond(ms) {
        Ok(time) if ms != 0 => time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        Ok(_) | Err(_) => String::new(),
    }
}

/// A point in time to the millisecond.
pub(crate) fn point_ms(us: i64) -> String {
    Timestamp::from_microsecond(us)
        .map(|time| time.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string())
        .unwrap_or_default()
}

/// How long ago a point was; empty for zero, which stands for never.
pub(crate) fn ago(now_ms: i64, then_ms: i64) -> String {
    if then_ms == 0 {
        return String::new();
    }
    let past = u64::try_from(now_ms.saturating_sub(then_ms)).unwrap_or(0);
    format!("{} ago", span(Duration::from_millis(past)))
}

/// A length of time in its largest unit or two: `340ms`, `12s`, `3m`, `5h`, `9d`.
pub(crate) fn span(length: Duration) -> String {
    let (ms, s) = (length.as_millis(), length.as_secs());
    match s {
        0 => format!("{ms}ms"),
        1..=119 => format!("{s}s"),
        120..=7_199 => format!("{}m", s / 60),
        7_200..=172_799 => format!("{}h", s / 3_600),
        _ => format!("{}d", s / 86_400),
    }
}

/// A length in milliseconds as resources write it: `500ms`, `2s`.
pub(crate) fn written(ms: u32) -> String {
    if ms != 0 && ms.is_multiple_of(1_000) { format!("{}s", ms / 1_000) } else { format!("{ms}ms") }
}

/// Now, in milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        assert_eq!(point(1_772_366_400_123), "2026-03-01T12:00:00Z");
        assert_eq!(point(0), "");
        assert_eq!(point_ms(1_772_366_400_123_456), "2026-03-01T12:00:00.123Z");
        assert_eq!(ago(10_000, 7_000), "3s ago");
        assert_eq!(ago(1, 7_000), "0ms ago");
        assert_eq!(span(Duration::from_secs(7_200)), "2h");
        assert_eq!((written(500), written(2_000), written(0)), ("500ms".into(), "2s".into(), "0ms".into()));
    }
}
