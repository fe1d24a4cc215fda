//! One transaction per batch, in two network flights.
//!
//! Flight 1 begins, takes the log's lock and reads what changed since this process last wrote; then [`decide`] picks
//! the survivors in memory; flight 2 inserts them and commits. Within a flight the statements are pipelined but
//! separate: see [`LOCK_SQL`] for why they must be.
//!
//! Invariants:
//! - `heads` is true as of `known`, and is brought up to date under the lock before it is used.
//! - A commit is never cancelled, but by a shutdown that takes too long. When its outcome is unknown the session is
//!   dropped and the batch attempted again; what was committed is then found by its command id.
//! - Nothing is appended to a log that lacks an event that this process appended, or that a tail of it delivered.

use futures_util::future::{join3, join5};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Row, Statement};
use uuid::Uuid;
use weft_model::version::{Epoch, Position, Version};

use super::decide::{Decision, Ground, Outcome, decide};
use super::heads::ScopeHeads;
use super::{AppendError, Item};
use crate::epoch::{LOCK_SQL, LogTail, TAIL_SQL, decode_hash, decode_tail, establish};
use crate::event::UnixMicros;
use crate::hash::EventHash;
use crate::log::LogConfig;
use crate::read::{OUTCOMES_SQL, decode_outcome};
use crate::request::Appended;
use crate::session::{Access, Session, StoreError, within};
use crate::settings::{Settings, SettingsError, check_durable};
use crate::tail::Delivered;

/// Foreign events that are read to keep the cached heads; if other writers have added more, forgetting is cheaper.
const CATCH_UP_MAX: usize = 4_096;

/// A writer waits for the lock behind at most a few other nodes' batches. A holder that hangs in its transaction is
/// cut off by the server. A commit waits as long as the server wants it to.
const SESSION_SQL: &str = "set lock_timeout = '2s'; set idle_in_transaction_session_timeout = '5s'; \
                           set statement_timeout = 0";

/// How long everything may take that a batch is decided on: more than twice the wait for the lock, and the rest takes
/// milliseconds. The same bounds what a new session does before its first batch, which commits an epoch at most; if
/// that is cut off, the next session finds it.
const GROUND_MAX: Duration = Duration::from_secs(5);

/// The clock, the epoch, what stands where a tail has read, and the settings of
/// [`check_durable`](crate::settings::check_durable).
const NOW_SQL: &str = "select clock_timestamp(), (select max(epoch) from weft.log_epoch), \
     (select hash from weft.event where position = $1), current_setting('fsync'), \
     current_setting('full_page_writes'), current_setting('synchronous_commit')";

const CATCH_UP_SQL: &str = "select position, hash, recorded_at, scope, version from weft.event \
                            where position >= $1 order by position limit $2";

const HEADS_SQL: &str = "select wanted.scope, coalesce((select event.version from weft.event as event \
                         where event.scope = wanted.scope order by event.version desc limit 1), 0) \
                         from unnest($1::text[]) as wanted (scope)";

const INSERT_EVENTS_SQL: &str = "insert into weft.event (epoch, recorded_at, position, version, cause, command_id, \
     schema, hash, scope, type, actor, reason, payload) \
     select $1, $2, new.position, new.version, new.cause, new.command_id, new.schema, new.hash, new.scope, \
     new.type, new.actor, new.reason, new.payload::json \
     from unnest($3::bigint[], $4::bigint[], $5::bigint[], $6::uuid[], $7::smallint[], $8::bytea[], $9::text[], \
     $10::text[], $11::text[], $12::text[], $13::text[]) \
     as new (position, version, cause, command_id, schema, hash, scope, type, actor, reason, payload)";

const INSERT_OUTCOMES_SQL: &str = "insert into weft.command_outcome (epoch, recorded_at, command_id, \
     first_position, last_position, fingerprint) \
     select $1, $2, new.command_id, new.first_position, new.last_position, new.fingerprint \
     from unnest($3::uuid[], $4::bigint[], $5::bigint[], $6::bytea[]) \
     as new (command_id, first_position, last_position, fingerprint)";

