//! What this process knows of the log, and the decision how a batch is written.
//!
//! As long as nobody else appends, what this process knows is what is true, and a batch is decided in memory and sent
//! ahead ([`Writer::send_ahead`]); the server checks the assumption under the lock. Where that cannot be, because somebody else
//! appended, a scope is new to this process or a command is repeated, the batch is decided under the lock
//! ([`Writer::attempt`]).
//!
//! Invariants:
//! - `heads` is true as of `ahead`: what is known to be durable, and what was sent after it. It is brought up to date under
//!   the lock or checked there before anything that rests on it counts.
//! - A commit is never cancelled, but by a shutdown that takes too long. When its outcome is unknown the session is
//!   dropped and the batch attempted again; what was committed is then found by its command id.
//! - Nothing is appended to a log that lacks an event that this process appended, or that a tail of it delivered.

use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use weft_model::version::{Epoch, Position, Version};

use super::decide::{Decision, Ground, decide};
use super::flight::{Attempts, Flight};
use super::heads::ScopeHeads;
use super::live::{Ahead, Assumed, Landed, Live};
use super::{AppendError, Item};
use crate::epoch::LogTail;
use crate::event::UnixMicros;
use crate::log::LogConfig;
use crate::partitions::Behind;
use crate::request::{Appended, Malformed};
use crate::session::StoreError;
use crate::settings::SettingsError;
use crate::tail::Delivered;

/// Batches in a row that nobody else's append came between, until batches are sent ahead again. Where two controllers are
/// busy, being refused every other time would cost more than deciding under the lock.
const ALONE_MIN: u32 = 8;
/// What the function behind [`Live::send`] refuses with.
const UNEXPECTED: &str = "WF001";

/// The database cannot hold the log, or not now.
#[derive(Debug)]
pub(crate) enum Unusable {
    Store(StoreError),
    Unfit(SettingsError),
}

/// Why a batch was not written.
#[derive(Debug)]
pub(super) enum Failure {
    /// May succeed when tried again. Whether it was written may be unknown.
    Transient(StoreError),
    /// The database refuses something in the batch.
    Content(StoreError),
    /// The database refuses the writer.
    Final(StoreError),
    /// Events that were durable are gone.
    Rewound { seen: Position, found: Position },
    /// So somebody else found, and nobody has decided yet.
    Standing { seen: Position, found: Position },
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let code = error.sql_state().map_or("", SqlState::code);
        match (code.get(..2).unwrap_or_default(), code) {
            // A version that is taken means that the cache was stale; it is dropped before the next attempt.
            (_, "23505") => Self::Transient(error),
            // No range for a position: the next session makes it. A check that does not hold has a name.
            (_, "23514") if error.constraint().is_none() => Self::Transient(error),
            // Data exception, constraint, program limit.
            ("22" | "23" | "54", _) => Self::Content(error),
            // Missing table or privilege.
            ("42", _) => Self::Final(error),
            _ => Self::Transient(error),
        }
    }
}

impl From<Failure> for AppendError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Transient(source) | Failure::Content(source) | Failure::Final(source) => {
                Self::Store(source)
            }
            Failure::Rewound { seen, found } | Failure::Standing { seen, found } => {
                Self::Rewound { seen, found }
            }
        }
    }
}

/// A batch is durable.
pub(super) struct Written {
    /// One per request, in order.
    pub(super) answers: Vec<Result<Appended, AppendError>>,
    /// The last position written; `None` if no event was.
    pub(super) last: Option<Position>,
}

/// The database's clock, as it was last told.
#[derive(Clone, Copy)]
struct Clock {
    told: UnixMicros,
    at: Instant,
}

impl Clock {
    fn now(self) -> UnixMicros {
        UnixMicros(
            self.told.0.saturating_add(i64::try_from(self.at.elapsed().as_micros()).unwrap_or(i64::MAX)),
        )
    }
}

