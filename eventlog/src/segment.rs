//! Sealed history: some thousand events as one compressed row.
//!
//! A segment holds what its events' hashes cover, in columns, so that what repeats (scopes, types, actors, times) is
//! stored once. It holds no hashes but the one before its first event and the one at its last: those between follow. Nor
//! does it hold fingerprints, which nobody asks for after [`OUTCOME_KEPT`](crate::OUTCOME_KEPT).
//!
//! A segment is taken only if its body hashes as the row says, every column has the length that it must have, and the
//! events chain from the hash before it to the hash at its end, when that is asked for.

mod wire;

use bytes::Bytes;
use prost::Message;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use uuid::Uuid;
use weft_model::version::{Epoch, Position, Version};

use crate::event::UnixMicros;
use crate::hash::EventHash;
use crate::page::{Entry, EventView, Page, Span};
use wire::Columns;

/// Events in a segment: enough for columns to compress, and few enough to be decompressed for one of them.
pub(crate) const SEGMENT_EVENTS: usize = 4_096;
/// Bytes of texts at which a segment is closed early, plus one event; what a reader holds of one.
pub(crate) const SEGMENT_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Bytes that a body may have once decompressed: texts, plus ids and numbers of each event.
const RAW_BYTES_MAX: usize = 2 * SEGMENT_BYTES_MAX;
/// Sealed once, read for ever.
const COMPRESSION: i32 = 12;

/// A row of `weft.log_segment`.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) first: Position,
    pub(crate) last: Position,
    pub(crate) previous_hash: EventHash,
    pub(crate) last_hash: EventHash,
    /// When its first and its last event were recorded.
    pub(crate) recorded_at: (UnixMicros, UnixMicros),
    pub(crate) raw_bytes: usize,
    pub(crate) body_hash: EventHash,
    pub(crate) body: Bytes,
}

/// A segment is not what was sealed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// Its body has another hash than the row says.
    #[error("its body hashes to {computed}, but {recorded} was recorded")]
    Body {
        /// The hash in the row.
        recorded: EventHash,
        /// The hash of the body.
        computed: EventHash,
    },
    /// It cannot be decompressed to what the row says.
    #[error("its body cannot be decompressed")]
    Compression,
    /// Its columns do not make up the events that the row names.
    #[error("its {0} are not those of its events")]
    Columns(&'static str),
}

impl Segment {
    /// Seals events that follow one that hashes to `previous_hash` and end with `last_hash`.
    pub(crate) fn seal<'a>(
        events: impl ExactSizeIterator<Item = EventView<'a>>,
        previous_hash: EventHash,
        last_hash: EventHash,
    ) -> std::io::Result<Self> {
        let columns = Columns::of(events);
        let began = columns.first_recorded_at;
        // None is earlier than the one before it.
        let took = columns.recorded_at.iter().fold(0_i64, |took, later| took.saturating_add_unsigned(*later));
        let recorded_at = (UnixMicros(began), UnixMicros(began.saturating_add(took)));
        let raw = columns.encode_to_vec();
        let body = Bytes::from(zstd::bulk::compress(&raw, COMPRESSION)?);
        let first = Position(columns.first_position);
        let last = Position(columns.first_position + u64::from(columns.events) - 1);
        let body_hash = hash_of(&body);
        Ok(Self { first, last, previous_hash, last_hash, recorded_at, raw_bytes: raw.len(), body_hash, body })
    }

    /// Its events.
    pub(crate) fn open(&self) -> Result<Page, SegmentError> {
        let computed = hash_of(&self.body);
        if computed != self.body_hash {
            return Err(SegmentError::Body { recorded: self.body_hash, computed });
        }
        if self.raw_bytes > RAW_BYTES_MAX {
            return Err(SegmentError::Compression);
        }
        let raw = zstd::bulk::decompress(&self.body, self.raw_bytes);
        let raw = raw.ok().filter(|raw| raw.len() == self.raw_bytes).ok_or(SegmentError::Compression)?;
        let columns = Columns::decode(raw.as_slice()).map_err(|_| SegmentError::Columns("columns"))?;
        let page = page(columns)?;
        let first = page.events().next().map(|event| event.position);
        if (first, page.last()) != (Some(self.first), self.last) {
            return Err(SegmentError::Columns("positions"));
        }
        let time = |event: Option<EventView<'_>>| event.map(|event| event.recorded_at);
        let (began, ended) = (time(page.events().next()), time(page.events().next_back()));
        if (began, ended) != (Some(self.recorded_at.0), Some(self.recorded_at.1)) {
            return Err(SegmentError::Columns("times"));
        }
        Ok(page)
    }
}

