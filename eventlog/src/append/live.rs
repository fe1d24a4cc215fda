//! A session that appends: its prepared statements, and the two ways to write a batch with them.
//!
//! - *Under the lock*, in two network flights: [`Live::ground`] begins, takes the log's lock and reads everything that a
//!   batch is decided on; [`Live::commit`] inserts and commits. Always right, whoever else writes.
//! - *Ahead of it*, in one flight: [`Live::send`] sends a batch that was decided on what this process knows, together with
//!   what it takes for granted ([`Assumed`]); the server checks that under the lock, or ends the transaction.
//!
//! Within a flight the statements are pipelined but separate: see [`LOCK_SQL`] for why they must be.

use futures_util::future::{Either, join, join3, join5, select};
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};
use uuid::Uuid;
use weft_model::version::{Epoch, Position, Version};

use super::Item;
use super::columns::{MARKS_FORMAT, Rows};
use super::decide::{Ground, Outcome};
use super::heads::ScopeHeads;
use super::writer::{Failure, Unusable};
use crate::epoch::{LOCK_SQL, LogTail, TAIL_SQL, decode_hash, decode_tail, establish};
use crate::event::UnixMicros;
use crate::hash::EventHash;
use crate::log::LogConfig;
use crate::partitions::{self, Behind};
use crate::read::{OUTCOMES_SQL, decode_outcome};
use crate::request::Appended;
use crate::rewind::STANDING_SQL;
use crate::session::{Duty, Session, StoreError, within};
use crate::settings::{Settings, check_durable};

/// Foreign events that are read to keep the cached heads; if other writers have added more, forgetting is cheaper.
const CATCH_UP_MAX: usize = 4_096;

/// A writer waits for the lock behind at most a few other nodes' batches. A holder that hangs in its transaction (a process that was
/// stopped) is cut off by the server before those who wait give up, so that they only wait. A commit waits as long as the server
/// wants it to.
const SESSION_SQL: &str = "set lock_timeout = '2s'; set idle_in_transaction_session_timeout = '1500ms'; \
                           set statement_timeout = 0";

/// How long everything may take that a batch is decided on: more than twice the wait for the lock, and the rest takes
/// milliseconds. The same bounds what a new session does before its first batch, which commits an epoch at most; if
/// that is cut off, the next session finds it.
const GROUND_MAX: Duration = Duration::from_secs(5);

/// The clock, the epoch, what stands where a tail has read (what is sealed stands as it was), the settings of
/// [`check_durable`], and up to where the log is sealed.
const NOW_SQL: &str = "select clock_timestamp(), (select max(epoch) from weft.log_epoch), \
     coalesce((select hash from weft.event where position = $1), \
     (select $2::bytea from weft.log_segment where last_position >= $1 limit 1)), current_setting('fsync'), \
     current_setting('full_page_writes'), current_setting('synchronous_commit'), \
     (select coalesce(max(last_position), 0) from weft.log_segment)";

const CATCH_UP_SQL: &str = "select position, hash, recorded_at, scope, version from weft.event \
                            where position >= $1 order by position limit $2";

/// Of a scope that is not in the newest ranges, those after `$2`, the version is kept beside them.
const HEADS_SQL: &str = "select wanted.scope, coalesce(\
     (select event.version from weft.event as event where event.scope = wanted.scope and event.position > $2 \
     order by event.version desc limit 1), \
     (select head.version from weft.scope_head as head where head.scope = wanted.scope), 0) \
     from unnest($1::text[]) as wanted (scope)";

/// See the function in `migrations/0007_marks.sql`.
const EXPECT_SQL: &str = "select weft.expect_ground($1, $2, $3, $4, $5, $6, $7, $8, $9)";

