//! Which requests of a batch are accepted. Pure: it sees what was read under the lock and performs no I/O.
//!
//! Requests are decided in order against the same evolving picture, so of two that expect the same version exactly
//! one wins, and a request may build on the one before it. A refused one leaves no trace: its neighbours are decided
//! as if it had not been there.

use std::collections::BTreeMap;
use std::time::SystemTime;
use uuid::Uuid;
use weft_model::version::{Epoch, Position, Version};

use super::AppendError;
use crate::epoch::LogTail;
use crate::event::UnixMicros;
use crate::hash::{EventHash, Hashed};
use crate::request::{AppendRequest, Appended, Malformed};

/// An accepted command, as the database or an earlier request of the batch remembers it.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) fingerprint: [u8; 32],
    pub(super) appended: Appended,
}

/// What was read under the lock.
pub(super) struct Ground<'a> {
    pub(super) epoch: Epoch,
    pub(super) tail: LogTail,
    /// The database's clock.
    pub(super) now: UnixMicros,
    /// Version of every scope that the batch names; zero if it has no event.
    pub(super) heads: BTreeMap<&'a str, Version>,
    /// Outcomes of those commands of the batch that were accepted before.
    pub(super) outcomes: BTreeMap<Uuid, Outcome>,
}

/// What is to be written, and what to tell each requester once it is.
pub(super) struct Decision<'a> {
    pub(super) events: EventRows<'a>,
    pub(super) outcomes: OutcomeRows,
    /// One per request, in order.
    pub(super) answers: Vec<Result<Appended, AppendError>>,
    /// The tail and the scopes' versions once `events` are written.
    pub(super) tail: LogTail,
    pub(super) heads: BTreeMap<&'a str, Version>,
}

/// Rows of `weft.event`, one vector per column.
#[derive(Default)]
pub(super) struct EventRows<'a> {
    pub(super) position: Vec<i64>,
    pub(super) version: Vec<i64>,
    pub(super) cause: Vec<Option<i64>>,
    pub(super) command_id: Vec<Uuid>,
    pub(super) schema: Vec<i16>,
    pub(super) hash: Vec<EventHash>,
    pub(super) scope: Vec<&'a str>,
    pub(super) event_type: Vec<&'a str>,
    pub(super) actor: Vec<&'a str>,
    pub(super) reason: Vec<Option<&'a str>>,
    pub(super) payload: Vec<&'a str>,
    /// The same for all.
    pub(super) epoch: i64,
    /// The same for all.
    pub(super) recorded_at: Option<SystemTime>,
}

/// Rows of `weft.command_outcome`, one vector per column; epoch and time are those of the events.
#[derive(Default)]
pub(super) struct OutcomeRows {
    pub(super) command_id: Vec<Uuid>,
    pub(super) first_position: Vec<i64>,
    pub(super) last_position: Vec<i64>,
    pub(super) fingerprint: Vec<[u8; 32]>,
}

/// Decides `requests`, each with its fingerprint, in order.
pub(super) fn decide<'a>(
    ground: Ground<'a>,
    requests: impl IntoIterator<Item = (&'a AppendRequest, [u8; 32])>,
) -> Decision<'a> {
    // The database's clock may have been set back; time in the log never is.
    let recorded_at = ground.now.max(ground.tail.recorded_at);
    let events = EventRows {
        epoch: ground.epoch.0.cast_signed(),
        recorded_at: Some(recorded_at.to_database()),
        ..EventRows::default()
    };
    let mut decider = Decider {
        epoch: ground.epoch,
        recorded_at,
        tail: ground.tail,
        heads: ground.heads,
        known: ground.outcomes,
        events,
        outcomes: OutcomeRows::default(),
    };
    let answers = requests.into_iter().map(|(request, print)| decider.decide(request, print)).collect();
    let Decider { tail, heads, events, outcomes, .. } = decider;
    Decision { events, outcomes, answers, tail, heads }
}

struct Decider<'a> {
    epoch: Epoch,
    recorded_at: UnixMicros,
    tail: LogTail,
    heads: BTreeMap<&'a str, Version>,
    known: BTreeMap<Uuid, Outcome>,
    events: EventRows<'a>,
    outcomes: OutcomeRows,
}