fn hash_of(body: &[u8]) -> EventHash {
    EventHash(Sha256::digest(body).into())
}

impl Columns {
    fn of<'a>(events: impl ExactSizeIterator<Item = EventView<'a>>) -> Self {
        let mut columns = Self::default();
        let mut scopes = Dictionary::default();
        let mut types = Dictionary::default();
        let mut actors = Dictionary::default();
        let mut reasons = Dictionary::default();
        let mut ids: Vec<Uuid> = Vec::new();
        let mut time = 0;
        for event in events {
            if columns.events == 0 {
                columns.first_position = event.position.0;
                columns.first_recorded_at = event.recorded_at.0;
                time = event.recorded_at.0;
            }
            columns.events += 1;
            if columns.epochs.last() != Some(&event.epoch.0) {
                columns.epochs.push(event.epoch.0);
                columns.epoch_events.push(0);
            }
            count_one(&mut columns.epoch_events);
            let scope = scopes.index(event.scope, &mut columns.scopes);
            if scope as usize == columns.scope_versions.len() {
                columns.scope_versions.push(event.version.0);
            }
            columns.scope.push(scope);
            let known = columns.types.len();
            // The schema belongs to the type; a type of two schemas is two entries.
            let kind = format!("{}\n{}", event.event_type, event.schema);
            let kind = types.index(&kind, &mut columns.types);
            if columns.types.len() > known {
                columns.schemas.push(u32::from(event.schema));
            }
            columns.r#type.push(kind);
            columns.actor.push(actors.index(event.actor, &mut columns.actors));
            columns
                .reason
                .push(event.reason.map_or(0, |reason| 1 + reasons.index(reason, &mut columns.reasons)));
            columns.cause.push(event.cause.map_or(0, |cause| event.position.0 - cause.0));
            if ids.last() != Some(&event.command_id) {
                ids.push(event.command_id);
                columns.command_events.push(0);
            }
            count_one(&mut columns.command_events);
            // Time never decreases along positions.
            columns.recorded_at.push((event.recorded_at.0 - time).unsigned_abs());
            time = event.recorded_at.0;
            columns.payload_bytes.push(u32::try_from(event.payload.len()).unwrap_or(u32::MAX));
            columns.payloads.push_str(event.payload);
        }
        for kind in &mut columns.types {
            kind.truncate(kind.rfind('\n').unwrap_or(kind.len()));
        }
        // By byte and not by id: ids begin with the time, so their first bytes hardly differ.
        columns.command_ids =
            (0..16).flat_map(|byte| ids.iter().map(move |id| id.as_bytes()[byte])).collect();
        columns
    }
}

fn count_one(runs: &mut [u32]) {
    if let Some(run) = runs.last_mut() {
        *run += 1;
    }
}

/// Numbers texts in the order in which they first come.
#[derive(Default)]
struct Dictionary(BTreeMap<String, u32>);

impl Dictionary {
    fn index(&mut self, text: &str, entries: &mut Vec<String>) -> u32 {
        if let Some(index) = self.0.get(text) {
            return *index;
        }
        let index = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        entries.push(text.to_owned());
        self.0.insert(text.to_owned(), index);
        index
    }
}

