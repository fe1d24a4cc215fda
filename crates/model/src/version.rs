//! The counters that order everything: positions in the log, versions in a scope, lives of the log.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Declares a counter newtype over `u64`.
macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// Before the first one.
            pub const ZERO: Self = Self(0);

            /// The one that follows.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<u64> for $name {
            fn from(value: u64) -> Self {
                Self(value)
            }
        }
    };
}

counter! {
    /// Gapless counter inside one scope; the first event of a scope has version 1.
    Version
}
counter! {
    /// Gapless order of the whole log; the first event of the log has position 1.
    Position
}
counter! {
    /// One life of the log's history. A restored or rewound database opens a new, larger epoch.
    Epoch
}

/// What a sidecar runs: an epoch of the log and a position in it. Later epochs are newer than any position
/// of an earlier one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ConfigVersion {
    /// The life of the log that `position` belongs to.
    pub epoch: Epoch,
    /// The last event that is part of this configuration.
    pub position: Position,
}

impl ConfigVersion {
    /// Names the state after `position` in `epoch`.
    #[must_use]
    pub const fn new(epoch: Epoch, position: Position) -> Self {
        Self { epoch, position }
    }
}

impl fmt::Display for ConfigVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.position)
    }
}

impl FromStr for ConfigVersion {
    type Err = ParseVersionError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let (epoch, position) = s.split_once('.').ok_or(ParseVersionError)?;
        let number = |s: &str| s.parse::<u64>().map_err(|_| ParseVersionError);
        Ok(Self::new(Epoch(number(epoch)?), Position(number(position)?)))
    }
}

/// Where a scope stood when something was taken from it: its version, and the event that made it so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ScopeVersion {
    /// The scope's version; zero if it has no event.
    pub version: Version,
    /// The position of the event with that version.
    pub position: Position,
}

/// A text is not `<epoch>.<position>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a config version is written <epoch>.<position>, for example 1.42")]
pub struct ParseVersionError;

/// What a writer believes about a scope; the append succeeds only if it is true when the log is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExpectedVersion {
    /// No expectation: append whatever the scope's version is.
    Any,
    /// The scope has no event yet.
    Empty,
    /// The scope's last event has exactly this version.
    Exact(Version),
}

impl ExpectedVersion {
    /// The expectation that the scope still is where it was seen; version zero means that it has no event.
    #[must_use]
    pub const fn exactly(seen: Version) -> Self {
        if seen.0 == 0 { Self::Empty } else { Self::Exact(seen) }
    }

    /// Whether a scope at `current` (zero: no event yet) meets the expectation.
    #[must_use]
    pub fn admits(self, current: Version) -> bool {
        match self {
            Self::Any => true,
            Self::Empty => current == Version::ZERO,
            Self::Exact(version) => current == version,
        }
    }
}

impl fmt::Display for ExpectedVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Empty => f.write_str("empty"),
            Self::Exact(version) => version.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_epoch_is_newer_than_any_position_of_an_earlier_one() {
        let old = ConfigVersion::new(Epoch(1), Position(900));
        let new = ConfigVersion::new(Epoch(2), Position(1));
        assert!(new > old);
    }

    #[test]
    fn config_versions_round_trip_as_text() {
        let version = ConfigVersion::new(Epoch(3), Position(42));
        assert_eq!(version.to_string().parse(), Ok(version));
        for bad in ["", "3", "3.", ".4", "3.x", "-1.2"] {
            assert_eq!(bad.parse::<ConfigVersion>(), Err(ParseVersionError), "{bad}");
        }
    }

    #[test]
    fn expectations_hold_only_where_they_say() {
        assert!(ExpectedVersion::Any.admits(Version(7)));
        assert!(ExpectedVersion::Empty.admits(Version::ZERO));
        assert!(!ExpectedVersion::Empty.admits(Version(1)));
        assert!(ExpectedVersion::exactly(Version::ZERO).admits(Version::ZERO));
        assert!(!ExpectedVersion::exactly(Version(2)).admits(Version(3)));
    }
}
