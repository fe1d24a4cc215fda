//! Commands: decided against the view, appended with a compare-and-swap, decided again if somebody was faster.
//!
//! A decision is made in memory against this controller's fold, which may be behind the log. So it is never trusted by
//! itself: every scope that it saw or rests on goes into the append as `Exact(version seen)`, and the log, under its
//! lock, accepts the events only if all of them still hold. A decision that leads to no append (a refusal, or nothing
//! to change) is final only if it rests on everything that was in the log at some moment since the request came: then
//! that is how things stood at that moment or later. So the log's head is asked for once per request, and a fold that is
//! behind it waited for; that the log goes on meanwhile does not matter.
//!
//! **Exactly once.** What makes two requests the same command is the fingerprint: SHA-256 over the caller, the
//! operation and the encoded request. The log answers a repeat with the first outcome before it looks at expectations,
//! so a repeat does not conflict with its own first execution. Where a repeat would be refused before it gets that far,
//! its outcome is looked up first. A command that changed nothing is not recorded; its repeat is decided anew.
//!
//! Called by [`mesh`](crate::mesh) and [`identity`](crate::identity).

use prost::Message;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;
use weft_eventlog::{AppendError, AppendRequest, Appended, Appender, NewEvent, Reader, ScopeAppend};
use weft_model::version::{ExpectedVersion, Version};
use weft_model::{Command, ConfigVersion, Event, Position, Rejection, Scope};
use weft_projector::View;
use weft_proto::v1 as pb;
use weft_routing::RoutingState;
use weft_routing::decide::{Decision, decide};

use crate::status::ApiError;
use crate::{Clock, Context};

/// How often a command is decided again because somebody was faster. With fair luck each attempt at least halves the
/// competitors; who still loses is told to come back.
const ATTEMPTS_MAX: usize = 8;
/// How long a command waits for this controller's fold, before it is decided again and after it is appended. Folding is
/// a matter of milliseconds; the bound is for a database that stalls.
pub(crate) const FOLD_WAIT_MAX: Duration = Duration::from_secs(5);
/// Advice to a command that lost every attempt.
const CONTENTION_RETRY_MS: u64 = 100;

/// What somebody asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// Names the command for all its repeats.
    pub command_id: Uuid,
    /// Why.
    pub reason: Option<String>,
    /// Who.
    pub actor: String,
    /// What makes a repeat the same command; see [`fingerprint`].
    pub fingerprint: [u8; 32],
    /// The changes, all or none.
    pub changes: Vec<Change>,
}

/// One change and what its author believes about the scope.
#[derive(Clone, Debug)]
pub struct Change {
    /// The belief.
    pub expected: ExpectedVersion,
    /// The change.
    pub command: Command,
    /// Where other scopes have to be that it rests on.
    pub also: Vec<(Scope, ExpectedVersion)>,
}

impl Change {
    /// A change of one scope.
    #[must_use]
    pub const fn new(expected: ExpectedVersion, command: Command) -> Self {
        Self { expected, command, also: Vec::new() }
    }
}

/// What became of a request.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The log after it.
    pub version: ConfigVersion,
    /// Each change's scope, in order.
    pub scopes: Vec<ScopeOutcome>,
    /// It had been executed before.
    pub repeated: bool,
}

/// What became of one change.
#[derive(Clone, Debug)]
pub struct ScopeOutcome {
    /// Its scope.
    pub scope: Scope,
    /// The scope's version now.
    pub version: Version,
    /// Whether anything changed.
    pub changed: bool,
}

/// The fingerprint of a request.
#[must_use]
pub fn fingerprint(operation: &str, actor: &str, request: &impl Message) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in [operation.as_bytes(), actor.as_bytes(), &request.encode_to_vec()] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// Executes commands. Cheap to clone.
#[derive(Clone)]
pub struct Commands {
    view: View,
    appender: Appender,
    reader: Reader,
    clock: Clock,
}

/// Where the next step leads.
enum Step {
    /// The answer.
    Done(Outcome),
    /// The append found this scope elsewhere.
    Behind(Scope, Version),
}

impl Commands {
    /// Executes commands in this context.
    #[must_use]
    pub fn new(context: &Context) -> Self {
        let Context { view, appender, reader, clock, .. } = context.clone();
        Self { view, appender, reader, clock }
    }

    /// Executes a request. When this returns `Ok`, its events are durable, and this controller's reads show them.
    ///
    /// # Errors
    /// A refusal or a conflict: nothing was changed. [`ApiError::Unavailable`]: unknown; repeat with the same id.
    pub async fn execute(&self, request: &Request) -> Result<Outcome, ApiError> {
        let result = self.execute_counted(request).await;
        let outcome = result.as_ref().map_or_else(ApiError::as_str, |outcome| {
            match (outcome.repeated, outcome.scopes.iter().any(|scope| scope.changed)) {
                (true, _) => "repeated",
                (false, true) => "appended",
                (false, false) => "unchanged",
            }
        });
        metrics::counter!("weft_api_commands_total", "outcome" => outcome).increment(1);
        result
    }

