//! What a caller asks the log to append, its bounds, and what it is told back.

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;
use uuid::Uuid;
use weft_model::version::{Epoch, ExpectedVersion, Position, Version};

use crate::event::{NewEvent, UnixMicros};
use crate::hash::Encoder;

/// Scopes in one request. A directory of resources applied at once is the largest real one.
pub const SCOPES_PER_REQUEST_MAX: usize = 4_096;
/// Events in one request, over all its scopes: as many rows as one insert handles in a few tens of milliseconds,
/// because everybody else's appends wait behind it.
pub const EVENTS_PER_REQUEST_MAX: usize = 4_096;
/// Bytes of all texts of one request, for the same reason.
pub const REQUEST_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Bytes of one payload. An event is a fact, not a file.
pub const PAYLOAD_BYTES_MAX: usize = 256 * 1024;
/// Bytes of a scope. It is an index key, and PostgreSQL refuses those above 2,704 bytes.
pub const SCOPE_BYTES_MAX: usize = 512;
/// Bytes of an event type.
pub const TYPE_BYTES_MAX: usize = 128;
/// Bytes of an actor; the longest is a SPIFFE id, whose names are bounded far below this.
pub const ACTOR_BYTES_MAX: usize = 512;
/// Bytes of a reason: a sentence or two, or a link.
pub const REASON_BYTES_MAX: usize = 1_024;
/// Largest schema version; the column is a `smallint`.
pub const SCHEMA_MAX: u16 = 32_767;

/// One command's events, recorded all or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppendRequest {
    /// A UUIDv7 that the command's author made. Repeating an accepted command with the same id and the same content
    /// returns the first outcome and records nothing.
    pub command_id: Uuid,
    /// SHA-256 of what the author asked for, if the events were decided from it rather than given by the author: a
    /// repeat may be decided otherwise, because the first one has changed the state, and is still the same command.
    /// `None`: the request itself is the content.
    pub fingerprint: Option<[u8; 32]>,
    /// Who does it; 1 to [`ACTOR_BYTES_MAX`] bytes.
    pub actor: String,
    /// Why; at most [`REASON_BYTES_MAX`] bytes.
    pub reason: Option<String>,
    /// The recorded event that led to this command.
    pub cause: Option<Position>,
    /// Each scope at most once. Without any event in any of them the request only checks the expectations, and its
    /// outcome is not kept, because nothing changed.
    pub scopes: Vec<ScopeAppend>,
}

/// What a request expects of one scope and adds to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScopeAppend {
    /// The consistency boundary; opaque to the log; 1 to [`SCOPE_BYTES_MAX`] bytes.
    pub scope: String,
    /// Must be true when the log is locked, or the whole request is refused.
    pub expected: ExpectedVersion,
    /// Events to add, in order. None: only the expectation is checked.
    pub events: Vec<NewEvent>,
}

/// A request was accepted, now or earlier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Epoch in which it was accepted.
    pub epoch: Epoch,
    /// Positions of its events, which are contiguous; `None` if it had none.
    pub positions: Option<RangeInclusive<Position>>,
    /// The version of each scope that received events, after the last of them.
    pub versions: BTreeMap<String, Version>,
    /// When, by the database's clock.
    pub recorded_at: UnixMicros,
    /// It had been accepted before; this is the first outcome, and nothing was recorded now.
    pub repeated: bool,
}

/// A request that can never be accepted, whatever the state of the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The command id is not time-ordered.
    #[error("command id {0} is not a UUIDv7")]
    CommandId(Uuid),
    /// The command id says that it was made in the future, by more than clocks may differ.
    #[error(
        "command id {0} was made more than an hour ahead of the database's clock; set the clock of its author"
    )]
    CommandIdFuture(Uuid),
    /// A text that must say something is empty.
    #[error("{0} is empty")]
    Empty(&'static str),
    /// PostgreSQL's text has no NUL character.
    #[error("{0} contains a NUL character")]
    Nul(&'static str),
    /// The scope is listed more than once.
    #[error("scope {0} is listed twice")]
    ScopeTwice(String),
    /// The schema version is zero or above [`SCHEMA_MAX`].
    #[error("schema version {0} is not between 1 and {SCHEMA_MAX}")]
    Schema(u16),
    /// The payload is not JSON that can be stored and queried.
    #[error("a payload for scope {scope} is not acceptable JSON: {problem}")]
    Payload {
        /// Scope of the event.
        scope: String,
        /// What is wrong, with its place in the text.
        problem: String,
    },
    /// The cause is not in the log.
    #[error("cause {0} is not a recorded position")]
    Cause(Position),
}

/// A request above one of the bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {size} is above the limit of {limit}")]
pub struct TooLarge {
    /// What is too large.
    pub what: &'static str,
    /// How large it is.
    pub size: usize,
    /// How large it may be.
    pub limit: usize,
}

/// Why a request is refused before it reaches the log.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Invalid {
    Malformed(Malformed),
    TooLarge(TooLarge),
}