/// One statement, so that events and what testifies about them are written together or not at all, whatever fails.
const INSERT_SQL: &str = "with events as (insert into weft.event (epoch, recorded_at, position, version, cause, command_id, \
     fingerprint, command_events, schema, hash, scope, type, actor, reason, payload) \
     select $1, $2, new.position, new.version, new.cause, new.command_id, new.fingerprint, new.command_events, \
     new.schema, new.hash, new.scope, new.type, new.actor, new.reason, new.payload::json \
     from unnest($3::bigint[], $4::bigint[], $5::bigint[], $6::uuid[], $7::bytea[], $8::integer[], $9::smallint[], \
     $10::bytea[], $11::text[], $12::text[], $13::text[], $14::text[], $15::text[]) \
     as new (position, version, cause, command_id, fingerprint, command_events, schema, hash, scope, type, actor, \
     reason, payload)) \
     insert into weft.log_batch (epoch, recorded_at, first_position, last_position, hash, commands_hash, marks, \
     marks_format) values ($1, $2, $16, $17, $18, $19, $20, $21)";

/// What a batch that is sent ahead takes for granted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Assumed {
    /// Where the log ends.
    pub(super) tail: LogTail,
    /// What a tail of this process has read.
    pub(super) read: Option<(Position, EventHash)>,
    /// The epoch that is open.
    pub(super) epoch: Epoch,
    /// What the database's clock shows.
    pub(super) now: UnixMicros,
}

/// What a batch that is sent ahead adds.
pub(super) struct Ahead {
    pub(super) rows: Rows,
    /// The ids of the commands in `rows`.
    pub(super) recorded: Vec<Uuid>,
    /// Where the log then ends.
    pub(super) tail: LogTail,
}

/// A batch that was sent ahead is durable.
#[derive(Debug)]
pub(super) struct Landed {
    /// The database's clock, under the lock.
    pub(super) now: UnixMicros,
    /// Outcomes of those commands that were asked for and had been accepted before.
    pub(super) outcomes: BTreeMap<Uuid, Outcome>,
}

/// What was read under the lock.
pub(super) struct Read<'a> {
    pub(super) ground: Ground,
    pub(super) heads: BTreeMap<&'a str, Version>,
    /// Whether another process appended since this one last looked.
    pub(super) foreign: bool,
}

/// The scopes of a batch and their versions, as far as they are known.
type Current<'a> = BTreeMap<&'a str, Option<Version>>;

/// See the module's documentation.
pub(super) struct Live {
    session: Session,
    /// The epoch that was open when this session began.
    pub(super) epoch: Epoch,
    allow_unsafe: bool,
    statements: Arc<Statements>,
    /// Kept up to date by [`partitions`].
    behind: Arc<Behind>,
}

struct Statements {
    now: Statement,
    catch_up: Statement,
    outcomes: Statement,
    heads: Statement,
    expect: Statement,
    insert: Statement,
}

impl Live {
    /// Connects, checks the server, opens an epoch if one is due, and makes room for what is to come.
    pub(super) async fn open(config: &LogConfig, behind: &Arc<Behind>) -> Result<(Self, LogTail), Unusable> {
        let session = Session::open(&config.connect, Duty::Append).await.map_err(Unusable::Store)?;
        within(GROUND_MAX, Self::begin(config, session, behind)).await.map_err(Unusable::Store)?
    }

    async fn begin(
        config: &LogConfig,
        session: Session,
        behind: &Arc<Behind>,
    ) -> Result<(Self, LogTail), Unusable> {
        let settings = Settings::read(&session.client).await.map_err(Unusable::Store)?;
        settings.check(config.allow_unsafe_settings).map_err(Unusable::Unfit)?;
        migrated(&session).await.map_err(Unusable::Store)?;
        Self::prepare(session, config.allow_unsafe_settings, behind).await.map_err(Unusable::Store)
    }

