//! `--at`: a moment of the log, as a version or as a time.

use crate::failure::{Failure, Outcome};
use jiff::{SignedDuration, Timestamp};
use std::str::FromStr;
use weft_model::ConfigVersion;
use weft_proto::v1;

/// A moment of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// After the event at this position.
    Position(u64),
    /// The same, in the epoch that the log is expected to have had then.
    Version(ConfigVersion),
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

    /// Refuses an answer that is not of the version that was asked for.
    pub(crate) fn check(self, as_of: Option<v1::ConfigVersion>) -> Outcome<()> {
        self.at.map_or(Ok(()), |moment| moment.check(as_of))
    }
}

impl Moment {
    pub(crate) const fn wire(self) -> v1::At {
        let at = match self {
            Self::Position(position) => v1::at::At::Position(position),
            Self::Version(version) => v1::at::At::Position(version.position.0),
            Self::Time(ms) => v1::at::At::TimeMs(ms),
        };
        v1::At { at: Some(at) }
    }

    /// Refuses a state that is not of the version that was asked for. The wire names positions, and a log that was
    /// restored has other events at the same ones.
    pub(crate) fn check(self, as_of: Option<v1::ConfigVersion>) -> Outcome<()> {
        let Self::Version(wanted) = self else { return Ok(()) };
        let there = as_of.unwrap_or_default();
        // Before the first event there was no epoch.
        if wanted.position.0 == 0 || there.epoch == wanted.epoch.0 {
            return Ok(());
        }
        let what = format!(
            "version {wanted} is not in this log: position {} is {}.{}",
            wanted.position, there.epoch, there.position
        );
        Err(Failure::fault(what).next("see the log's versions with `weft log -o json`"))
    }

    fn parse(text: &str, now: Timestamp) -> Option<Self> {
        let text = text.trim();
        if let Ok(position) = text.parse() {
            return Some(Self::Position(position));
        }
        if let Ok(version) = text.parse::<ConfigVersion>() {
            return Some(Self::Version(version));
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
        assert_eq!(parse("1.42"), Some(Moment::Version("1.42".parse().unwrap())));
        assert_eq!(parse("2026-03-01T12:00:00Z"), Some(Moment::Time(1_772_366_400_000)));
        assert_eq!(parse("2026-03-01T13:00:00+01:00"), Some(Moment::Time(1_772_366_400_000)));
        assert_eq!(parse("10m ago"), Some(Moment::Time(1_772_365_800_000)));
        assert_eq!(parse("1h 30m ago"), Some(Moment::Time(1_772_361_000_000)));
        for bad in ["", "-1", "yesterday", "ago", "12:00"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_version_of_another_epoch_is_refused() {
        let there = Some(v1::ConfigVersion { epoch: 1, position: 5 });
        for right in ["5", "1.5", "now", "1.0"] {
            right.parse::<Moment>().unwrap().check(there).unwrap();
        }
        let refused = "9.5".parse::<Moment>().unwrap().check(there).unwrap_err().to_string();
        assert!(refused.contains("version 9.5 is not in this log: position 5 is 1.5"), "{refused}");
    }
}