impl AppendRequest {
    /// Checks everything that does not depend on the log. What passes here, PostgreSQL stores.
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        if self.command_id.get_version_num() != 7 {
            return Err(Invalid::Malformed(Malformed::CommandId(self.command_id)));
        }
        bounded("scopes in one request", self.scopes.len(), SCOPES_PER_REQUEST_MAX)?;
        bounded("events in one request", self.events(), EVENTS_PER_REQUEST_MAX)?;
        bounded("bytes in one request", self.bytes(), REQUEST_BYTES_MAX)?;
        text("actor", &self.actor, ACTOR_BYTES_MAX)?;
        if let Some(reason) = &self.reason {
            text("reason", reason, REASON_BYTES_MAX)?;
        }
        let mut seen = BTreeSet::new();
        for part in &self.scopes {
            text("scope", &part.scope, SCOPE_BYTES_MAX)?;
            if !seen.insert(part.scope.as_str()) {
                return Err(Invalid::Malformed(Malformed::ScopeTwice(part.scope.clone())));
            }
            part.events.iter().try_for_each(|event| check_event(&part.scope, event))?;
        }
        Ok(())
    }

    pub(crate) fn events(&self) -> usize {
        self.scopes.iter().map(|part| part.events.len()).sum()
    }

    /// Bytes of all its texts: what it costs to keep it in a queue.
    pub(crate) fn bytes(&self) -> usize {
        let event = |event: &NewEvent| event.event_type.len() + event.payload.len();
        let part = |part: &ScopeAppend| part.scope.len() + part.events.iter().map(event).sum::<usize>();
        let reason = self.reason.as_ref().map_or(0, String::len);
        self.actor.len() + reason + self.scopes.iter().map(part).sum::<usize>()
    }

    /// What makes two requests with one command id the same command.
    pub(crate) fn effective_fingerprint(&self) -> [u8; 32] {
        self.fingerprint.unwrap_or_else(|| {
            let mut encoder = Encoder::new(b"weft-request/1\n");
            encoder.text(&self.actor);
            encoder.optional(self.reason.as_deref(), Encoder::text);
            encoder.optional(self.cause, |encoder, cause| encoder.number(cause.0));
            encoder.number(self.scopes.len() as u64);
            for part in &self.scopes {
                encoder.text(&part.scope);
                encoder.text(&part.expected.to_string());
                encoder.number(part.events.len() as u64);
                for event in &part.events {
                    encoder.text(&event.event_type);
                    encoder.number(u64::from(event.schema));
                    encoder.text(&event.payload);
                }
            }
            encoder.finish()
        })
    }
}

fn check_event(scope: &str, event: &NewEvent) -> Result<(), Invalid> {
    text("event type", &event.event_type, TYPE_BYTES_MAX)?;
    if !(1..=SCHEMA_MAX).contains(&event.schema) {
        return Err(Invalid::Malformed(Malformed::Schema(event.schema)));
    }
    bounded("bytes in one payload", event.payload.len(), PAYLOAD_BYTES_MAX)?;
    serde_json::from_str::<Storable>(&event.payload).map(|Storable| ()).map_err(|error| {
        Invalid::Malformed(Malformed::Payload { scope: scope.to_owned(), problem: error.to_string() })
    })
}

fn text(what: &'static str, text: &str, limit: usize) -> Result<(), Invalid> {
    bounded(what, text.len(), limit)?;
    if text.is_empty() {
        return Err(Invalid::Malformed(Malformed::Empty(what)));
    }
    if text.contains('\0') {
        return Err(Invalid::Malformed(Malformed::Nul(what)));
    }
    Ok(())
}

