//! Stored events to facts. An event that does not decode ends the fold: leaving one out would be a wrong fold.

use weft_eventlog::RecordedEvent;
use weft_model::event::DecodeError;
use weft_model::scope::ScopeError;
use weft_model::{Event, Fact, Position, Scope, Timestamp};

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

/// What is wrong with a stored event.
#[derive(Debug, thiserror::Error)]
pub enum UndecodableEvent {
    /// Its scope is not one of the mesh.
    #[error("scope {text:?} is not known")]
    Scope {
        /// The stored scope.
        text: String,
        /// Why it is none.
        #[source]
        source: ScopeError,
    },
    /// Its type, schema or payload is not known.
    #[error("event {event_type} (schema {schema}) of {scope} is not known")]
    Event {
        /// Its scope.
        scope: Scope,
        /// The stored type.
        event_type: String,
        /// The stored schema version.
        schema: u16,
        /// Why it does not decode.
        #[source]
        source: DecodeError,
    },
}

/// Reads an event back.
///
/// # Errors
/// If this version of Weft does not know its scope, type, schema or payload.
pub fn decode(event: &RecordedEvent) -> Result<Fact, Undecodable> {
    let undecodable = |source| Undecodable { position: event.position, source: Box::new(source) };
    let scope: Scope = event.scope.parse().map_err(|source| {
        undecodable(UndecodableEvent::Scope { text: event.scope.chars().take(200).collect(), source })
    })?;
    let meaning =
        Event::decode(&scope, &event.event_type, event.schema, &event.payload).map_err(|source| {
            let (scope, event_type) = (scope.clone(), event.event_type.clone());
            undecodable(UndecodableEvent::Event { scope, event_type, schema: event.schema, source })
        })?;
    Ok(Fact {
        epoch: event.epoch,
        position: event.position,
        version: event.version,
        at: Timestamp(event.recorded_at.millis()),
        actor: event.actor.clone(),
        scope,
        event: meaning,
    })
}
