//! The projection's tables: lease, checkpoint, rows, acknowledgements. All SQL of this crate is here and below.
//!
//! Invariant: rows change only in [`Store::commit`], and only if the checkpoint still has the writer's term and the
//! position that the writer started from. So of two that think they lead, at most one writes, and a writer that lost
//! track of what it wrote (a commit without an answer) is refused rather than believed.

mod acks;
mod checkpoint;
mod lease;
mod propagation;
mod read;
mod rollout;
mod write;

pub use acks::{Ack, ClassAck, Serving, SidecarStatus};
pub(crate) use checkpoint::StoredCheckpoint;
pub use lease::{Lease, LeaseSession};
pub use propagation::{Propagation, PropagationRow};
pub use rollout::CanaryWord;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{PgPool, Row};
use std::time::Duration;
use weft_eventlog::{EventHash, Point};
use weft_model::{ConfigVersion, Epoch, Position};

use crate::rows::RowChanges;

/// Name of the checkpoint's row.
const PROJECTION: &str = "mesh";

/// Connections that projector, acknowledgements and status queries share: each of them is short and one at a time.
const CONNECTIONS_MAX: u32 = 4;
/// How long an operation waits for one of them.
const ACQUIRE_MAX: Duration = Duration::from_secs(5);
/// A statement that takes longer is given up by the server, so that a stuck writer ends.
const STATEMENT_MS_MAX: &str = "5000";
/// A writer that was paused within its transaction is cut off by the server after so long, about as long as a lease lasts: it
/// holds the checkpoint's row locked, and the next leader waits for that.
const IDLE_MS_MAX: &str = "2000";

/// The projection's tables cannot be used now. Repeating is safe.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database failed, or cannot be reached.
    #[error("the database failed to {doing}")]
    Database {
        /// What was to be done.
        doing: &'static str,
        /// What went wrong.
        #[source]
        source: sqlx::Error,
    },
    /// A row holds what no projector writes.
    #[error("{table} holds a row that no projector writes: {key}")]
    Row {
        /// The table.
        table: &'static str,
        /// The row's key.
        key: String,
    },
    /// The log itself could not be asked.
    #[error("the log could not be asked")]
    Log(#[source] weft_eventlog::StoreError),
    /// The URL is not one of a database.
    #[error("the database URL is malformed")]
    Url(#[source] sqlx::Error),
}

fn failed(doing: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| StoreError::Database { doing, source }
}

/// Whether a transaction of the projector took place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// It did.
    Done,
    /// Somebody else leads, the checkpoint is not where it was thought to be, or the log lacks the new one's event. Nothing was
    /// written.
    Fenced,
}

/// Who projects, as the database knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeaderStatus {
    /// Name of the lease's holder; empty if nobody holds it.
    pub holder: String,
    /// The lease's term.
    pub term: u64,
    /// The checkpoint.
    pub checkpoint: ConfigVersion,
}

/// The projection's tables in one database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    pool: PgPool,
    options: PgConnectOptions,
}

impl Store {
    /// The tables in the database at `url`, to write them. Connects when first used, and acts as `weft_projector` then,
    /// whatever its login could do.
    ///
    /// # Errors
    /// If the URL is malformed.
    pub fn new(url: &str) -> Result<Self, StoreError> {
        Self::acting_as("weft_projector", url)
    }

    /// The same, only to read them, as `weft_reader`.
    ///
    /// # Errors
    /// If the URL is malformed.
    pub fn reading(url: &str) -> Result<Self, StoreError> {
        Self::acting_as("weft_reader", url)
    }

    fn acting_as(role: &str, url: &str) -> Result<Self, StoreError> {
        let options: PgConnectOptions = url.parse().map_err(StoreError::Url)?;
        let settings = [
            ("statement_timeout", STATEMENT_MS_MAX),
            ("idle_in_transaction_session_timeout", IDLE_MS_MAX),
            ("role", role),
        ];
        let options = options.application_name("weft-projector").options(settings);
        let pool = PgPoolOptions::new().max_connections(CONNECTIONS_MAX).acquire_timeout(ACQUIRE_MAX);
        Ok(Self { pool: pool.connect_lazy_with(options.clone()), options })
    }

