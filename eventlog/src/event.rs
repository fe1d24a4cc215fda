//! An event before and after it is recorded.

use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uuid::Uuid;
use weft_model::version::{Epoch, Position, Version};

use crate::hash::EventHash;

/// An event that a caller wants to append. The log gives it its position, version, time and hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewEvent {
    /// What happened, in the past tense; 1 to [`TYPE_BYTES_MAX`](crate::TYPE_BYTES_MAX) bytes.
    pub event_type: String,
    /// Version of the payload's format within its type; 1 to [`SCHEMA_MAX`](crate::SCHEMA_MAX).
    pub schema: u16,
    /// JSON text, kept byte for byte; at most [`PAYLOAD_BYTES_MAX`](crate::PAYLOAD_BYTES_MAX) bytes.
    pub payload: String,
}

/// An event in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedEvent {
    /// Gapless place in the whole log, in commit order; the first is 1.
    pub position: Position,
    /// Life of the database in which it was recorded.
    pub epoch: Epoch,
    /// The consistency boundary that it belongs to.
    pub scope: String,
    /// Gapless place in its scope; the first is 1.
    pub version: Version,
    /// What happened.
    pub event_type: String,
    /// Version of the payload's format within its type.
    pub schema: u16,
    /// Who did it.
    pub actor: String,
    /// Why, in the words of whoever did it.
    pub reason: Option<String>,
    /// The event that led to this one.
    pub cause: Option<Position>,
    /// The command that recorded it.
    pub command_id: Uuid,
    /// Database time under the log's lock; never decreases along positions.
    pub recorded_at: UnixMicros,
    /// JSON text, byte for byte as it was appended.
    pub payload: String,
    /// Chains this event to the one before it, see [`hash`](crate::hash).
    pub hash: EventHash,
}

/// A point in time by the database's clock, in microseconds since the Unix epoch (UTC).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMicros(pub i64);

impl UnixMicros {
    /// The same point in whole milliseconds, rounded down.
    #[must_use]
    pub const fn millis(self) -> i64 {
        self.0.div_euclid(1_000)
    }

    /// The last point within a millisecond: what happened up to a time that is told in milliseconds.
    #[must_use]
    pub const fn end_of_millis(millis: i64) -> Self {
        Self(millis.saturating_mul(1_000).saturating_add(999))
    }

    pub(crate) fn from_database(time: SystemTime) -> Self {
        let micros = |d: Duration| i64::try_from(d.as_micros()).unwrap_or(i64::MAX);
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Self(micros(after)),
            Err(before) => Self(-micros(before.duration())),
        }
    }

    pub(crate) fn to_database(self) -> SystemTime {
        let distance = Duration::from_micros(self.0.unsigned_abs());
        if self.0 < 0 { UNIX_EPOCH - distance } else { UNIX_EPOCH + distance }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_the_trip_to_the_database() {
        for micros in [0, 1, -1, 1_753_000_000_123_456, -62_000_000_000_000_001] {
            assert_eq!(UnixMicros::from_database(UnixMicros(micros).to_database()), UnixMicros(micros));
        }
        assert_eq!(UnixMicros(1_999).millis(), 1);
        assert_eq!(UnixMicros(-1).millis(), -1);
        for millis in [0, 1, -1, 1_753_000_000_123] {
            let end = UnixMicros::end_of_millis(millis);
            assert_eq!((end.millis(), UnixMicros(end.0 + 1).millis()), (millis, millis + 1));
        }
    }
}
