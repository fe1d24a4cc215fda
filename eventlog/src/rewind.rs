//! A log that lost its end: what was seen of it outside the database, what was found, and the way on.
//!
//! Whoever has seen an event can say so later ([`Point`]), and the log is asked whether it is still there
//! ([`Reader::check_seen`]). If it is not, that is a *finding* ([`report_rewind`]): a row in the database that stops the
//! appends of every process, because going on would give the same positions to other events unnoticed. An operator looks,
//! restores what was lost if that can be, or *adopts* the log as it is ([`adopt`]): the findings are settled, and what comes
//! belongs to an epoch above every one that was ever seen.
//!
//! Invariants:
//! - Findings and adoptions are recorded under the log's lock, so an append is either before a finding or refused by it.
//! - A finding stands if its id is larger than what every adoption settles ([`STANDING_SQL`]).
//! - What belongs to a history that was given up is no finding again: an epoch before that of an adoption, and a position
//!   after its fork or within what its findings had seen.
//!
//! Deliberately absent: how a witness is made, carried and believed (the API's), and what was in the lost events.
//!
//! Called by the controller and the projector. Read `tests/sql/rewind.rs`.

use std::time::Duration;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};
use weft_model::version::{ConfigVersion, Epoch, Position};

use crate::epoch::{LOCK_SQL, LogTail, TAIL_SQL, decode_hash, decode_tail, open_epoch, read_lineage};
use crate::event::UnixMicros;
use crate::hash::EventHash;
use crate::read::{Anchor, Reader};
use crate::session::{Duty, Session, StoreError, within};

/// The oldest finding that stands, or null: a scalar for a statement that reads what an append is decided on.
pub(crate) const STANDING_SQL: &str = "(select min(id) from weft.log_rewind where id > \
     (select coalesce(max(rewind_upto), 0) from weft.log_adoption))";

/// Columns of [`decode_rewind`], of the findings that stand.
pub(crate) const REWINDS_SQL: &str = "select id, seen_epoch, seen_position, seen_hash, found_epoch, found_position, \
     found_hash, witness, reported_at from weft.log_rewind where id > \
     (select coalesce(max(rewind_upto), 0) from weft.log_adoption) order by id";

/// Whether what was seen at (`$1`, `$2`) belongs to a history that was given up.
pub(crate) const GIVEN_UP_SQL: &str = "select exists (select from weft.log_adoption as adoption \
     where $1::bigint < adoption.epoch and ($2::bigint > adoption.fork_position or exists (select from weft.log_rewind as rewind \
     where rewind.id <= adoption.rewind_upto and (rewind.seen_epoch, rewind.seen_position) >= ($1, $2))))";

/// Columns of [`decode_adoption`], of the newest one.
pub(crate) const ADOPTION_SQL: &str = "select id, rewind_upto, epoch, fork_position, actor, reason, adopted_at \
     from weft.log_adoption order by id desc limit 1";

/// Findings that are recorded beside each other while they stand: names enough to go and ask. One that saw more of the log
/// than all of them is always recorded.
const STANDING_MAX: i64 = 16;
/// How long recording a finding or an adoption may take: it waits for the log's lock as an appender does.
const RECORD_MAX: Duration = Duration::from_secs(10);
const SESSION_SQL: &str = "set lock_timeout = '5s'; set idle_in_transaction_session_timeout = '5s'";

/// An event that somebody saw in the log. Its hash stands for everything before it, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// The epoch that it was seen in: its own, or a later one.
    pub epoch: Epoch,
    /// Its position.
    pub position: Position,
    /// Its chain hash.
    pub hash: EventHash,
}

impl Point {
    /// As people quote it.
    #[must_use]
    pub const fn version(&self) -> ConfigVersion {
        ConfigVersion::new(self.epoch, self.position)
    }
}

/// What became of an event that somebody saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// It is there.
    Stands,
    /// Not there, but the server that was asked is a standby, which may not have got so far yet.
    NotYet,
    /// Not there, and settled: it belongs to a history that an adoption gave up.
    GivenUp,
    /// Not there: the log was rewound.
    Lost {
        /// Where the log ends.
        found: Position,
    },
}

/// A finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewind {
    /// Its number.
    pub id: u64,
    /// What was seen.
    pub seen: Point,
    /// The epoch that was open, and where the log ended, when it was looked for.
    pub found: ConfigVersion,
    /// What stands at the position; none if nothing does, or something sealed.
    pub found_hash: Option<EventHash>,
    /// Who has seen it.
    pub witness: String,
    /// When it was recorded.
    pub reported_at: UnixMicros,
}