impl<'a> Decider<'a> {
    fn decide(&mut self, request: &'a AppendRequest, fingerprint: [u8; 32]) -> Result<Appended, AppendError> {
        if let Some(outcome) = self.known.get(&request.command_id) {
            if outcome.fingerprint != fingerprint {
                return Err(AppendError::CommandIdReused);
            }
            return Ok(Appended { repeated: true, ..outcome.appended.clone() });
        }
        self.check(request)?;
        let appended = self.accept(request);
        if let Some(positions) = &appended.positions {
            self.outcomes.command_id.push(request.command_id);
            self.outcomes.first_position.push(positions.start().0.cast_signed());
            self.outcomes.last_position.push(positions.end().0.cast_signed());
            self.outcomes.fingerprint.push(fingerprint);
            self.known.insert(request.command_id, Outcome { fingerprint, appended: appended.clone() });
        }
        Ok(appended)
    }

    fn check(&self, request: &AppendRequest) -> Result<(), AppendError> {
        if let Some(cause) = request.cause.filter(|cause| !(Position(1)..=self.tail.position).contains(cause))
        {
            return Err(AppendError::Malformed(Malformed::Cause(cause)));
        }
        for part in &request.scopes {
            let current = self.head(&part.scope);
            if !part.expected.admits(current) {
                return Err(AppendError::Conflict {
                    scope: part.scope.clone(),
                    expected: part.expected,
                    current,
                });
            }
        }
        Ok(())
    }

    fn accept(&mut self, request: &'a AppendRequest) -> Appended {
        let first = self.tail.position.next();
        let mut versions = BTreeMap::new();
        for part in request.scopes.iter().filter(|part| !part.events.is_empty()) {
            let mut version = self.head(&part.scope);
            for event in &part.events {
                version = version.next();
                self.push(Hashed {
                    epoch: self.epoch,
                    position: self.tail.position.next(),
                    scope: &part.scope,
                    version,
                    event_type: &event.event_type,
                    schema: event.schema,
                    actor: &request.actor,
                    reason: request.reason.as_deref(),
                    cause: request.cause,
                    command_id: request.command_id,
                    recorded_at: self.recorded_at,
                    payload: &event.payload,
                });
            }
            self.heads.insert(&part.scope, version);
            versions.insert(part.scope.clone(), version);
        }
        let last = self.tail.position;
        Appended {
            epoch: self.epoch,
            positions: (first <= last).then_some(first..=last),
            versions,
            recorded_at: self.recorded_at,
            repeated: false,
        }
    }

    fn push(&mut self, event: Hashed<'a>) {
        let hash = event.chain(self.tail.hash);
        let rows = &mut self.events;
        rows.position.push(event.position.0.cast_signed());
        rows.version.push(event.version.0.cast_signed());
        rows.cause.push(event.cause.map(|cause| cause.0.cast_signed()));
        rows.command_id.push(event.command_id);
        rows.schema.push(event.schema.cast_signed());
        rows.hash.push(hash);
        rows.scope.push(event.scope);
        rows.event_type.push(event.event_type);
        rows.actor.push(event.actor);
        rows.reason.push(event.reason);
        rows.payload.push(event.payload);
        self.tail = LogTail { position: event.position, hash, recorded_at: self.recorded_at };
    }

