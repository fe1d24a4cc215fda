//! Stored events to facts. An event that does not decode ends a fold: leaving one out would be a wrong fold.
//!
//! A [`Decoder`] remembers the instances that events named, because most events name one of few: the next event of the
//! same one shares its names, which saves reading them again and makes comparing them cheap. What it returns does not depend
//! on what it remembers.
//!
//! Called by the projector, which knows where events are stored.

use crate::event::{DecodeError, Event, Fact};
use crate::id::{IdError, InstanceId, ServiceName};
use crate::scope::{Scope, ScopeError};
use crate::time::Timestamp;
use crate::version::{Epoch, Position, Version};
use foldhash::fast::FixedState;

/// Instances and services that are remembered. More than most meshes have; in a larger one all are forgotten when so many
/// are known, which costs a second reading of each. At some 200 bytes each, a few dozen megabytes.
const REMEMBERED_MAX: usize = 1 << 17;

/// Longest scope that an error quotes, in characters.
const QUOTED_MAX: usize = 200;

/// An event as it is stored, borrowed from wherever it was read to.
#[derive(Clone, Copy, Debug)]
pub struct StoredEvent<'a> {
    /// The life of the log that it belongs to.
    pub epoch: Epoch,
    /// Where in the whole log.
    pub position: Position,
    /// Where in its scope.
    pub version: Version,
    /// When it was recorded.
    pub at: Timestamp,
    /// Who caused it.
    pub actor: &'a str,
    /// The scope's text.
    pub scope: &'a str,
    /// The name of its type.
    pub event_type: &'a str,
    /// The version of its payload's shape.
    pub schema: u16,
    /// Its payload, JSON.
    pub payload: &'a str,
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

#[expect(clippy::disallowed_types, reason = "only ever looked up; its order reaches nothing")]
type Remembered<T> = std::collections::HashMap<Box<str>, T, FixedState>;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Decoder {
    instances: Remembered<InstanceId>,
    services: Remembered<ServiceName>,
}

impl Decoder {
    /// Reads an event back.
    ///
    /// # Errors
    /// If this version of Weft does not know its scope, type, schema or payload.
    pub fn decode(&mut self, stored: &StoredEvent<'_>) -> Result<Fact, Box<UndecodableEvent>> {
        let scope = self.scope(stored.scope).map_err(|source| {
            let text = stored.scope.chars().take(QUOTED_MAX).collect();
            UndecodableEvent::Scope { text, source }
        })?;
        let event = Event::decode(&scope, stored.event_type, stored.schema, stored.payload);
        let event = event.map_err(|source| UndecodableEvent::Event {
            scope: scope.clone(),
            event_type: stored.event_type.to_owned(),
            schema: stored.schema,
            source,
        })?;
        Ok(Fact {
            epoch: stored.epoch,
            position: stored.position,
            version: stored.version,
            at: stored.at,
            actor: stored.actor.to_owned(),
            scope,
            event,
        })
    }

    fn scope(&mut self, text: &str) -> Result<Scope, ScopeError> {
        if let Some(instance) = text.strip_prefix("health/") {
            return Ok(Scope::Health(self.instance(instance)?));
        }
        if let Some(instance) = text.strip_prefix("membership/") {
            return Ok(Scope::Membership(self.instance(instance)?));
        }
        if let Some(instance) = text.strip_prefix("identity/") {
            return Ok(Scope::Identity(self.instance(instance)?));
        }
        text.parse()
    }

    fn instance(&mut self, text: &str) -> Result<InstanceId, IdError> {
        if let Some(known) = self.instances.get(text) {
            return Ok(known.clone());
        }
        let InstanceId { service, instance } = text.parse()?;
        let id = InstanceId { service: self.service(service), instance };
        make_room(&mut self.instances);
        self.instances.insert(text.into(), id.clone());
        Ok(id)
    }

    /// The same name, as the other instances of the service have it.
    fn service(&mut self, service: ServiceName) -> ServiceName {
        let text = service.to_string();
        if let Some(known) = self.services.get(text.as_str()) {
            return known.clone();
        }
        make_room(&mut self.services);
        self.services.insert(text.into(), service.clone());
        service
    }
}

fn make_room<T>(remembered: &mut Remembered<T>) {
    if remembered.len() >= REMEMBERED_MAX {
        remembered.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored<'a>(scope: &'a str, event_type: &'a str, payload: &'a str) -> StoredEvent<'a> {
        StoredEvent {
            epoch: Epoch(1),
            position: Position(7),
            version: Version(1),
            at: Timestamp(5),
            actor: "someone",
            scope,
            event_type,
            schema: 1,
            payload,
        }
    }

    #[test]
    fn what_is_remembered_changes_nothing() {
        let mut decoder = Decoder::default();
        let report = |scope| stored(scope, "HealthReported", r#"{"health":"healthy","revision":1}"#);
        for scope in ["health/a/api/x", "health/a/api/y", "health/a/api/x", "health/b/api/x"] {
            let fact = decoder.decode(&report(scope)).unwrap();
            assert_eq!(fact, Decoder::default().decode(&report(scope)).unwrap());
            assert_eq!(fact.scope.to_string(), scope);
        }
        let leaving = stored("membership/a/api/x", "InstanceDeregistered", "{}");
        assert_eq!(decoder.decode(&leaving).unwrap().scope.to_string(), "membership/a/api/x");
        assert!(decoder.decode(&stored("mesh/a/api/x", "InstanceDeregistered", "{}")).is_err());
    }

    #[test]
    fn what_is_not_known_is_told() {
        let mut decoder = Decoder::default();
        for (scope, event_type, payload) in [
            ("health/a/x", "HealthReported", "{}"),
            ("weather/a", "Rained", "{}"),
            ("health/a/api/x", "HealthForgotten", "{}"),
            ("health/a/api/x", "HealthReported", "{"),
            ("health/a/api/x", "HealthReported", r#"{"health":"healthy","revision":1,"mood":"good"}"#),
        ] {
            assert!(decoder.decode(&stored(scope, event_type, payload)).is_err(), "{scope} {event_type}");
        }
        let long = "x".repeat(10_000);
        let error = decoder.decode(&stored(&long, "Any", "{}")).unwrap_err();
        assert!(error.to_string().len() < 300);
    }
}