/// The database cannot hold the log, or not now.
#[derive(Debug)]
pub(crate) enum Unusable {
    Store(StoreError),
    Unfit(SettingsError),
    NotMigrated,
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
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let code = error.sql_state().map_or("", SqlState::code);
        match (code.get(..2).unwrap_or_default(), code) {
            // A version that is taken means that the cache was stale; it is dropped before the next attempt.
            (_, "23505") => Self::Transient(error),
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
            Failure::Rewound { seen, found } => Self::Rewound { seen, found },
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

/// The only writer of this process.
pub(crate) struct Writer {
    config: LogConfig,
    live: Option<Live>,
    /// The last event known to be durable.
    known: LogTail,
    /// What the tails of this process have read.
    delivered: Delivered,
    heads: ScopeHeads,
    /// Set for good once the database was found to have lost one of the two.
    rewound: Option<(Position, Position)>,
}

/// A session that holds what is valid as long as it lives.
struct Live {
    session: Session,
    allow_unsafe: bool,
    now: Statement,
    catch_up: Statement,
    outcomes: Statement,
    heads: Statement,
    insert_events: Statement,
    insert_outcomes: Statement,
}

impl Writer {
    /// Connects, checks the server and opens an epoch if one is due.
    pub(crate) async fn open(config: LogConfig, delivered: Delivered) -> Result<Self, Unusable> {
        let (live, known) = Live::open(&config).await?;
        Ok(Self { config, live: Some(live), known, delivered, heads: ScopeHeads::default(), rewound: None })
    }

    /// Position of the last event known to be durable.
    pub(crate) fn position(&self) -> Position {
        self.known.position
    }

    /// Writes what can be accepted of a batch. After an error the next attempt starts from a new session.
    pub(super) async fn attempt(
        &mut self,
        batch: &[Item],
        attempted: &mut BTreeSet<Uuid>,
    ) -> Result<Written, Failure> {
        if let Some((seen, found)) = self.rewound {
            return Err(Failure::Rewound { seen, found });
        }
        let result = self.try_attempt(batch, attempted).await;
        if let Err(failure) = &result {
            self.live = None;
            self.heads.forget();
            if let Failure::Rewound { seen, found } = failure {
                self.rewound = Some((*seen, *found));
            }
        }
        result
    }

    async fn try_attempt(
        &mut self,
        batch: &[Item],
        attempted: &mut BTreeSet<Uuid>,
    ) -> Result<Written, Failure> {
        let live = match self.live.take() {
            Some(live) if !live.session.client.is_closed() => live,
            _ => Live::open(&self.config).await.map_err(reopen_failure)?.0,
        };
        let live = self.live.insert(live);
        let read = self.delivered.newest();
        let ground = live.ground(batch, &mut self.known, read, &mut self.heads);
        let ground = within(GROUND_MAX, ground).await??;
        let decision = decide(ground, batch.iter().map(|item| (&item.request, item.fingerprint)));
        attempted.extend(&decision.outcomes.command_id);
        live.commit(&decision).await?;

        let last = (decision.tail.position > self.known.position).then_some(decision.tail.position);
        self.known = decision.tail;
        for (scope, version) in &decision.heads {
            self.heads.learn(scope, *version);
        }
        let mut answers = decision.answers;
        for (item, answer) in batch.iter().zip(&mut answers) {
            // Only the first of several requests with one id was the one attempted.
            let first = attempted.remove(&item.request.command_id);
            if let Ok(appended) = answer {
                appended.repeated &= !first;
            }
        }
        Ok(Written { answers, last })
    }
}

fn reopen_failure(unusable: Unusable) -> Failure {
    match unusable {
        Unusable::Store(error) => Failure::from(error),
        Unusable::Unfit(error) => Failure::Final(StoreError::Unfit(error.into())),
        Unusable::NotMigrated => Failure::Final(StoreError::NotMigrated),
    }
}

impl Live {
    async fn open(config: &LogConfig) -> Result<(Self, LogTail), Unusable> {
        let session = Session::open(&config.connect, Access::ReadWrite).await.map_err(Unusable::Store)?;
        within(GROUND_MAX, Self::begin(config, session)).await.map_err(Unusable::Store)?
    }

    async fn begin(config: &LogConfig, session: Session) -> Result<(Self, LogTail), Unusable> {
        let settings = Settings::read(&session.client).await.map_err(Unusable::Store)?;
        settings.check(config.allow_unsafe_settings).map_err(Unusable::Unfit)?;
        if !migrated(&session).await.map_err(Unusable::Store)? {
            return Err(Unusable::NotMigrated);
        }
        Self::prepare(session, config.allow_unsafe_settings).await.map_err(Unusable::Store)
    }

    async fn prepare(session: Session, allow_unsafe: bool) -> Result<(Self, LogTail), StoreError> {
        let doing = StoreError::while_doing("prepare to append");
        let client = &session.client;
        client.batch_execute(SESSION_SQL).await.map_err(&doing)?;
        let (_, tail) = establish(client).await?;
        let now = client.prepare(NOW_SQL).await.map_err(&doing)?;
        let catch_up = client.prepare(CATCH_UP_SQL).await.map_err(&doing)?;
        let outcomes = client.prepare(OUTCOMES_SQL).await.map_err(&doing)?;
        let heads = client.prepare(HEADS_SQL).await.map_err(&doing)?;
        let insert_events = client.prepare(INSERT_EVENTS_SQL).await.map_err(&doing)?;
        let insert_outcomes = client.prepare(INSERT_OUTCOMES_SQL).await.map_err(&doing)?;
        let live =
            Self { session, allow_unsafe, now, catch_up, outcomes, heads, insert_events, insert_outcomes };
        Ok((live, tail))
    }

    /// Flight 1: locks the log and reads everything that the batch is decided on.
    async fn ground<'a>(
        &self,
        batch: &'a [Item],
        known: &mut LogTail,
        read: Option<(Position, EventHash)>,
        heads: &mut ScopeHeads,
    ) -> Result<Ground<'a>, Failure> {
        let client = &self.session.client;
        let parts = batch.iter().flat_map(|item| &item.request.scopes);
        let mut current: BTreeMap<&str, Option<Version>> =
            parts.map(|part| (part.scope.as_str(), heads.lookup(&part.scope))).collect();
        let unknown: Vec<&str> =
            current.iter().filter(|(_, version)| version.is_none()).map(|(scope, _)| *scope).collect();
        let ids: Vec<Uuid> = batch.iter().map(|item| item.request.command_id).collect();
        let since = known.position.0.cast_signed();
        let limit = CATCH_UP_MAX as i64;
        let read_at = read.map_or(0, |(position, _)| position.0.cast_signed());

        // Polled in this order, hence sent in this order; the lock comes first.
        let (locked, now, events, outcomes, looked_up) = join5(
            client.batch_execute(LOCK_SQL),
            client.query_one(&self.now, &[&read_at]),
            client.query(&self.catch_up, &[&since, &limit]),
            client.query(&self.outcomes, &[&ids]),
            client.query(&self.heads, &[&unknown]),
        )
        .await;
        locked.map_err(StoreError::while_doing("lock the log"))?;
        let now = now.map_err(StoreError::while_doing("read its clock"))?;
        let events = events.map_err(StoreError::while_doing("read the log's tail"))?;
        let outcomes = outcomes.map_err(StoreError::while_doing("look up command ids"))?;
        let looked_up = looked_up.map_err(StoreError::while_doing("look up scopes"))?;

        self.check_settings(&now)?;
        let Some((foreign, last)) = since_known(&events, known)? else {
            return Err(self.lost(known.position).await);
        };
        if let Some((position, hash)) = read
            && hash_at(&now)? != Some(hash)
        {
            return Err(self.lost(position).await);
        }
        overlay(&mut current, &looked_up);
        if events.len() < CATCH_UP_MAX {
            for row in foreign {
                let (scope, version): (&str, _) = (row.get(3), Version(row.get::<_, i64>(4).cast_unsigned()));
                heads.learn(scope, version);
                if let Some(current) = current.get_mut(scope) {
                    *current = Some(version);
                }
            }
            *known = last;
        } else {
            heads.forget();
            *known = self.tail().await?;
            let all: Vec<&str> = current.keys().copied().collect();
            let looked_up = client.query(&self.heads, &[&all]).await;
            overlay(&mut current, &looked_up.map_err(StoreError::while_doing("look up scopes"))?);
        }

        Ok(Ground {
            epoch: Epoch(now.get::<_, i64>(1).cast_unsigned()),
            tail: *known,
            now: UnixMicros::from_database(now.get(0)),
            heads: current.into_iter().map(|(scope, version)| (scope, version.unwrap_or_default())).collect(),
            outcomes: outcomes.iter().map(stored_outcome).collect::<Result<_, _>>()?,
        })
    }