/// What a batch can be decided on without asking; forgotten after every failure.
#[derive(Clone, Copy)]
struct Footing {
    epoch: Epoch,
    clock: Clock,
    /// Batches in a row that found the log as it was left.
    alone: u32,
}

/// The only writer of this process.
pub(crate) struct Writer {
    config: LogConfig,
    live: Option<Live>,
    /// The last event known to be durable.
    known: LogTail,
    /// The last event that was sent: `known`, but while batches are under way.
    ahead: LogTail,
    footing: Option<Footing>,
    /// What the tails of this process have read.
    delivered: Delivered,
    heads: ScopeHeads,
    behind: Arc<Behind>,
    /// Set for good once the database was found to have lost one of the two.
    rewound: Option<(Position, Position)>,
}

impl Writer {
    /// Connects, checks the server and opens an epoch if one is due. `behind` is kept up to date by whoever looks after
    /// the log's partitions.
    pub(crate) async fn open(
        config: LogConfig,
        delivered: Delivered,
        behind: Arc<Behind>,
    ) -> Result<Self, Unusable> {
        let (live, known) = Live::open(&config, &behind).await?;
        // A tail that begins late learns no epoch before the next event, and may have to say in which one it saw the last.
        delivered.in_epoch(live.epoch);
        Ok(Self {
            config,
            live: Some(live),
            known,
            ahead: known,
            footing: None,
            delivered,
            heads: ScopeHeads::default(),
            behind,
            rewound: None,
        })
    }

    /// Position of the last event known to be durable.
    pub(crate) fn position(&self) -> Position {
        self.known.position
    }

    /// Decides a batch on what is known and sends it behind those under way; gives it back if that cannot be.
    pub(super) async fn send_ahead(&mut self, items: Vec<Item>) -> Result<Flight, Vec<Item>> {
        let (Some(live), Some(footing)) = (&self.live, self.footing) else { return Err(items) };
        if live.is_closed() || footing.alone < ALONE_MIN {
            return Err(items);
        }
        let mut versions: BTreeMap<&str, Version> = BTreeMap::new();
        for part in items.iter().flat_map(|item| &item.request.scopes) {
            let Some(version) = self.heads.lookup(&part.scope) else { return Err(items) };
            versions.insert(&part.scope, version);
        }
        let now = footing.clock.now();
        let ground = Ground { epoch: footing.epoch, tail: self.ahead, now, outcomes: BTreeMap::new() };
        let Decision { rows, recorded, answers, tail } =
            decide(ground, &mut versions, items.iter().map(|item| (&item.request, item.fingerprint)));
        // How old a command is, a clock that was not asked cannot tell.
        if answers.iter().any(is_of_its_age) {
            return Err(items);
        }
        let doubted = items.iter().zip(&answers).filter(|(_, answer)| is_doubted(answer));
        let doubted = doubted.map(|(item, _)| item.request.command_id).collect();
        for (scope, version) in &versions {
            self.heads.learn(scope, *version);
        }
        let assumed = Assumed { tail: self.ahead, read: self.delivered.newest(), epoch: footing.epoch, now };
        let last = (tail.position > self.ahead.position).then_some(tail.position);
        let landing = live.send(assumed, Ahead { rows, recorded, tail }, doubted);
        self.ahead = tail;
        Ok(Flight::launch(items, answers, tail, last, landing).await)
    }

    /// A batch that was sent ahead is durable: completes its answers.
    pub(super) fn landed(&mut self, flight: &mut Flight, landed: &Landed) {
        self.known = flight.tail;
        if let Some(footing) = &mut self.footing {
            footing.clock = Clock { told: landed.now, at: Instant::now() };
        }
        for (item, answer) in flight.items.iter().zip(&mut flight.answers) {
            if is_doubted(answer)
                && let Some(outcome) = landed.outcomes.get(&item.request.command_id)
            {
                *answer = outcome.answer(item.fingerprint);
            }
        }
    }

