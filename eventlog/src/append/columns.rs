//! The rows of a batch, one array per column, encoded as they are decided.
//!
//! A batch is sent as a few arrays that the server unnests: one statement, one plan, whatever its size. The arrays are
//! written in PostgreSQL's binary format as the decision goes along, so that what is sent borrows nothing from the
//! requests and nothing is copied twice.

use bytes::{BufMut, BytesMut};
use sha2::{Digest, Sha256};
use std::error::Error;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use weft_model::version::{Epoch, Position};

use crate::epoch::LogTail;
use crate::event::UnixMicros;
use crate::hash::{Encoder, EventHash};
use crate::page::EventView;

/// Bytes that a batch remembers of each event.
pub(crate) const MARK_BYTES: usize = 8;
/// Begins what a batch's commands are hashed from.
pub(crate) const COMMANDS_FORMAT: &[u8] = b"weft-commands/1\n";

/// One column: a one-dimensional array.
#[derive(Debug)]
pub(super) struct Column {
    elements: BytesMut,
    count: i32,
    nulls: bool,
}

impl Column {
    fn new() -> Self {
        Self { elements: BytesMut::new(), count: 0, nulls: false }
    }

    /// Requests are bounded far below 2 GiB and two thousand million events.
    fn push(&mut self, value: &[u8]) {
        self.elements.put_i32(i32::try_from(value.len()).unwrap_or(i32::MAX));
        self.elements.put_slice(value);
        self.count += 1;
    }

    fn push_null(&mut self) {
        self.elements.put_i32(-1);
        self.count += 1;
        self.nulls = true;
    }

    fn push_optional(&mut self, value: Option<&[u8]>) {
        match value {
            Some(value) => self.push(value),
            None => self.push_null(),
        }
    }
}

impl ToSql for Column {
    fn to_sql(&self, array: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        let tokio_postgres::types::Kind::Array(element) = array.kind() else {
            return Err("a column is sent as an array".into());
        };
        out.put_i32(1);
        out.put_i32(i32::from(self.nulls));
        out.put_u32(element.oid());
        out.put_i32(self.count);
        out.put_i32(1);
        out.put_slice(&self.elements);
        Ok(IsNull::No)
    }

    fn accepts(array: &Type) -> bool {
        matches!(array.kind(), tokio_postgres::types::Kind::Array(_))
    }

    to_sql_checked!();
}

/// The fingerprint of a command and the number of its events: what stands beside its first event.
pub(crate) type Begun<'a> = (&'a [u8; 32], u32);

/// What a batch adds to `weft.event` and `weft.log_batch`.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) epoch: i64,
    pub(super) recorded_at: UnixMicros,
    /// Position of the first event; zero while there is none.
    pub(super) first: Position,
    pub(super) position: Column,
    pub(super) version: Column,
    pub(super) cause: Column,
    pub(super) command_id: Column,
    pub(super) fingerprint: Column,
    pub(super) command_events: Column,
    pub(super) schema: Column,
    pub(super) hash: Column,
    pub(super) scope: Column,
    pub(super) event_type: Column,
    pub(super) actor: Column,
    pub(super) reason: Column,
    pub(super) payload: Column,
    pub(super) marks: Vec<u8>,
    commands: Encoder,
}