    /// The settings may have been changed under the session.
    fn check_settings(&self, now: &Row) -> Result<(), Failure> {
        match check_durable([now.get(3), now.get(4), now.get(5)]) {
            Err(refused) if !self.allow_unsafe => Err(Failure::Final(StoreError::Unfit(refused.into()))),
            _ => Ok(()),
        }
    }

    async fn tail(&self) -> Result<LogTail, StoreError> {
        let row = self.session.client.query_opt(TAIL_SQL, &[]).await;
        let row = row.map_err(StoreError::while_doing("read the log's tail"))?;
        row.as_ref().map_or(Ok(LogTail::EMPTY), decode_tail)
    }

    /// The log lacks an event that this process has seen.
    async fn lost(&self, seen: Position) -> Failure {
        match self.tail().await {
            Ok(tail) => Failure::Rewound { seen, found: tail.position },
            Err(error) => error.into(),
        }
    }

    /// Flight 2: writes and commits. After an error the outcome is unknown.
    async fn commit(&self, decision: &Decision<'_>) -> Result<(), StoreError> {
        let client = &self.session.client;
        let (events, outcomes) = (&decision.events, &decision.outcomes);
        if events.position.is_empty() {
            return client.batch_execute("commit").await.map_err(StoreError::while_doing("release the log"));
        }
        let hashes: Vec<&[u8]> = events.hash.iter().map(|hash| hash.0.as_slice()).collect();
        let fingerprints: Vec<&[u8]> = outcomes.fingerprint.iter().map(<[u8; 32]>::as_slice).collect();
        let (inserted, remembered, committed) = join3(
            client.execute(
                &self.insert_events,
                &[
                    &events.epoch,
                    &events.recorded_at,
                    &events.position,
                    &events.version,
                    &events.cause,
                    &events.command_id,
                    &events.schema,
                    &hashes,
                    &events.scope,
                    &events.event_type,
                    &events.actor,
                    &events.reason,
                    &events.payload,
                ],
            ),
            client.execute(
                &self.insert_outcomes,
                &[
                    &events.epoch,
                    &events.recorded_at,
                    &outcomes.command_id,
                    &outcomes.first_position,
                    &outcomes.last_position,
                    &fingerprints,
                ],
            ),
            // After a failed insert this rolls back, and says so only by its tag; the inserts' results tell.
            client.batch_execute("commit"),
        )
        .await;
        inserted.map_err(StoreError::while_doing("insert events"))?;
        remembered.map_err(StoreError::while_doing("insert command outcomes"))?;
        committed.map_err(StoreError::while_doing("commit events"))
    }
}