    /// A batch that was sent ahead was not written, and so it is with those behind it. Says whether that is certain.
    pub(super) fn crashed(&mut self, error: &StoreError) -> bool {
        let refused = error.sql_state().is_some_and(|state| state.code() == UNEXPECTED);
        if !refused {
            self.live = None;
        }
        self.lose_footing();
        refused
    }

    fn lose_footing(&mut self) {
        self.footing = None;
        self.ahead = self.known;
        self.heads.forget();
    }

    /// Writes what can be accepted of a batch, deciding it under the lock. Nothing may be under way. After an error the
    /// next attempt starts from a new session.
    pub(super) async fn attempt(
        &mut self,
        batch: &[Item],
        attempted: &mut Attempts,
    ) -> Result<Written, Failure> {
        if let Some((seen, found)) = self.rewound {
            return Err(Failure::Rewound { seen, found });
        }
        let result = self.try_attempt(batch, attempted).await;
        if let Err(failure) = &result {
            self.live = None;
            self.lose_footing();
            if let Failure::Rewound { seen, found } = failure {
                self.rewound = Some((*seen, *found));
                let read = self.delivered.newest();
                let events = read.into_iter().chain([(self.known.position, self.known.hash)]);
                if let Some((position, hash)) = events.into_iter().find(|event| event.0 == *seen) {
                    self.delivered.tell_lost(position, hash);
                }
            }
        }
        result
    }

    async fn try_attempt(&mut self, batch: &[Item], attempted: &mut Attempts) -> Result<Written, Failure> {
        let live = match self.live.take() {
            Some(live) if !live.is_closed() => live,
            _ => Live::open(&self.config, &self.behind).await.map_err(reopen_failure)?.0,
        };
        let live = self.live.insert(live);
        let read = self.delivered.newest();
        let mut read = live.ground(batch, &mut self.known, read, &mut self.heads).await?;
        let alone = if read.foreign { 0 } else { self.footing.map_or(0, |footing| footing.alone) + 1 };
        let clock = Clock { told: read.ground.now, at: Instant::now() };
        self.delivered.in_epoch(read.ground.epoch);
        self.footing = Some(Footing { epoch: read.ground.epoch, clock, alone });
        let requests = batch.iter().map(|item| (&item.request, item.fingerprint));
        let decision = decide(read.ground, &mut read.heads, requests);
        for (item, answer) in batch.iter().zip(&decision.answers) {
            attempted.note(item.request.command_id, answer);
        }
        live.commit(&decision.rows, decision.tail).await?;

        let last = (decision.tail.position > self.known.position).then_some(decision.tail.position);
        self.known = decision.tail;
        self.ahead = decision.tail;
        for (scope, version) in &read.heads {
            self.heads.learn(scope, *version);
        }
        let mut answers = decision.answers;
        for (item, answer) in batch.iter().zip(&mut answers) {
            if let Ok(appended) = answer {
                appended.repeated &= !attempted.settle(item.request.command_id, appended);
            }
        }
        Ok(Written { answers, last })
    }
}

/// Whether a request that records nothing may have been recorded before, which only the log knows: one that is refused, or only
/// guards.
const fn is_doubted(answer: &Result<Appended, AppendError>) -> bool {
    matches!(answer, Err(AppendError::Conflict { .. }) | Ok(Appended { positions: None, .. }))
}

/// Whether a request is refused because of when its id was made.
const fn is_of_its_age(answer: &Result<Appended, AppendError>) -> bool {
    matches!(
        answer,
        Err(AppendError::CommandIdExpired | AppendError::Malformed(Malformed::CommandIdFuture(_)))
    )
}

fn reopen_failure(unusable: Unusable) -> Failure {
    match unusable {
        Unusable::Store(error) => Failure::from(error),
        Unusable::Unfit(error) => Failure::Final(StoreError::Unfit(error.into())),
    }
}