    /// Executes a change that this controller, which is `actor`, wants itself. It has an id of its own each time, so whoever repeats it
    /// sees to it that a repeat is harmless.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub async fn execute_own(
        &self,
        actor: &str,
        reason: String,
        change: Change,
    ) -> Result<Outcome, ApiError> {
        let command_id = Uuid::now_v7();
        let named = pb::CommandMeta { command_id: command_id.to_string(), reason: reason.clone() };
        let request = Request {
            command_id,
            reason: Some(reason),
            actor: actor.to_owned(),
            fingerprint: fingerprint("own", actor, &named),
            changes: vec![change],
        };
        self.execute(&request).await
    }

    /// Decides a request, against everything that is in the log now, and changes nothing.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub async fn rehearse(&self, changes: &[Change]) -> Result<Outcome, ApiError> {
        self.wait_for(self.reader.head().await?.position).await?;
        let (version, decided) = self.decide(changes);
        Ok(unchanged_or_planned(version, &decided?))
    }

    async fn execute_counted(&self, request: &Request) -> Result<Outcome, ApiError> {
        if let Some(fault) = self.view.fault() {
            return Err(ApiError::from(&*fault));
        }
        // Where the log ended at some moment of this request.
        let mut head = None;
        for _ in 0..ATTEMPTS_MAX {
            let (at, decided) = self.decide(&request.changes);
            let answer = match decided {
                Ok(decisions) if decisions.iter().any(|decision| !decision.events.is_empty()) => {
                    match self.append(request, &decisions).await? {
                        Step::Done(outcome) => return Ok(outcome),
                        Step::Behind(scope, version) => self.wait_for_scope(&scope, version).await?,
                    }
                    continue;
                }
                Ok(decisions) => Ok(unchanged_or_planned(at, &decisions)),
                Err(error) => Err(error),
            };
            // The first execution of this command may be what it now stumbles over.
            if let Some(first) = self.first_outcome(request).await? {
                return Ok(first);
            }
            let head = match head {
                Some(head) => head,
                None => *head.insert(self.head_after(at.position).await?),
            };
            if head <= at.position {
                return answer;
            }
            self.wait_for(head).await?;
        }
        Err(ApiError::Overloaded { retry_after_ms: CONTENTION_RETRY_MS })
    }

    /// The log's end now, after a decision that rests on the event at `seen`. A log that ends before that lost what the decision rests
    /// on: nothing to change, or a refusal, would be an answer about events that are not there.
    async fn head_after(&self, seen: Position) -> Result<Position, ApiError> {
        let head = self.reader.head().await?.position;
        if head < seen {
            let message =
                format!("this controller has read up to {seen}, and the log ends at {head}; try again");
            return Err(ApiError::Unavailable(message));
        }
        Ok(head)
    }

    /// Decides against the fold as it is, and says where it is.
    fn decide(&self, changes: &[Change]) -> (ConfigVersion, Result<Vec<Decision>, ApiError>) {
        let batch: Vec<Command> = changes.iter().map(|change| change.command.clone()).collect();
        let now = (self.clock)();
        // One look, so that version, decisions and expectations are about the same moment.
        let (version, decided, stale) = self.view.read(|projection| {
            let state = projection.state();
            (projection.version(), decide(state, &batch, now), stale(state, changes))
        });
        // A stale expectation is told before a refusal: the refusal may come from what the caller has not seen.
        if let Some(conflict) = stale {
            return (version, Err(conflict));
        }
        let decisions = decided.map_err(|refused| {
            let (index, scope, rejection) = match *refused.rejection {
                // A rollout is one change of several that were asked for.
                Rejection::Candidate { index, scope, rejection } => (Some(index), scope, rejection),
                rejection @ (Rejection::RolloutRunning | Rejection::NoRollout) => {
                    (None, refused.scope, Box::new(rejection))
                }
                rejection => (Some(refused.index), refused.scope, Box::new(rejection)),
            };
            let refused = ApiError::Rejected { change: None, scope, rejection };
            match index {
                Some(index) => refused.at_change(index),
                None => refused,
            }
        });
        (version, decisions)
    }

    async fn append(&self, request: &Request, decisions: &[Decision]) -> Result<Step, ApiError> {
        match self.appender.append(append_request(request, decisions)?).await {
            Ok(appended) => {
                if let Some(positions) = &appended.positions {
                    // The command is done either way; who reads here before the fold has it sees the log's older state.
                    let _ = self.view.wait_folded(*positions.end(), FOLD_WAIT_MAX).await;
                }
                Ok(Step::Done(self.outcome(request, &appended)))
            }
            Err(AppendError::Conflict { scope, current, .. }) => {
                let scope =
                    scope.parse().map_err(|_| ApiError::Internal("a conflict without a scope".into()))?;
                Ok(Step::Behind(scope, current))
            }
            Err(other) => Err(other.into()),
        }
    }

    async fn first_outcome(&self, request: &Request) -> Result<Option<Outcome>, ApiError> {
        let Some(first) = self.reader.outcome(request.command_id).await? else { return Ok(None) };
        if first.fingerprint != request.fingerprint {
            return Err(AppendError::CommandIdReused.into());
        }
        Ok(Some(self.outcome(request, &Appended { repeated: true, ..first.appended })))
    }

    fn outcome(&self, request: &Request, appended: &Appended) -> Outcome {
        let scope = |change: &Change| {
            let scope = change.command.scope();
            let written = appended.versions.get(&scope.to_string()).copied();
            let current = || self.view.read(|projection| projection.state().source(&scope).version);
            ScopeOutcome { version: written.unwrap_or_else(current), changed: written.is_some(), scope }
        };
        let position = appended.positions.as_ref().map_or(Position::ZERO, |positions| *positions.end());
        Outcome {
            version: ConfigVersion::new(appended.epoch, position),
            scopes: request.changes.iter().map(scope).collect(),
            repeated: appended.repeated,
        }
    }

    async fn wait_for(&self, position: Position) -> Result<(), ApiError> {
        if self.view.wait_folded(position, FOLD_WAIT_MAX).await { Ok(()) } else { Err(self.behind()) }
    }

    async fn wait_for_scope(&self, scope: &Scope, version: Version) -> Result<(), ApiError> {
        let mut folded = self.view.folded();
        let reached = folded
            .wait_for(|_| self.view.read(|projection| projection.state().source(scope).version >= version));
        match tokio::time::timeout(FOLD_WAIT_MAX, reached).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(self.behind()),
        }
    }

    fn behind(&self) -> ApiError {
        match self.view.fault() {
            Some(fault) => ApiError::from(&*fault),
            None => ApiError::Unavailable("this controller is behind the log; try again".into()),
        }
    }
}