fn bounded(what: &'static str, size: usize, limit: usize) -> Result<(), Invalid> {
    if size > limit { Err(Invalid::TooLarge(TooLarge { what, size, limit })) } else { Ok(()) }
}

/// JSON that PostgreSQL both stores as `json` and lets people query: strings are whole Unicode without NUL, and the
/// parser's nesting bound (128) keeps far from the server's stack limit. Keeps nothing, so duplicate keys are fine.
struct Storable;

impl<'de> Deserialize<'de> for Storable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Storable {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self, E> {
        if text.contains('\0') { Err(E::custom("a string contains a NUL character")) } else { Ok(self) }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self, A::Error> {
        while items.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self, A::Error> {
        while entries.next_entry::<Self, Self>()?.is_some() {}
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(payload: &str) -> AppendRequest {
        AppendRequest {
            command_id: Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001),
            fingerprint: None,
            actor: "ada".into(),
            reason: None,
            cause: None,
            scopes: vec![ScopeAppend {
                scope: "mesh".into(),
                expected: ExpectedVersion::Any,
                events: vec![NewEvent { event_type: "Happened".into(), schema: 1, payload: payload.into() }],
            }],
        }
    }

    #[test]
    fn any_json_is_a_payload() {
        for good in
            ["{}", "null", " [1, -2.5e3, \"\u{1F9F5}\", {\"a\":1,\"a\":2}]\n", r#""\ud83e\uddf5""#, "true"]
        {
            assert_eq!(request(good).check(), Ok(()), "{good}");
        }
    }

    #[test]
    fn what_the_database_would_refuse_is_refused_first() {
        let deep = "[".repeat(500) + &"]".repeat(500);
        for bad in
            ["", "{", "{} x", "nul", r#""\u0000""#, r#"{"\u0000":1}"#, r#""\ud800""#, "\"\0\"", "01", &deep]
        {
            let refused = request(bad).check();
            assert!(matches!(refused, Err(Invalid::Malformed(Malformed::Payload { .. }))), "{bad:.20}");
        }
    }

    #[test]
    fn bounds_and_shapes_are_checked() {
        let refused = |change: fn(&mut AppendRequest)| {
            let mut request = request("{}");
            change(&mut request);
            request.check().unwrap_err()
        };
        let malformed = [
            (refused(|r| r.command_id = Uuid::nil()), Malformed::CommandId(Uuid::nil())),
            (refused(|r| r.actor.clear()), Malformed::Empty("actor")),
            (refused(|r| r.reason = Some("a\0b".into())), Malformed::Nul("reason")),
            (refused(|r| r.scopes.push(r.scopes[0].clone())), Malformed::ScopeTwice("mesh".into())),
            (refused(|r| r.scopes[0].events[0].schema = 0), Malformed::Schema(0)),
            (refused(|r| r.scopes[0].events[0].schema = 40_000), Malformed::Schema(40_000)),
        ];
        for (refused, expected) in malformed {
            assert_eq!(refused, Invalid::Malformed(expected));
        }
        let large = [
            refused(|r| r.scopes[0].scope = "s".repeat(SCOPE_BYTES_MAX + 1)),
            refused(|r| r.scopes[0].events[0].payload = format!("\"{}\"", "x".repeat(PAYLOAD_BYTES_MAX))),
            refused(|r| r.scopes[0].events = vec![r.scopes[0].events[0].clone(); EVENTS_PER_REQUEST_MAX + 1]),
        ];
        for refused in large {
            assert!(matches!(refused, Invalid::TooLarge(_)), "{refused:?}");
        }
    }

    #[test]
    fn a_fingerprint_covers_all_but_the_id() {
        let base = request("{}");
        let mut same = base.clone();
        same.command_id = Uuid::nil();
        assert_eq!(same.effective_fingerprint(), base.effective_fingerprint());
        let changes: [fn(&mut AppendRequest); 6] = [
            |r| r.actor.push('x'),
            |r| r.reason = Some(String::new()),
            |r| r.cause = Some(Position(1)),
            |r| r.scopes[0].expected = ExpectedVersion::Empty,
            |r| r.scopes[0].events[0].payload = "{ }".into(),
            |r| r.scopes[0].scope.push('x'),
        ];
        for change in changes {
            let mut other = base.clone();
            change(&mut other);
            assert_ne!(other.effective_fingerprint(), base.effective_fingerprint(), "{other:?}");
        }
    }
}
