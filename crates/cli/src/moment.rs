//! `--at`: a moment of the log, as a version or as a time.

use jiff::{SignedDuration, Timestamp};
use std::str::FromStr;
use weft_model::ConfigVersion;
use weft_proto::v1;

/// A moment of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// After the event at this position.
    Position(u64),
    /// After the last event recorded at or before this time, in milliseconds since the Unix epoch.
    Time(i64),
}

/// `--at`, on every command that can look at the past.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct AtArgs {
    /// Answer as of a version (42 or 1.42) or a time (2026-03-01T12:00:00Z, or '10m ago')
    #[arg(long, value_name = "VERSION|TIME")]
    pub(crate) at: Option<Moment>,
}

impl AtArgs {
    pub(crate) fn wire(self) -> Option<v1::At> {
        self.at.map(Moment::wire)
    }
}

impl Moment {
    pub(crate) const fn wire(self) -> v1::At {
        let at = match self {
            Self::Position(position) => v1::at::At::Position(position),
            Self::Time(ms) => v1::at::At::TimeMs(ms),
        };
        v1::At { at: Some(at) }
    }

    fn parse(text: &str, now: Timestamp) -> Option<Self> {
        let text = text.trim();
        if let Ok(position) = text.parse() {
            return Some(Self::Position(position));
        }
        if let Ok(version) = text.parse::<ConfigVersion>() {
            return Some(Self::Position(version.position.0));
        }
        if text == "now" {
            return Some(Self::Time(now.as_millisecond()));
        }
        if let Some(past) = text.strip_suffix("ago") {
            let past: SignedDuration = past.trim().parse().ok()?;
            return now.checked_sub(past).ok().map(|time| Self::Time(time.as_millisecond()));
        }
        text.parse::<Timestamp>().ok().map(|time| Self::Time(time.as_millisecond()))
    }
}

impl FromStr for Moment {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text, Timestamp::now())
            .ok_or("write a version (42 or 1.42), a time (2026-03-01T12:00:00Z), or a time ago ('10m ago')")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_times_are_told_apart() {
        let now: Timestamp = "2026-03-01T12:00:00Z".parse().unwrap();
        let parse = |text| Moment::parse(text, now);
        assert_eq!(parse("42"), Some(Moment::Position(42)));
        assert_eq!(parse("1.42"), Some(Moment::Position(42)));
        assert_eq!(parse("2026-03-01T12:00:00Z"), Some(Moment::Time(1_772_366_400_000)));
        assert_eq!(parse("2026-03-01T13:00:00+01:00"), Some(Moment::Time(1_772_366_400_000)));
        assert_eq!(parse("10m ago"), Some(Moment::Time(1_772_365_800_000)));
        assert_eq!(parse("1h 30m ago"), Some(Moment::Time(1_772_361_000_000)));
        for bad in ["", "-1", "yesterday", "ago", "12:00"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