/// The first expectation that does not hold.
fn stale(state: &RoutingState, changes: &[Change]) -> Option<ApiError> {
    // A rollout is one change, which rests on those that were asked for.
    let expectations = changes.iter().enumerate().flat_map(|(index, change)| {
        let own = (change.command.scope(), change.expected);
        let also = change.also.iter().cloned().enumerate();
        [(index, own)].into_iter().chain(also)
    });
    expectations.into_iter().find_map(|(index, (scope, expected))| {
        let current = state.source(&scope).version;
        let conflict = || ApiError::Conflict { change: None, scope, expected, current }.at_change(index);
        (!expected.admits(current)).then(conflict)
    })
}

/// What the log is asked to append for a request that was decided so.
///
/// # Errors
/// None in practice: every event has a JSON form.
pub fn append_request(request: &Request, decisions: &[Decision]) -> Result<AppendRequest, ApiError> {
    Ok(AppendRequest {
        command_id: request.command_id,
        fingerprint: Some(request.fingerprint),
        actor: request.actor.clone(),
        reason: request.reason.clone(),
        cause: None,
        scopes: scopes(decisions)?,
    })
}

/// What the log has to check and to add.
fn scopes(decisions: &[Decision]) -> Result<Vec<ScopeAppend>, ApiError> {
    let mut parts: BTreeMap<&Scope, ScopeAppend> = BTreeMap::new();
    for decision in decisions {
        let events: Result<Vec<_>, _> = decision.events.iter().map(new_event).collect();
        let expected = ExpectedVersion::exactly(decision.seen);
        let part = ScopeAppend { scope: decision.scope.to_string(), expected, events: events? };
        parts.insert(&decision.scope, part);
    }
    for (scope, version) in decisions.iter().flat_map(|decision| &decision.guards) {
        parts.entry(scope).or_insert_with(|| ScopeAppend {
            scope: scope.to_string(),
            expected: ExpectedVersion::exactly(*version),
            events: Vec::new(),
        });
    }
    // In the order of the batch, so that the events of one command stand in the log as they were asked for.
    let mut ordered: Vec<_> = decisions.iter().filter_map(|decision| parts.remove(&decision.scope)).collect();
    ordered.extend(parts.into_values());
    Ok(ordered)
}

fn new_event(event: &Event) -> Result<NewEvent, ApiError> {
    let payload = event.payload().map_err(|error| ApiError::Internal(error.to_string()))?;
    Ok(NewEvent { event_type: event.type_name().into(), schema: event.schema(), payload })
}

fn unchanged_or_planned(version: ConfigVersion, decisions: &[Decision]) -> Outcome {
    let scope = |decision: &Decision| ScopeOutcome {
        scope: decision.scope.clone(),
        version: Version(decision.seen.0 + decision.events.len() as u64),
        changed: !decision.events.is_empty(),
    };
    Outcome { version, scopes: decisions.iter().map(scope).collect(), repeated: false }
}
