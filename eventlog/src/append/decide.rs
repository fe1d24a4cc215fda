//! Which requests of a batch are accepted. Pure: it sees what was read of the log and performs no I/O. The appender asks it, and
//! so does the simulation of the control plane, which keeps a log of its own.
//!
//! Requests are decided in order against the same evolving picture, so of two that expect the same version exactly
//! one wins, and a request may build on the one before it. A refused one leaves no trace: its neighbours are decided
//! as if it had not been there.

use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;
use weft_model::version::{Epoch, Position, Version};

use super::columns::Rows;
use super::{AppendError, OUTCOME_KEPT};
pub use crate::epoch::LogTail;
use crate::event::UnixMicros;
use crate::page::EventView;
use crate::request::{AppendRequest, Appended, Malformed};

/// How far the clock of a command's author may be ahead of the database's. Its id says when it was made, and an id from
/// the future would be remembered for too short a time.
pub(crate) const CLOCK_AHEAD_MAX: Duration = Duration::from_secs(60 * 60);

/// An accepted command, as the database or an earlier request of the batch remembers it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What makes another request the same command.
    pub fingerprint: [u8; 32],
    /// What was recorded.
    pub appended: Appended,
}

impl Outcome {
    /// What somebody is told who asks with the command's id for what has this fingerprint.
    ///
    /// # Errors
    /// [`AppendError::CommandIdReused`] if that is another command.
    pub fn answer(&self, fingerprint: [u8; 32]) -> Result<Appended, AppendError> {
        if self.fingerprint != fingerprint {
            return Err(AppendError::CommandIdReused);
        }
        Ok(Appended { repeated: true, ..self.appended.clone() })
    }
}

/// What a batch is decided on, beside the versions of its scopes.
#[derive(Debug)]
pub struct Ground {
    /// The epoch that is open.
    pub epoch: Epoch,
    /// The log's end.
    pub tail: LogTail,
    /// The database's clock.
    pub now: UnixMicros,
    /// Outcomes of those commands of the batch that were accepted before.
    pub outcomes: BTreeMap<Uuid, Outcome>,
}

/// What is to be written, and what to tell each requester once it is.
#[derive(Debug)]
pub struct Decision {
    pub(super) rows: Rows,
    /// The ids of the commands that are recorded.
    pub recorded: Vec<Uuid>,
    /// One per request, in order.
    pub answers: Vec<Result<Appended, AppendError>>,
    /// The log's end once they are.
    pub tail: LogTail,
}

/// Decides `requests`, each with its fingerprint, in order. `heads` is brought to what it is once the rows are written.
pub fn decide<'a>(
    ground: Ground,
    heads: &mut BTreeMap<&'a str, Version>,
    requests: impl IntoIterator<Item = (&'a AppendRequest, [u8; 32])>,
) -> Decision {
    // The database's clock may have been set back; time in the log never is.
    let recorded_at = ground.now.max(ground.tail.recorded_at);
    let mut decider = Decider {
        epoch: ground.epoch,
        recorded_at,
        now: ground.now,
        tail: ground.tail,
        heads,
        known: ground.outcomes,
        rows: Rows::new(ground.epoch, recorded_at),
        recorded: Vec::new(),
    };
    let answers = requests.into_iter().map(|(request, print)| decider.decide(request, print)).collect();
    let Decider { tail, rows, recorded, .. } = decider;
    Decision { rows, recorded, answers, tail }
}

struct Decider<'a, 'h> {
    epoch: Epoch,
    recorded_at: UnixMicros,
    now: UnixMicros,
    tail: LogTail,
    heads: &'h mut BTreeMap<&'a str, Version>,
    known: BTreeMap<Uuid, Outcome>,
    rows: Rows,
    recorded: Vec<Uuid>,
}