/// What became of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    /// The event is there after all.
    Stands,
    /// The server that is read from is a standby, which may not have got so far yet. Report again later.
    NotYet,
    /// It belongs to a history that was given up.
    GivenUp,
    /// A finding that covers it stands already.
    Known,
    /// It is a finding now.
    Recorded,
}

/// What an operator decides.
#[derive(Clone, Debug)]
pub struct Adopt {
    /// The largest number of a finding that the operator has looked at.
    pub rewind_upto: u64,
    /// Who decides.
    pub actor: String,
    /// Why.
    pub reason: String,
}

/// A decision to go on with the log as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adoption {
    /// Its number.
    pub id: u64,
    /// The largest number of a finding that it settles.
    pub rewind_upto: u64,
    /// The epoch that it opened.
    pub epoch: Epoch,
    /// The last position that both histories can have in common.
    pub fork_position: Position,
    /// Who decided.
    pub actor: String,
    /// Why.
    pub reason: String,
    /// When.
    pub adopted_at: UnixMicros,
}

/// Why the log is not adopted.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// No finding stands, and none of that number was settled.
    #[error("the log was not found to be rewound, so there is nothing to adopt")]
    Nothing,
    /// Somebody else was faster.
    #[error("{} adopted the log already, as epoch {}: {}", adoption.actor, adoption.epoch, adoption.reason)]
    Settled {
        /// That decision.
        adoption: Box<Adoption>,
    },
    /// More was lost than the operator has looked at.
    #[error("more was lost than was looked at: {seen} was seen meanwhile; look again")]
    More {
        /// The newest that was seen.
        seen: ConfigVersion,
    },
    /// The store failed. Whether the log was adopted may be unknown; asking again tells.
    #[error("the log's store failed")]
    Store(#[from] StoreError),
}

impl Reader {
    /// What became of an event that somebody saw.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn check_seen(&self, seen: &Point) -> Result<Seen, StoreError> {
        let found = match self.anchor(seen.position).await? {
            Anchor::Stands { hash, .. } if hash == seen.hash => return Ok(Seen::Stands),
            Anchor::NotYet => return Ok(Seen::NotYet),
            Anchor::Stands { end, .. } | Anchor::Gone { end } => end,
        };
        let given_up = self.given_up(seen).await?;
        Ok(if given_up { Seen::GivenUp } else { Seen::Lost { found } })
    }
}

/// Records that an event which somebody saw is not in the log, unless that is known or not so.
///
/// # Errors
/// If the store fails. Reporting again is safe.
pub async fn report_rewind(reader: &Reader, seen: &Point, witness: &str) -> Result<Reported, StoreError> {
    // What is sealed does not change, so that it differs needs no lock to be known.
    match reader.check_seen(seen).await? {
        Seen::Stands => return Ok(Reported::Stands),
        Seen::GivenUp => return Ok(Reported::GivenUp),
        Seen::NotYet => return Ok(Reported::NotYet),
        Seen::Lost { .. } => {}
    }
    let session = Session::open(reader.config(), Duty::Append).await?;
    within(RECORD_MAX, record(&session.client, seen, witness)).await?
}

async fn record(client: &Client, seen: &Point, witness: &str) -> Result<Reported, StoreError> {
    const SAID_SQL: &str = "select count(*), coalesce(bool_or((seen_epoch, seen_position) >= ($1, $2)), false), \
         coalesce(bool_or((seen_epoch, seen_position) >= ($1, $2) and (witness = $4 or seen_hash = $3)), false) \
         from weft.log_rewind where id > (select coalesce(max(rewind_upto), 0) from weft.log_adoption)";
    const INSERT_SQL: &str = "insert into weft.log_rewind (seen_epoch, seen_position, seen_hash, found_epoch, \
         found_position, found_hash, witness, reported_at) select $1, $2, $3, \
         (select coalesce(max(epoch), 0) from weft.log_epoch), $5, $6, $4, clock_timestamp()";
    let doing = StoreError::while_doing("record that the log was rewound");
    let tail = lock(client).await?;
    let (epoch, position) = (signed(seen.epoch.0), signed(seen.position.0));
    let here = client.query_opt("select hash from weft.event where position = $1", &[&position]).await;
    let here = here.map_err(&doing)?;
    let found = here.map(|row| decode_hash(row.get(0))).transpose()?;
    if found == Some(seen.hash) {
        return end(client, Reported::Stands).await;
    }
    let given_up = client.query_one(GIVEN_UP_SQL, &[&epoch, &position]).await.map_err(&doing)?;
    if given_up.get(0) {
        return end(client, Reported::GivenUp).await;
    }
    let hash = seen.hash.0.as_slice();
    let said = client.query_one(SAID_SQL, &[&epoch, &position, &hash, &witness]).await.map_err(&doing)?;
    let (count, covered, same): (i64, bool, bool) = (said.get(0), said.get(1), said.get(2));
    if same || (covered && count >= STANDING_MAX) {
        return end(client, Reported::Known).await;
    }
    let (end_position, found) = (signed(tail.position.0), found.map(|hash| hash.0.to_vec()));
    let params: [&(dyn ToSql + Sync); 6] = [&epoch, &position, &hash, &witness, &end_position, &found];
    client.execute(INSERT_SQL, &params).await.map_err(&doing)?;
    let reported = end(client, Reported::Recorded).await?;
    tracing::error!(seen = %seen.version(), found = %tail.position, witness,
        "LOG_REWOUND: an event that was seen is not in the log; nothing is appended until an operator decides");
    Ok(reported)
}