    /// Ends the connections.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// How far the log is projected.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn checkpoint(&self) -> Result<ConfigVersion, StoreError> {
        const SQL: &str = "select epoch, position from weft.projection where name = $1";
        let row = sqlx::query(SQL).bind(PROJECTION).fetch_optional(&self.pool).await;
        let row = row.map_err(failed("read the checkpoint"))?;
        Ok(row.map(|row| version(row.get(0), row.get(1))).unwrap_or_default())
    }

    /// How far the log is projected, for a fold that ends with this event. None if the log lacks the one or the other, so that the
    /// rows may be of another history than what was folded.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn covered(
        &self,
        folded: Option<(Position, EventHash)>,
    ) -> Result<Option<ConfigVersion>, StoreError> {
        const SQL: &str = "select epoch, position from weft.projection as projection where name = $1 \
             and (projection.hash is null \
             or exists (select from weft.event where event.position = projection.position and event.hash = projection.hash) \
             or exists (select from weft.log_segment where last_position >= projection.position)) \
             and ($2::bigint = 0 or exists (select from weft.event where event.position = $2 and event.hash = $3) \
             or exists (select from weft.log_segment where last_position >= $2))";
        let (position, hash) = folded.unwrap_or((Position::ZERO, EventHash::GENESIS));
        let row = sqlx::query(SQL).bind(PROJECTION).bind(position.0.cast_signed()).bind(&hash.0[..]);
        let row = row.fetch_optional(&self.pool).await.map_err(failed("read the checkpoint"))?;
        Ok(row.map(|row| version(row.get(0), row.get(1))))
    }

    /// How far the log is projected, as a point of the log; none if nothing is, or an earlier version of Weft wrote it.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn checkpoint_point(&self) -> Result<Option<Point>, StoreError> {
        const SQL: &str =
            "select epoch, position, hash from weft.projection where name = $1 and position > 0";
        let row = sqlx::query(SQL).bind(PROJECTION).fetch_optional(&self.pool).await;
        let row = row.map_err(failed("read the checkpoint"))?;
        Ok(row.and_then(|row| {
            let ConfigVersion { epoch, position } = version(row.get(0), row.get(1));
            let hash: Option<Vec<u8>> = row.get(2);
            Some(Point { epoch, position, hash: EventHash(hash?.try_into().ok()?) })
        }))
    }

    /// Who projects.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn leader(&self) -> Result<LeaderStatus, StoreError> {
        const SQL: &str = "select case when lease.expires_at > clock_timestamp() then lease.holder else '' end, \
                           lease.term, coalesce(projection.epoch, 0), coalesce(projection.position, 0) \
                           from weft.lease as lease left join weft.projection as projection on projection.name = $2 \
                           where lease.name = $1";
        let row = sqlx::query(SQL).bind(lease::NAME).bind(PROJECTION).fetch_optional(&self.pool).await;
        let row = row.map_err(failed("read the projector's lease"))?;
        Ok(row
            .map(|row| LeaderStatus {
                holder: row.get(0),
                term: row.get::<i64, _>(1).cast_unsigned(),
                checkpoint: version(row.get(2), row.get(3)),
            })
            .unwrap_or_default())
    }

    /// Moves the checkpoint from `old` to `new`, which has this chain hash, and writes the rows that change, in one transaction; if
    /// the log has that event. A writer whose memory holds what a restored backup lacks writes nothing.
    ///
    /// # Errors
    /// If the database fails. Whether the transaction took place may be unknown: take the lease anew and compare.
    pub async fn commit(
        &self,
        term: i64,
        old: Position,
        (new, hash): (ConfigVersion, Option<EventHash>),
        rows: &RowChanges,
    ) -> Result<Commit, StoreError> {
        const FENCE: &str = "update weft.projection set epoch = $4, position = $5, hash = $6, \
                             updated_at = clock_timestamp() \
                             where name = $1 and term = $2 and position = $3 and ($6::bytea is null \
                             or exists (select from weft.event where event.position = $5 and event.hash = $6) \
                             or exists (select from weft.log_segment where last_position >= $5))";
        let failed = failed("write the projection");
        let mut transaction = self.pool.begin().await.map_err(&failed)?;
        // First, because it also locks the checkpoint: whoever takes the lease now waits for this transaction.
        let fence = sqlx::query(FENCE)
            .bind(PROJECTION)
            .bind(term)
            .bind(old.0.cast_signed())
            .bind(new.epoch.0.cast_signed())
            .bind(new.position.0.cast_signed())
            .bind(hash.map(|hash| hash.0.to_vec()));
        if fence.execute(&mut *transaction).await.map_err(&failed)?.rows_affected() == 0 {
            return Ok(Commit::Fenced);
        }
        write::rows(&mut transaction, rows).await.map_err(&failed)?;
        transaction.commit().await.map_err(&failed)?;
        Ok(Commit::Done)
    }

    /// Every stored row, with the checkpoint that they belong to, from one moment.
    ///
    /// # Errors
    /// If the database fails, or a row is not one that a projector writes.
    pub async fn rows(&self) -> Result<(ConfigVersion, RowChanges), StoreError> {
        let failed = failed("read the projection");
        let mut transaction = self.pool.begin().await.map_err(&failed)?;
        // It locks nothing that anybody waits for, and taking in a large table may take long.
        let patient = sqlx::query("set local idle_in_transaction_session_timeout = 0");
        patient.execute(&mut *transaction).await.map_err(&failed)?;
        read::all(&mut transaction).await
    }
}

fn version(epoch: i64, position: i64) -> ConfigVersion {
    ConfigVersion::new(Epoch(epoch.cast_unsigned()), Position(position.cast_unsigned()))
}
