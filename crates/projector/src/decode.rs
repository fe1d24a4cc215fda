//! Stored events to facts, with the place of one that cannot be read.

use weft_eventlog::EventView;
use weft_model::{Fact, Position, StoredEvent, Timestamp};

pub use weft_model::stored::UndecodableEvent;

/// A row of the log that this version of Weft cannot read.
#[derive(Debug, thiserror::Error)]
#[error("weft.event at position {position} cannot be read")]
pub struct Undecodable {
    /// The row.
    pub position: Position,
    /// What is wrong with it.
    #[source]
    pub source: Box<UndecodableEvent>,
}

/// Reads events back; remembers names, so one that is kept reads faster.
#[derive(Debug, Default)]
pub struct Decoder(weft_model::Decoder);

impl Decoder {
    /// Reads an event back.
    ///
    /// # Errors
    /// If this version of Weft does not know its scope, type, schema or payload.
    pub fn decode(&mut self, event: &EventView<'_>) -> Result<Fact, Undecodable> {
        let stored = StoredEvent {
            epoch: event.epoch,
            position: event.position,
            version: event.version,
            at: Timestamp(event.recorded_at.millis()),
            actor: event.actor,
            scope: event.scope,
            event_type: event.event_type,
            schema: event.schema,
            payload: event.payload,
        };
        self.0.decode(&stored).map_err(|source| Undecodable { position: event.position, source })
    }

    /// Reads events back into `facts`, whose former content is dropped and whose memory is used again.
    pub(crate) fn decode_into<'a>(
        &mut self,
        events: impl Iterator<Item = EventView<'a>>,
        facts: &mut Vec<Fact>,
    ) -> Result<(), Undecodable> {
        facts.clear();
        for event in events {
            facts.push(self.decode(&event)?);
        }
        Ok(())
    }
}