impl<'a> Decider<'a, '_> {
    fn decide(&mut self, request: &'a AppendRequest, fingerprint: [u8; 32]) -> Result<Appended, AppendError> {
        check_age(request.command_id, self.now)?;
        if let Some(outcome) = self.known.get(&request.command_id) {
            return outcome.answer(fingerprint);
        }
        self.check(request)?;
        let appended = self.accept(request, &fingerprint);
        if appended.positions.is_some() {
            self.recorded.push(request.command_id);
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

    fn accept(&mut self, request: &'a AppendRequest, fingerprint: &[u8; 32]) -> Appended {
        let first = self.tail.position.next();
        let events = u32::try_from(request.events()).unwrap_or(u32::MAX);
        let mut versions = BTreeMap::new();
        for part in request.scopes.iter().filter(|part| !part.events.is_empty()) {
            let mut version = self.head(&part.scope);
            for event in &part.events {
                version = version.next();
                let event = EventView {
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
                };
                let command = (event.position == first).then_some((fingerprint, events));
                self.tail = self.rows.push(&event, self.tail, command);
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

    fn head(&self, scope: &str) -> Version {
        self.heads.get(scope).copied().unwrap_or_default()
    }
}

/// Whether the outcome of a command made at the time that its id tells is sure to be known, if it has one.
fn check_age(command_id: Uuid, now: UnixMicros) -> Result<(), AppendError> {
    let made = command_id.get_timestamp().map_or(0, |time| {
        let (seconds, nanos) = time.to_unix();
        let micros = seconds.saturating_mul(1_000_000).saturating_add(u64::from(nanos / 1_000));
        i64::try_from(micros).unwrap_or(i64::MAX)
    });
    let micros = |time: Duration| i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
    if made > now.0.saturating_add(micros(CLOCK_AHEAD_MAX)) {
        return Err(AppendError::Malformed(Malformed::CommandIdFuture(command_id)));
    }
    if made < now.0.saturating_sub(micros(OUTCOME_KEPT)) {
        return Err(AppendError::CommandIdExpired);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::NewEvent;
    use crate::hash::EventHash;
    use crate::request::ScopeAppend;
    use weft_model::version::ExpectedVersion;

    const PRINT: [u8; 32] = [9; 32];
    /// The database's clock in these tests.
    const NOW: UnixMicros = UnixMicros(1_790_000_000_000_000);

    fn ground() -> Ground {
        let recorded_at = UnixMicros(NOW.0 - 1_000_000);
        let tail = LogTail { position: Position(10), hash: EventHash([1; 32]), recorded_at };
        Ground { epoch: Epoch(2), tail, now: NOW, outcomes: BTreeMap::new() }
    }

    fn heads(of: &[(&'static str, u64)]) -> BTreeMap<&'static str, Version> {
        of.iter().map(|(scope, version)| (*scope, Version(*version))).collect()
    }

    fn part(scope: &str, expected: ExpectedVersion, events: usize) -> ScopeAppend {
        let event = NewEvent { event_type: "Happened".into(), schema: 1, payload: "{}".into() };
        ScopeAppend { scope: scope.into(), expected, events: vec![event; events] }
    }

    fn made_at(micros: i64, id: u16) -> Uuid {
        let millis = u64::try_from(micros / 1_000).unwrap();
        let [.., high, low] = id.to_be_bytes();
        uuid::Builder::from_unix_timestamp_millis(millis, &[0, 0, 0, 0, 0, 0, 0, 0, high, low]).into_uuid()
    }

    fn request(id: u16, scopes: Vec<ScopeAppend>) -> AppendRequest {
        let command_id = made_at(NOW.0, id);
        AppendRequest { command_id, fingerprint: None, actor: "a".into(), reason: None, cause: None, scopes }
    }

    fn run<'a>(heads: &mut BTreeMap<&'a str, Version>, requests: &'a [AppendRequest]) -> Decision {
        decide(ground(), heads, requests.iter().map(|request| (request, PRINT)))
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
        let mut heads = heads(&[("s", 3)]);
        let decision = run(&mut heads, &requests);
        assert_eq!(positions(&decision.answers[0]), (11, 12));
        let Err(AppendError::Conflict { scope, expected, current }) = &decision.answers[1] else {
            panic!("{:?}", decision.answers[1])
        };
        assert_eq!((scope.as_str(), *expected, *current), ("s", exact(3), Version(5)));
        assert_eq!(positions(&decision.answers[2]), (13, 13));
        assert_eq!((heads["s"], decision.rows.len()), (Version(6), 3));
        assert_eq!((decision.rows.first, decision.tail.position), (Position(11), Position(13)));
    }

    #[test]
    fn one_failed_expectation_leaves_nothing_of_its_request() {
        let requests = [request(
            1,
            vec![part("a", ExpectedVersion::Empty, 1), part("b", ExpectedVersion::Exact(Version(9)), 0)],
        )];
        let mut heads = heads(&[("a", 0), ("b", 8)]);
        let decision = run(&mut heads, &requests);
        assert!(matches!(&decision.answers[0], Err(AppendError::Conflict { scope, .. }) if scope == "b"));
        assert!(decision.rows.is_empty() && decision.recorded.is_empty());
        assert_eq!(heads["a"], Version::ZERO);
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
        let decision = decide(ground(), &mut heads(&[]), requests.iter().zip(prints));
        let first = decision.answers[0].as_ref().unwrap();
        assert_eq!(decision.answers[1].as_ref().unwrap(), &Appended { repeated: true, ..first.clone() });
        assert!(matches!(decision.answers[2], Err(AppendError::CommandIdReused)));
        assert_eq!(decision.recorded, [requests[0].command_id]);
    }

    #[test]
    fn a_pure_guard_changes_nothing_and_is_not_remembered() {
        let requests = [request(1, vec![part("s", ExpectedVersion::Exact(Version(3)), 0)])];
        let decision = run(&mut heads(&[("s", 3)]), &requests);
        let answer = decision.answers[0].as_ref().unwrap();
        assert_eq!((answer.positions.clone(), answer.versions.len()), (None, 0));
        assert!(decision.recorded.is_empty());
    }

    #[test]
    fn time_in_the_log_never_goes_back() {
        let requests = [request(1, vec![part("s", ExpectedVersion::Any, 1)])];
        let back = Ground { now: UnixMicros(NOW.0 - 2_000_000), ..ground() };
        let decision = decide(back, &mut heads(&[]), [(&requests[0], PRINT)]);
        assert_eq!(decision.answers[0].as_ref().unwrap().recorded_at, UnixMicros(NOW.0 - 1_000_000));
    }

    #[test]
    fn a_cause_must_be_in_the_log_already() {
        for (cause, known) in [(0, false), (1, true), (10, true), (11, false)] {
            let mut caused = request(1, vec![part("s", ExpectedVersion::Any, 1)]);
            caused.cause = Some(Position(cause));
            let requests = [caused];
            let decision = run(&mut heads(&[]), &requests);
            assert_eq!(decision.answers[0].is_ok(), known, "{cause}");
        }
    }

    #[test]
    fn an_id_is_good_for_as_long_as_its_outcome_is_kept() {
        let kept = i64::try_from(OUTCOME_KEPT.as_micros()).unwrap();
        let ahead = i64::try_from(CLOCK_AHEAD_MAX.as_micros()).unwrap();
        for good in [NOW.0 - kept, NOW.0, NOW.0 + ahead] {
            assert!(check_age(made_at(good, 1), NOW).is_ok(), "{good}");
        }
        let old = check_age(made_at(NOW.0 - kept - 1_000, 1), NOW);
        assert!(matches!(old, Err(AppendError::CommandIdExpired)), "{old:?}");
        let future = check_age(made_at(NOW.0 + ahead + 1_000, 1), NOW);
        assert!(matches!(future, Err(AppendError::Malformed(Malformed::CommandIdFuture(_)))), "{future:?}");
    }
}