/// Of the events from `known` on, those after it, and the last of them all; `None` if `known` is not there any more, as
/// it was.
fn since_known<'a>(events: &'a [Row], known: &LogTail) -> Result<Option<(&'a [Row], LogTail)>, StoreError> {
    let last = events.last().map(decode_tail).transpose()?.unwrap_or(LogTail::EMPTY);
    if known.position == Position::ZERO {
        return Ok(Some((events, last)));
    }
    let Some((first, foreign)) = events.split_first() else { return Ok(None) };
    Ok((decode_tail(first)? == *known).then_some((foreign, last)))
}

fn hash_at(now: &Row) -> Result<Option<EventHash>, StoreError> {
    now.get::<_, Option<&[u8]>>(2).map(decode_hash).transpose()
}

fn overlay(current: &mut BTreeMap<&str, Option<Version>>, rows: &[Row]) {
    for row in rows {
        if let Some(version) = current.get_mut(row.get::<_, &str>(0)) {
            *version = Some(Version(row.get::<_, i64>(1).cast_unsigned()));
        }
    }
}

fn stored_outcome(row: &Row) -> Result<(Uuid, Outcome), StoreError> {
    let outcome = decode_outcome(row)?;
    let appended = Appended { repeated: true, ..outcome.appended };
    Ok((outcome.command_id, Outcome { fingerprint: outcome.fingerprint, appended }))
}

async fn migrated(session: &Session) -> Result<bool, StoreError> {
    const SQL: &str = "select to_regclass('weft.command_outcome') is not null";
    let row = session.client.query_one(SQL, &[]).await;
    Ok(row.map_err(StoreError::while_doing("look for the log's tables"))?.get(0))
}
