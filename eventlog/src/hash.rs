//! The chain of hashes that makes tampering show.
//!
//! Each event's hash is SHA-256 over the following bytes, in this order. Integers are big-endian; *text* is its
//! length in bytes as a 32-bit integer, then its UTF-8; an *optional* is one byte, 0 for absent or 1 followed by the
//! value. Every field has a fixed or a stated length, so no two different events share an encoding.
//!
//! | field | encoding |
//! |---|---|
//! | format | the 13 bytes `weft-event/1\n` |
//! | previous hash | 32 bytes; all zero for the first event |
//! | epoch | 64-bit |
//! | position | 64-bit |
//! | scope | text |
//! | version | 64-bit |
//! | type | text |
//! | schema | 16-bit |
//! | actor | text |
//! | reason | optional text |
//! | cause | optional 64-bit |
//! | command id | 16 bytes |
//! | recorded at | 64-bit signed, microseconds since the Unix epoch |
//! | payload | text |
//!
//! The format is for ever: another layout would be another format line, chosen by epoch.

use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;

use crate::event::RecordedEvent;
use crate::page::EventView;

const FORMAT: &[u8] = b"weft-event/1\n";

/// SHA-256 over an event and the hash before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventHash(pub [u8; 32]);

impl EventHash {
    /// What the first event names as the hash before it.
    pub const GENESIS: Self = Self([0; 32]);
}

impl fmt::Display for EventHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for EventHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EventHash({self})")
    }
}

impl FromStr for EventHash {
    type Err = ParseHashError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let digits = s.as_bytes();
        if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(ParseHashError);
        }
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| ParseHashError)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| ParseHashError)?;
        }
        Ok(Self(hash))
    }
}

/// A text is not an event hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event hash is written as 64 hexadecimal digits")]
pub struct ParseHashError;

impl EventView<'_> {
    /// The hash of this event after an event that hashes to `previous`.
    pub(crate) fn chain(&self, previous: EventHash) -> EventHash {
        let mut encoder = Encoder::new(FORMAT);
        encoder.bytes(&previous.0);
        encoder.number(self.epoch.0);
        encoder.number(self.position.0);
        encoder.text(self.scope);
        encoder.number(self.version.0);
        encoder.text(self.event_type);
        encoder.bytes(&self.schema.to_be_bytes());
        encoder.text(self.actor);
        encoder.optional(self.reason, Encoder::text);
        encoder.optional(self.cause, |encoder, cause| encoder.number(cause.0));
        encoder.bytes(self.command_id.as_bytes());
        encoder.bytes(&self.recorded_at.0.to_be_bytes());
        encoder.text(self.payload);
        EventHash(encoder.finish())
    }
}

impl RecordedEvent {
    /// What this event's hash must be if the event before it hashes to `previous`.
    #[must_use]
    pub fn expected_hash(&self, previous: EventHash) -> EventHash {
        self.view().chain(previous)
    }
}

/// Feeds SHA-256 with the unambiguous encoding described in the module documentation.
#[derive(Clone, Debug)]
pub(crate) struct Encoder(Sha256);

impl Encoder {
    /// Starts an encoding that can not be taken for one of another `format`.
    pub(crate) fn new(format: &[u8]) -> Self {
        let mut encoder = Self(Sha256::new());
        encoder.bytes(format);
        encoder
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn number(&mut self, number: u64) {
        self.bytes(&number.to_be_bytes());
    }

    /// Texts are bounded far below 4 GiB before they get here.
    pub(crate) fn text(&mut self, text: &str) {
        self.bytes(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
        self.bytes(text.as_bytes());
    }

    pub(crate) fn optional<T>(&mut self, value: Option<T>, encode: impl FnOnce(&mut Self, T)) {
        match value {
            None => self.bytes(&[0]),
            Some(value) => {
                self.bytes(&[1]);
                encode(self, value);
            }
        }
    }

    pub(crate) fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use weft_model::version::{Epoch, Position, Version};

    use super::*;
    use crate::event::UnixMicros;

    fn sample() -> EventView<'static> {
        EventView {
            epoch: Epoch(2),
            position: Position(42),
            scope: "service/default/db",
            version: Version(7),
            event_type: "ServiceDeclared",
            schema: 1,
            actor: "spiffe://mesh.local/operator/ada",
            reason: Some("größer"),
            cause: Some(Position(41)),
            command_id: Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001),
            recorded_at: UnixMicros(1_753_000_000_123_456),
            payload: "{ \"port\":5432 }",
        }
    }

    /// The expected values were computed from the table above by another program.
    #[test]
    fn the_layout_is_the_documented_one() {
        let mut event = sample();
        let first = event.chain(EventHash::GENESIS);
        assert_eq!(first.to_string(), "1c7b638d5b6171ee855a17c247feb08e6873335a554931bcd2abec23f39c80a3");
        event.reason = None;
        event.cause = None;
        assert_eq!(
            event.chain(first).to_string(),
            "a6668c222d85f51016e2f41fd2dc8d77c21a848353a7a2a86587d44f4eca01fe"
        );
    }

    #[test]
    fn moving_bytes_between_fields_changes_the_hash() {
        let mut moved = sample();
        moved.scope = "service/default/dbS";
        moved.event_type = "erviceDeclared";
        assert_ne!(moved.chain(EventHash::GENESIS), sample().chain(EventHash::GENESIS));
        let mut absent = sample();
        absent.reason = None;
        let mut empty = sample();
        empty.reason = Some("");
        assert_ne!(absent.chain(EventHash::GENESIS), empty.chain(EventHash::GENESIS));
    }

    #[test]
    fn hashes_round_trip_as_text() {
        let hash = sample().chain(EventHash::GENESIS);
        assert_eq!(hash.to_string().parse(), Ok(hash));
        for bad in ["", "00", &"g".repeat(64), &"+0".repeat(32), &"é".repeat(32)] {
            assert_eq!(bad.parse::<EventHash>(), Err(ParseHashError), "{bad}");
        }
    }
}