/// Settles every finding that stands, if none saw more of the log than those up to `rewind_upto`, and opens an epoch well above
/// all that were ever seen. The same decision repeated is answered as before.
///
/// # Errors
/// See [`AdoptError`].
pub async fn adopt(reader: &Reader, adopt: &Adopt) -> Result<Adoption, AdoptError> {
    let session = Session::open(reader.config(), Duty::Append).await?;
    within(RECORD_MAX, settle(&session.client, adopt)).await?
}

async fn settle(client: &Client, adopt: &Adopt) -> Result<Adoption, AdoptError> {
    let doing = StoreError::while_doing("adopt the log as it is");
    let tail = lock(client).await?;
    let rows = client.query(REWINDS_SQL, &[]).await.map_err(&doing)?;
    let standing = rows.iter().map(decode_rewind).collect::<Result<Vec<_>, _>>()?;
    let looked_at = standing.iter().filter(|rewind| rewind.id <= adopt.rewind_upto);
    let newest =
        |rewinds: &mut dyn Iterator<Item = &Rewind>| rewinds.map(|rewind| rewind.seen.version()).max();
    let Some(seen) = newest(&mut standing.iter()) else {
        return Err(settled(client, adopt).await?);
    };
    if newest(&mut looked_at.into_iter()) < Some(seen) {
        return Err(AdoptError::More { seen });
    }
    let epoch = epoch_above(client, &standing).await?;
    let lineage = read_lineage(client).await?;
    open_epoch(client, epoch, &lineage, &tail).await?;
    let adoption = insert(client, adopt, &standing, epoch, &tail).await?;
    end(client, ()).await?;
    tracing::warn!(%epoch, fork = %adoption.fork_position, actor = adopt.actor, reason = adopt.reason,
        "the log was adopted as it is");
    Ok(adoption)
}

/// Nothing stands: then the findings were settled, or there were none.
async fn settled(client: &Client, adopt: &Adopt) -> Result<AdoptError, StoreError> {
    let row = client.query_opt(ADOPTION_SQL, &[]).await;
    let row = row.map_err(StoreError::while_doing("look for an adoption"))?;
    end(client, ()).await?;
    let adoption = row.as_ref().map(decode_adoption).transpose()?;
    let adoption =
        adoption.filter(|adoption| adoption.rewind_upto >= adopt.rewind_upto && adopt.rewind_upto > 0);
    Ok(adoption.map_or(AdoptError::Nothing, |adoption| AdoptError::Settled { adoption: Box::new(adoption) }))
}

/// An epoch above every one in the log, whatever was restored, and every one that was seen.
async fn epoch_above(client: &Client, standing: &[Rewind]) -> Result<Epoch, StoreError> {
    const SQL: &str = "select greatest((select coalesce(max(epoch), 0) from weft.log_epoch), \
         (select coalesce(max(epoch), 0) from weft.log_adoption), \
         (select epoch from weft.log_batch order by last_position desc limit 1), \
         (select epoch from weft.event order by position desc limit 1), 0)";
    let row = client.query_one(SQL, &[]).await.map_err(StoreError::while_doing("look for epochs"))?;
    Ok(epoch_to_adopt(Epoch(row.get::<_, i64>(0).cast_unsigned()), standing))
}

