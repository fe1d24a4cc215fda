//! Events in bulk: one buffer for all their texts, and what else there is of each beside it.
//!
//! Whoever walks the whole log (a fold, a verification, the sealing of a range) looks at millions of events once. Pages
//! cost them no allocation per event, whether they come as rows or from a sealed segment.

use std::ops::Range;
use uuid::Uuid;
use weft_model::version::{Epoch, Position, Version};

use crate::event::{RecordedEvent, UnixMicros};
use crate::hash::EventHash;

/// An event, borrowed from the page that it was read in. Fields as in [`RecordedEvent`], but for the hash, which covers
/// them all (see [`hash`](crate::hash)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventView<'a> {
    /// Place in the whole log.
    pub position: Position,
    /// Life of the database in which it was recorded.
    pub epoch: Epoch,
    /// What it is about.
    pub scope: &'a str,
    /// Place in its scope.
    pub version: Version,
    /// What happened.
    pub event_type: &'a str,
    /// Version of the payload's format within its type.
    pub schema: u16,
    /// Who did it.
    pub actor: &'a str,
    /// Why.
    pub reason: Option<&'a str>,
    /// The event that led to this one.
    pub cause: Option<Position>,
    /// The command that recorded it.
    pub command_id: Uuid,
    /// When it was recorded.
    pub recorded_at: UnixMicros,
    /// JSON text.
    pub payload: &'a str,
}

impl EventView<'_> {
    pub(crate) fn record(&self, hash: EventHash) -> RecordedEvent {
        RecordedEvent {
            position: self.position,
            epoch: self.epoch,
            scope: self.scope.to_owned(),
            version: self.version,
            event_type: self.event_type.to_owned(),
            schema: self.schema,
            actor: self.actor.to_owned(),
            reason: self.reason.map(str::to_owned),
            cause: self.cause,
            command_id: self.command_id,
            recorded_at: self.recorded_at,
            payload: self.payload.to_owned(),
            hash,
        }
    }
}

impl RecordedEvent {
    /// The same event, borrowed.
    #[must_use]
    pub fn view(&self) -> EventView<'_> {
        EventView {
            position: self.position,
            epoch: self.epoch,
            scope: &self.scope,
            version: self.version,
            event_type: &self.event_type,
            schema: self.schema,
            actor: &self.actor,
            reason: self.reason.as_deref(),
            cause: self.cause,
            command_id: self.command_id,
            recorded_at: self.recorded_at,
            payload: &self.payload,
        }
    }
}

/// A text in a page's buffer.
pub(crate) type Span = Range<u32>;

/// An event without its texts.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) position: Position,
    pub(crate) epoch: Epoch,
    pub(crate) version: Version,
    pub(crate) schema: u16,
    pub(crate) cause: Option<Position>,
    pub(crate) command_id: Uuid,
    pub(crate) recorded_at: UnixMicros,
    pub(crate) scope: Span,
    pub(crate) event_type: Span,
    pub(crate) actor: Span,
    pub(crate) reason: Option<Span>,
    pub(crate) payload: Span,
}

/// Consecutive events; never none.
#[derive(Debug)]
pub struct Page {
    text: String,
    entries: Vec<Entry>,
}

impl Page {
    /// Every span of `entries` must be one of `text`, between two characters.
    pub(crate) const fn new(text: String, entries: Vec<Entry>) -> Self {
        Self { text, entries }
    }

    /// The events, in order.
    pub fn events(&self) -> impl ExactSizeIterator<Item = EventView<'_>> + DoubleEndedIterator {
        self.entries.iter().map(|entry| self.view(entry))
    }

    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none, which a page of the log never is.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Position of the last event; zero if there is none.
    #[must_use]
    pub fn last(&self) -> Position {
        self.entries.last().map(|entry| entry.position).unwrap_or_default()
    }

    /// Drops the events outside of `after < position <= to`.
    pub(crate) fn clip(&mut self, after: Position, to: Position) {
        self.entries.retain(|entry| after < entry.position && entry.position <= to);
    }

    fn view<'a>(&'a self, entry: &Entry) -> EventView<'a> {
        EventView {
            position: entry.position,
            epoch: entry.epoch,
            scope: self.text(&entry.scope),
            version: entry.version,
            event_type: self.text(&entry.event_type),
            schema: entry.schema,
            actor: self.text(&entry.actor),
            reason: entry.reason.as_ref().map(|reason| self.text(reason)),
            cause: entry.cause,
            command_id: entry.command_id,
            recorded_at: entry.recorded_at,
            payload: self.text(&entry.payload),
        }
    }

    /// Spans were checked when the page was made.
    fn text(&self, span: &Span) -> &str {
        self.text.get(span.start as usize..span.end as usize).unwrap_or_default()
    }
}