impl Rows {
    pub(super) fn new(epoch: Epoch, recorded_at: UnixMicros) -> Self {
        Self {
            epoch: epoch.0.cast_signed(),
            recorded_at,
            first: Position::ZERO,
            position: Column::new(),
            version: Column::new(),
            cause: Column::new(),
            command_id: Column::new(),
            fingerprint: Column::new(),
            command_events: Column::new(),
            schema: Column::new(),
            hash: Column::new(),
            scope: Column::new(),
            event_type: Column::new(),
            actor: Column::new(),
            reason: Column::new(),
            payload: Column::new(),
            marks: Vec::new(),
            commands: Encoder::new(COMMANDS_FORMAT),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first == Position::ZERO
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.marks.len() / MARK_BYTES
    }

    /// Adds the event that follows `tail`, and returns the tail after it. `command` is the fingerprint and the number of
    /// events of the command that begins with it.
    pub(super) fn push(
        &mut self,
        event: &EventView<'_>,
        tail: LogTail,
        command: Option<Begun<'_>>,
    ) -> LogTail {
        let hash = event.chain(tail.hash);
        if self.is_empty() {
            self.first = event.position;
        }
        self.position.push(&event.position.0.to_be_bytes());
        self.version.push(&event.version.0.to_be_bytes());
        self.cause.push_optional(event.cause.map(|cause| cause.0.to_be_bytes()).as_ref().map(|b| &b[..]));
        self.command_id.push(event.command_id.as_bytes());
        self.fingerprint.push_optional(command.map(|(fingerprint, _)| &fingerprint[..]));
        self.command_events
            .push_optional(command.map(|(_, events)| events.to_be_bytes()).as_ref().map(|b| &b[..]));
        self.schema.push(&event.schema.to_be_bytes());
        self.hash.push(&hash.0);
        self.scope.push(event.scope.as_bytes());
        self.event_type.push(event.event_type.as_bytes());
        self.actor.push(event.actor.as_bytes());
        self.reason.push_optional(event.reason.map(str::as_bytes));
        self.payload.push(event.payload.as_bytes());
        self.marks.extend_from_slice(&mark(&hash, command));
        if let Some((fingerprint, events)) = command {
            encode_command(
                &mut self.commands,
                event.command_id.as_bytes(),
                event.position,
                events,
                fingerprint,
            );
        }
        LogTail { position: event.position, hash, recorded_at: self.recorded_at }
    }

    /// Hash over the commands that were added.
    pub(super) fn commands_hash(&self) -> EventHash {
        EventHash(self.commands.clone().finish())
    }
}

/// How the marks of batches are made now; an earlier form is [`earlier_mark`].
pub(crate) const MARKS_FORMAT: i16 = 2;

/// What a batch remembers of an event: enough to tell which one was changed. That none was is what the whole hashes beside
/// it show.
pub(crate) fn mark(hash: &EventHash, command: Option<Begun<'_>>) -> [u8; MARK_BYTES] {
    let mut mark = word(&hash.0);
    if let Some((fingerprint, events)) = command {
        // Hashed, so that nobody finds another fingerprint that leaves the mark as it is.
        let hashed: [u8; 32] =
            Sha256::new().chain_update(fingerprint).chain_update(events.to_be_bytes()).finalize().into();
        mark ^= word(&hashed);
    }
    mark.to_be_bytes()
}

/// What batches of format 1 remember. Quarters of a fingerprint may change places without a change to it; then only the hash
/// over the batch's commands shows it.
pub(crate) fn earlier_mark(hash: &EventHash, command: Option<Begun<'_>>) -> [u8; MARK_BYTES] {
    let mut mark = word(&hash.0);
    if let Some((fingerprint, events)) = command {
        let quarters = fingerprint.chunks_exact(MARK_BYTES).map(word);
        mark ^= quarters.fold(u64::from(events), |all, quarter| all ^ quarter);
    }
    mark.to_be_bytes()
}

/// The first eight bytes.
fn word(bytes: &[u8]) -> u64 {
    bytes.iter().take(MARK_BYTES).fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// One command's part of what `weft.log_batch.commands_hash` is computed from.
pub(crate) fn encode_command(
    encoder: &mut Encoder,
    command_id: &[u8; 16],
    first: Position,
    events: u32,
    fingerprint: &[u8; 32],
) {
    encoder.bytes(command_id);
    encoder.number(first.0);
    encoder.bytes(&events.to_be_bytes());
    encoder.bytes(fingerprint);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_is_encoded_as_the_library_would() {
        let mut column = Column::new();
        column.push(b"a");
        column.push_null();
        column.push("ü".as_bytes());
        let (mut ours, mut theirs) = (BytesMut::new(), BytesMut::new());
        column.to_sql(&Type::TEXT_ARRAY, &mut ours).unwrap();
        [Some("a"), None, Some("ü")].as_slice().to_sql(&Type::TEXT_ARRAY, &mut theirs).unwrap();
        assert_eq!(ours, theirs);
        assert!(!Column::accepts(&Type::TEXT));
    }

    /// The expected value was computed from what the column's comment says by another program.
    #[test]
    fn a_mark_is_the_documented_one_and_depends_on_where_each_byte_is() {
        let hash = EventHash([0x11; 32]);
        let print: [u8; 32] = std::array::from_fn(|at| u8::try_from(at).unwrap());
        assert_eq!(mark(&hash, None), [0x11; 8]);
        assert_eq!(mark(&hash, Some((&print, 3))), [0x73, 0x6f, 0x8c, 0xa9, 0xbc, 0x56, 0xae, 0xf6]);
        let mut swapped = print;
        swapped.rotate_left(8);
        assert_ne!(mark(&hash, Some((&swapped, 3))), mark(&hash, Some((&print, 3))));
    }
}