/// The events of decoded columns, each checked to be whole.
fn page(columns: Columns) -> Result<Page, SegmentError> {
    let wrong = SegmentError::Columns;
    let events = columns.events as usize;
    if events == 0 || events > SEGMENT_EVENTS {
        return Err(wrong("events"));
    }
    let mut text = columns.payloads;
    let payload_bytes = text.len();
    let scopes = append(&mut text, &columns.scopes);
    let types = append(&mut text, &columns.types);
    let actors = append(&mut text, &columns.actors);
    let reasons = append(&mut text, &columns.reasons);
    let mut versions = columns.scope_versions;
    if versions.len() != scopes.len() || columns.schemas.len() != types.len() {
        return Err(wrong("dictionaries"));
    }
    let lengths = [
        columns.scope.len(),
        columns.r#type.len(),
        columns.actor.len(),
        columns.reason.len(),
        columns.cause.len(),
        columns.recorded_at.len(),
        columns.payload_bytes.len(),
    ];
    if lengths.iter().any(|length| *length != events) {
        return Err(wrong("columns"));
    }
    let mut epochs = Runs::new(&columns.epoch_events, columns.epochs.len())?;
    let commands = columns.command_ids.len() / 16;
    let mut ids = Runs::new(&columns.command_events, commands)?;

    let mut entries = Vec::with_capacity(events);
    let (mut time, mut payload) = (columns.first_recorded_at, 0_u32);
    for i in 0..events {
        let position = columns.first_position.checked_add(i as u64).ok_or(wrong("positions"))?;
        let scope = columns.scope[i] as usize;
        let version = versions.get_mut(scope).ok_or(wrong("scopes"))?;
        let kind = columns.r#type[i] as usize;
        let delta = i64::try_from(columns.recorded_at[i]).map_err(|_| wrong("times"))?;
        time = time.checked_add(delta).ok_or(wrong("times"))?;
        let end = payload.checked_add(columns.payload_bytes[i]).ok_or(wrong("payloads"))?;
        if end as usize > payload_bytes || !text.is_char_boundary(end as usize) {
            return Err(wrong("payloads"));
        }
        let cause = match columns.cause[i] {
            0 => None,
            back => Some(Position(position.checked_sub(back).ok_or(wrong("causes"))?)),
        };
        let reason = match columns.reason[i] {
            0 => None,
            one_more => Some(reasons.get(one_more as usize - 1).ok_or(wrong("reasons"))?.clone()),
        };
        let command = ids.next()?;
        let id = std::array::from_fn(|byte| columns.command_ids[byte * commands + command]);
        entries.push(Entry {
            position: Position(position),
            epoch: Epoch(columns.epochs[epochs.next()?]),
            version: Version(*version),
            schema: columns
                .schemas
                .get(kind)
                .and_then(|schema| u16::try_from(*schema).ok())
                .ok_or(wrong("types"))?,
            cause,
            command_id: Uuid::from_bytes(id),
            recorded_at: UnixMicros(time),
            scope: scopes[scope].clone(),
            event_type: types[kind].clone(),
            actor: actors.get(columns.actor[i] as usize).ok_or(wrong("actors"))?.clone(),
            reason,
            payload: payload..end,
        });
        *version = version.checked_add(1).ok_or(wrong("versions"))?;
        payload = end;
    }
    if payload as usize != payload_bytes {
        return Err(wrong("payloads"));
    }
    Ok(Page::new(text, entries))
}

/// Texts are bounded by [`RAW_BYTES_MAX`], far below 4 GiB.
fn append(text: &mut String, entries: &[String]) -> Vec<Span> {
    let end = |text: &String| u32::try_from(text.len()).unwrap_or(u32::MAX);
    let spans = entries.iter().map(|entry| {
        let start = end(text);
        text.push_str(entry);
        start..end(text)
    });
    spans.collect()
}

/// Walks runs: which one the next event belongs to.
struct Runs<'a> {
    lengths: &'a [u32],
    run: usize,
    left: u32,
}

impl<'a> Runs<'a> {
    fn new(lengths: &'a [u32], values: usize) -> Result<Self, SegmentError> {
        if lengths.len() != values || values == 0 || lengths.contains(&0) {
            return Err(SegmentError::Columns("runs"));
        }
        Ok(Self { lengths, run: 0, left: lengths[0] })
    }

    fn next(&mut self) -> Result<usize, SegmentError> {
        if self.left == 0 {
            self.run += 1;
            self.left = *self.lengths.get(self.run).ok_or(SegmentError::Columns("runs"))?;
        }
        self.left -= 1;
        Ok(self.run)
    }
}

#[cfg(test)]
mod tests;