    async fn prepare(
        session: Session,
        allow_unsafe: bool,
        behind: &Arc<Behind>,
    ) -> Result<(Self, LogTail), StoreError> {
        let doing = StoreError::while_doing("prepare to append");
        let client = &session.client;
        client.batch_execute(SESSION_SQL).await.map_err(&doing)?;
        let (epoch, tail) = establish(client).await?;
        let room = partitions::make(client).await?;
        behind.learn(room);
        let statements = Statements {
            now: client.prepare(&format!("{NOW_SQL}, {STANDING_SQL}")).await.map_err(&doing)?,
            catch_up: client.prepare(CATCH_UP_SQL).await.map_err(&doing)?,
            outcomes: client.prepare(OUTCOMES_SQL).await.map_err(&doing)?,
            heads: client.prepare(HEADS_SQL).await.map_err(&doing)?,
            expect: client.prepare(EXPECT_SQL).await.map_err(&doing)?,
            insert: client.prepare(INSERT_SQL).await.map_err(&doing)?,
        };
        let (statements, behind) = (Arc::new(statements), Arc::clone(behind));
        Ok((Self { session, epoch, allow_unsafe, statements, behind }, tail))
    }

    pub(super) fn is_closed(&self) -> bool {
        self.session.client.is_closed()
    }