    fn head(&self, scope: &str) -> Version {
        self.heads.get(scope).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::NewEvent;
    use crate::request::ScopeAppend;
    use weft_model::version::ExpectedVersion;

    const PRINT: [u8; 32] = [9; 32];

    fn ground(heads: &[(&'static str, u64)]) -> Ground<'static> {
        let tail =
            LogTail { position: Position(10), hash: EventHash([1; 32]), recorded_at: UnixMicros(5_000_000) };
        Ground {
            epoch: Epoch(2),
            tail,
            now: UnixMicros(6_000_000),
            heads: heads.iter().map(|(scope, version)| (*scope, Version(*version))).collect(),
            outcomes: BTreeMap::new(),
        }
    }

    fn part(scope: &str, expected: ExpectedVersion, events: usize) -> ScopeAppend {
        let event = NewEvent { event_type: "Happened".into(), schema: 1, payload: "{}".into() };
        ScopeAppend { scope: scope.into(), expected, events: vec![event; events] }
    }

    fn request(id: u128, scopes: Vec<ScopeAppend>) -> AppendRequest {
        let command_id = Uuid::from_u128(id);
        AppendRequest { command_id, fingerprint: None, actor: "a".into(), reason: None, cause: None, scopes }
    }

    fn run<'a>(ground: Ground<'a>, requests: &'a [AppendRequest]) -> Decision<'a> {
        decide(ground, requests.iter().map(|request| (request, PRINT)))
    }

    fn positions(answer: &Result<Appended, AppendError>) -> (u64, u64) {
        let range = answer.as_ref().unwrap().positions.clone().unwrap();
        (range.start().0, range.end().0)
    }

    #[test]
    fn of_two_that_expect_the_same_version_one_wins_and_a_dependent_one_follows() {
        let exact = |version| ExpectedVersion::Exact(Version(version));
        let requests = [
            request(1, vec![part("s", exact(3), 2)]),
            request(2, vec![part("s", exact(3), 1)]),
            request(3, vec![part("s", exact(5), 1)]),
        ];
        let decision = run(ground(&[("s", 3)]), &requests);
        assert_eq!(positions(&decision.answers[0]), (11, 12));
        let Err(AppendError::Conflict { scope, expected, current }) = &decision.answers[1] else {
            panic!("{:?}", decision.answers[1])
        };
        assert_eq!((scope.as_str(), *expected, *current), ("s", exact(3), Version(5)));
        assert_eq!(positions(&decision.answers[2]), (13, 13));
        assert_eq!(decision.events.version, [4, 5, 6]);
        assert_eq!(decision.tail.position, Position(13));
    }

    #[test]
    fn one_failed_expectation_leaves_nothing_of_its_request() {
        let requests = [request(
            1,
            vec![part("a", ExpectedVersion::Empty, 1), part("b", ExpectedVersion::Exact(Version(9)), 0)],
        )];
        let decision = run(ground(&[("a", 0), ("b", 8)]), &requests);
        assert!(matches!(&decision.answers[0], Err(AppendError::Conflict { scope, .. }) if scope == "b"));
        assert!(decision.events.position.is_empty() && decision.outcomes.command_id.is_empty());
        assert_eq!(decision.heads["a"], Version::ZERO);
        assert_eq!(decision.tail.position, Position(10));
    }

    #[test]
    fn a_repeat_within_the_batch_gets_the_first_answer_unless_its_content_differs() {
        let requests = [
            request(1, vec![part("a", ExpectedVersion::Empty, 1)]),
            request(1, vec![part("a", ExpectedVersion::Empty, 1)]),
            request(1, vec![part("b", ExpectedVersion::Any, 1)]),
        ];
        let prints = [PRINT, PRINT, [8; 32]];
        let decision = decide(ground(&[]), requests.iter().zip(prints));
        let first = decision.answers[0].as_ref().unwrap();
        assert_eq!(decision.answers[1].as_ref().unwrap(), &Appended { repeated: true, ..first.clone() });
        assert!(matches!(decision.answers[2], Err(AppendError::CommandIdReused)));
        assert_eq!(decision.outcomes.command_id.len(), 1);
    }

    #[test]
    fn a_pure_guard_changes_nothing_and_is_not_remembered() {
        let requests = [request(1, vec![part("s", ExpectedVersion::Exact(Version(3)), 0)])];
        let decision = run(ground(&[("s", 3)]), &requests);
        let answer = decision.answers[0].as_ref().unwrap();
        assert_eq!((answer.positions.clone(), answer.versions.len()), (None, 0));
        assert!(decision.outcomes.command_id.is_empty());
    }

    #[test]
    fn time_in_the_log_never_goes_back() {
        let mut back = ground(&[]);
        back.now = UnixMicros(4_000_000);
        let requests = [request(1, vec![part("s", ExpectedVersion::Any, 1)])];
        assert_eq!(run(back, &requests).answers[0].as_ref().unwrap().recorded_at, UnixMicros(5_000_000));
    }

    #[test]
    fn a_cause_must_be_in_the_log_already() {
        for (cause, known) in [(0, false), (1, true), (10, true), (11, false)] {
            let mut caused = request(1, vec![part("s", ExpectedVersion::Any, 1)]);
            caused.cause = Some(Position(cause));
            let requests = [caused];
            let decision = run(ground(&[]), &requests);
            assert_eq!(decision.answers[0].is_ok(), known, "{cause}");
        }
    }
}