/// Epochs that the lost history may have opened after the last one that a witness tells of: one for each start of its server. What
/// sidecars are told comes up to a second before its witness, so some may run a version of such an epoch. Too many epochs are
/// harmless; one too few is not.
pub const EPOCHS_UNSEEN_MAX: u64 = 1_000;

/// The epoch that an adoption opens, where `known` is the latest in the log: above that, above all that was seen, and above what
/// followed unseen. Pure.
#[must_use]
pub fn epoch_to_adopt(known: Epoch, standing: &[Rewind]) -> Epoch {
    let seen = standing.iter().map(|rewind| rewind.seen.epoch.max(rewind.found.epoch)).max();
    Epoch(known.max(seen.unwrap_or_default()).0.saturating_add(EPOCHS_UNSEEN_MAX))
}

async fn insert(
    client: &Client,
    adopt: &Adopt,
    standing: &[Rewind],
    epoch: Epoch,
    tail: &LogTail,
) -> Result<Adoption, StoreError> {
    // What an epoch after the seen ones found when it was opened is the last that it can share with them.
    const SQL: &str = "with fork as (select least($2::bigint, (select min(fork_position) from weft.log_epoch \
         where epoch > $3 and epoch < $4)) as position) \
         insert into weft.log_adoption (rewind_upto, epoch, fork_position, fork_hash, actor, reason, adopted_at) \
         select $1, $4, fork.position, case when fork.position = 0 then $7 else \
         (select hash from weft.event where event.position = fork.position) end, $5, $6, clock_timestamp() from fork \
         returning id, rewind_upto, epoch, fork_position, actor, reason, adopted_at";
    let upto = standing.iter().map(|rewind| rewind.id).max().unwrap_or_default();
    let seen_first = standing.iter().map(|rewind| rewind.seen.position.0).min().unwrap_or_default();
    let seen_epoch = standing.iter().map(|rewind| rewind.seen.epoch.0).min().unwrap_or_default();
    let common = signed(tail.position.0.min(seen_first.saturating_sub(1)));
    let (upto, seen_epoch, epoch) = (signed(upto), signed(seen_epoch), signed(epoch.0));
    let genesis = EventHash::GENESIS.0.as_slice();
    let params: [&(dyn ToSql + Sync); 7] =
        [&upto, &common, &seen_epoch, &epoch, &adopt.actor, &adopt.reason, &genesis];
    let row = client.query_one(SQL, &params).await;
    decode_adoption(&row.map_err(StoreError::while_doing("record the adoption"))?)
}

async fn lock(client: &Client) -> Result<LogTail, StoreError> {
    let doing = StoreError::while_doing("lock the log");
    client.batch_execute(SESSION_SQL).await.map_err(&doing)?;
    client.batch_execute(LOCK_SQL).await.map_err(&doing)?;
    let row = client.query_opt(TAIL_SQL, &[]).await.map_err(&doing)?;
    row.as_ref().map_or(Ok(LogTail::EMPTY), decode_tail)
}

async fn end<T>(client: &Client, result: T) -> Result<T, StoreError> {
    client.batch_execute("commit").await.map_err(StoreError::while_doing("release the log"))?;
    Ok(result)
}

pub(crate) fn decode_rewind(row: &Row) -> Result<Rewind, StoreError> {
    let seen = Point {
        epoch: Epoch(count(row, 1)),
        position: Position(count(row, 2)),
        hash: decode_hash(row.get(3))?,
    };
    Ok(Rewind {
        id: count(row, 0),
        seen,
        found: ConfigVersion::new(Epoch(count(row, 4)), Position(count(row, 5))),
        found_hash: row.get::<_, Option<&[u8]>>(6).map(decode_hash).transpose()?,
        witness: row.get(7),
        reported_at: UnixMicros::from_database(row.get(8)),
    })
}

pub(crate) fn decode_adoption(row: &Row) -> Result<Adoption, StoreError> {
    let adopted_at = row
        .try_get(6)
        .map_err(|_| StoreError::Undecodable { table: "weft.log_adoption", column: "adopted_at" })?;
    Ok(Adoption {
        id: count(row, 0),
        rewind_upto: count(row, 1),
        epoch: Epoch(count(row, 2)),
        fork_position: Position(count(row, 3)),
        actor: row.get(4),
        reason: row.get(5),
        adopted_at: UnixMicros::from_database(adopted_at),
    })
}

/// A counter that the table checks to be none below zero.
fn count(row: &Row, column: usize) -> u64 {
    row.get::<_, i64>(column).cast_unsigned()
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