    /// Sends a batch ahead. What is returned must be polled once before anything else is sent, and resolves once the batch
    /// is durable. `doubted` are commands that would be refused, unless they were accepted before. After an error nothing
    /// of it was written, or its outcome is unknown.
    pub(super) fn send(
        &self,
        assumed: Assumed,
        decision: Ahead,
        doubted: Vec<Uuid>,
    ) -> impl Future<Output = Result<Landed, StoreError>> + Send + 'static {
        let (client, statements) = (Arc::clone(&self.session.client), Arc::clone(&self.statements));
        let searched = self.behind.commands_after(decision.recorded.iter().chain(&doubted));
        let allow_unsafe = self.allow_unsafe;
        async move {
            let Ahead { rows, recorded, tail } = decision;
            let (known, hash) = (signed(assumed.tail.position), assumed.tail.hash.0.as_slice());
            let (read_at, read_hash) = read_params(assumed.read.as_ref());
            let epoch = assumed.epoch.0.cast_signed();
            let now = assumed.now.to_database();
            let expect: [&(dyn ToSql + Sync); 9] =
                [&known, &hash, &read_at, &read_hash, &epoch, &recorded, &searched, &now, &allow_unsafe];
            // Polled in this order, hence sent in this order.
            let ground = async {
                let asked = join3(
                    client.batch_execute(LOCK_SQL),
                    client.query_one(&statements.expect, &expect),
                    look_up(&client, &statements, &doubted, searched),
                );
                let (locked, now, outcomes) = within(GROUND_MAX, asked).await?;
                locked.map_err(StoreError::while_doing("lock the log"))?;
                let now = now.map_err(StoreError::while_doing("find the log as it was left"))?;
                let outcomes = outcomes.map_err(StoreError::while_doing("look up command ids"))?;
                let outcomes = outcomes.iter().map(stored_outcome).collect::<Result<_, _>>()?;
                Ok(Landed { now: UnixMicros::from_database(now.get(0)), outcomes })
            };
            // What is wrong with the ground is why nothing was written, whichever of the two is known first.
            let written = write(&client, &statements, &rows, tail);
            match select(pin!(ground), pin!(written)).await {
                Either::Left((landed, written)) => {
                    let landed = landed?;
                    written.await?;
                    Ok(landed)
                }
                Either::Right((written, ground)) => {
                    let landed = ground.await?;
                    written?;
                    Ok(landed)
                }
            }
        }
    }

    /// Flight 1: locks the log and reads everything that the batch is decided on.
    pub(super) async fn ground<'a>(
        &self,
        batch: &'a [Item],
        known: &mut LogTail,
        read: Option<(Position, EventHash)>,
        heads: &mut ScopeHeads,
    ) -> Result<Read<'a>, Failure> {
        within(GROUND_MAX, self.read_ground(batch, known, read, heads)).await?
    }

    async fn read_ground<'a>(
        &self,
        batch: &'a [Item],
        known: &mut LogTail,
        read: Option<(Position, EventHash)>,
        heads: &mut ScopeHeads,
    ) -> Result<Read<'a>, Failure> {
        let (client, statements) = (&self.session.client, &self.statements);
        let parts = batch.iter().flat_map(|item| &item.request.scopes);
        let mut current: Current<'_> =
            parts.map(|part| (part.scope.as_str(), heads.lookup(&part.scope))).collect();
        let unknown: Vec<&str> =
            current.iter().filter(|(_, version)| version.is_none()).map(|(scope, _)| *scope).collect();
        let ids: Vec<Uuid> = batch.iter().map(|item| item.request.command_id).collect();
        let (since, limit) = (signed(known.position), CATCH_UP_MAX as i64);
        let (read_at, read_hash) = read_params(read.as_ref());
        let (searched, closed) = (self.behind.commands_after(&ids), self.behind.closed());

        // Polled in this order, hence sent in this order; the lock comes first.
        let (locked, now, events, outcomes, looked_up) = join5(
            client.batch_execute(LOCK_SQL),
            client.query_one(&statements.now, &[&read_at, &read_hash]),
            client.query(&statements.catch_up, &[&since, &limit]),
            client.query(&statements.outcomes, &[&ids, &searched]),
            client.query(&statements.heads, &[&unknown, &closed]),
        )
        .await;
        locked.map_err(StoreError::while_doing("lock the log"))?;
        let now = now.map_err(StoreError::while_doing("read its clock"))?;
        let events = events.map_err(StoreError::while_doing("read the log's tail"))?;
        let outcomes = outcomes.map_err(StoreError::while_doing("look up command ids"))?;
        let looked_up = looked_up.map_err(StoreError::while_doing("look up scopes"))?;

        self.check_settings(&now)?;
        if let Some((position, hash)) = read
            && hash_at(&now)? != Some(hash)
        {
            return Err(self.lost(position).await);
        }
        if let Some(rewind) = now.get::<_, Option<i64>>(7) {
            return Err(self.standing(rewind).await);
        }
        overlay(&mut current, &looked_up);
        let sealed = Position(now.get::<_, i64>(6).cast_unsigned());
        let foreign = self.catch_up(&events, sealed, known, heads, &mut current).await?;

        let ground = Ground {
            epoch: Epoch(now.get::<_, i64>(1).cast_unsigned()),
            tail: *known,
            now: UnixMicros::from_database(now.get(0)),
            outcomes: outcomes.iter().map(stored_outcome).collect::<Result<_, _>>()?,
        };
        let versions = current.into_iter().map(|(scope, version)| (scope, version.unwrap_or_default()));
        Ok(Read { ground, heads: versions.collect(), foreign })
    }

    /// Brings what is known to the log's end: `known`, the cached heads, and the versions of the batch's scopes. Says whether
    /// another process appended.
    async fn catch_up(
        &self,
        events: &[Row],
        sealed: Position,
        known: &mut LogTail,
        heads: &mut ScopeHeads,
        current: &mut Current<'_>,
    ) -> Result<bool, Failure> {
        // From the event that is known on, rows have no gap; from the beginning of the log they have, once any are sealed.
        let whole = known.position > Position::ZERO || sealed == Position::ZERO;
        let since = since_known(events, known)?;
        // What is not sealed stands where it stood, however much others have appended since.
        if since.is_none() && known.position > sealed {
            return Err(self.lost(known.position).await);
        }
        if let Some((foreign, last)) = since.filter(|_| whole && events.len() < CATCH_UP_MAX) {
            for row in foreign {
                let (scope, version): (&str, _) = (row.get(3), Version(row.get::<_, i64>(4).cast_unsigned()));
                heads.learn(scope, version);
                if let Some(current) = current.get_mut(scope) {
                    *current = Some(version);
                }
            }
            *known = last;
            return Ok(!foreign.is_empty());
        }
        // Too far behind to follow, so far perhaps that what it knew is sealed.
        heads.forget();
        *known = self.tail().await?;
        let all: Vec<&str> = current.keys().copied().collect();
        let closed = self.behind.closed();
        let looked_up = self.session.client.query(&self.statements.heads, &[&all, &closed]).await;
        overlay(current, &looked_up.map_err(StoreError::while_doing("look up scopes"))?);
        Ok(true)
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

    /// Somebody has seen an event that the log lacks.
    async fn standing(&self, rewind: i64) -> Failure {
        const SQL: &str = "select seen_position, found_position from weft.log_rewind where id = $1";
        let position = |row: &Row, column| Position(row.get::<_, i64>(column).cast_unsigned());
        match self.session.client.query_one(SQL, &[&rewind]).await {
            Ok(row) => Failure::Standing { seen: position(&row, 0), found: position(&row, 1) },
            Err(error) => StoreError::while_doing("read how the log was rewound")(error).into(),
        }
    }

    /// Flight 2: writes and commits. After an error the outcome is unknown.
    pub(super) async fn commit(&self, rows: &Rows, tail: LogTail) -> Result<(), StoreError> {
        write(&self.session.client, &self.statements, rows, tail).await
    }
}

async fn look_up(
    client: &Client,
    statements: &Statements,
    ids: &[Uuid],
    after: i64,
) -> Result<Vec<Row>, tokio_postgres::Error> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    client.query(&statements.outcomes, &[&ids, &after]).await
}

/// Inserts, if there is anything to insert, and commits.
async fn write(
    client: &Client,
    statements: &Statements,
    rows: &Rows,
    tail: LogTail,
) -> Result<(), StoreError> {
    if rows.is_empty() {
        return client.batch_execute("commit").await.map_err(StoreError::while_doing("release the log"));
    }
    let recorded_at = rows.recorded_at.to_database();
    let (first, last) = (signed(rows.first), signed(tail.position));
    let (hash, commands) = (tail.hash.0.as_slice(), rows.commands_hash().0);
    let (commands, marks) = (commands.as_slice(), rows.marks.as_slice());
    let values: [&(dyn ToSql + Sync); 21] = [
        &rows.epoch,
        &recorded_at,
        &rows.position,
        &rows.version,
        &rows.cause,
        &rows.command_id,
        &rows.fingerprint,
        &rows.command_events,
        &rows.schema,
        &rows.hash,
        &rows.scope,
        &rows.event_type,
        &rows.actor,
        &rows.reason,
        &rows.payload,
        &first,
        &last,
        &hash,
        &commands,
        &marks,
        &MARKS_FORMAT,
    ];
    let (inserted, committed) = join(
        client.execute(&statements.insert, &values),
        // After a failed insert this rolls back, and says so only by its tag; the insert's result tells.
        client.batch_execute("commit"),
    )
    .await;
    inserted.map_err(StoreError::while_doing("insert events"))?;
    committed.map_err(StoreError::while_doing("commit events"))
}

fn signed(position: Position) -> i64 {
    position.0.cast_signed()
}

fn read_params(read: Option<&(Position, EventHash)>) -> (i64, Option<&[u8]>) {
    read.map_or((0, None), |(position, hash)| (signed(*position), Some(hash.0.as_slice())))
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

fn overlay(current: &mut Current<'_>, rows: &[Row]) {
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

async fn migrated(session: &Session) -> Result<(), StoreError> {
    const SQL: &str = "select from pg_catalog.pg_class as class join pg_catalog.pg_namespace as schema \
                       on schema.oid = class.relnamespace where schema.nspname = 'weft' and class.relname = 'log_batch'";
    let row = session.client.query_opt(SQL, &[]).await;
    let row = row.map_err(StoreError::while_doing("look for the log's tables"))?;
    row.map(|_| ()).ok_or(StoreError::NotMigrated)
}
