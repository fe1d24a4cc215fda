//! The lease: who tries to write. That nobody else succeeds is the business of the term, in [`Store::commit`].
//!
//! It ends in one of three ways, each noticed by whoever looks: its holder gives it back; its time is over, as when the
//! holder is paused or cut off from the database; or the database session that it was taken with has ended, as when the holder was
//! killed. The last is noticed at once and not after the lease's time, because the system closes the connections of a
//! process that ends. A session that is gone proves nothing about its holder, who may live on and open another one: then
//! the lease changes hands needlessly, and the holder is fenced. A session that is there proves nothing either, and then the time
//! counts.

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection, Row};
use std::io;
use std::time::Duration;
use tokio::time::timeout;
use uuid::Uuid;
use weft_model::ConfigVersion;

use super::{PROJECTION, Store, StoreError, failed, version};

/// Name of the lease's row.
pub(super) const NAME: &str = "projector";
/// What sessions are called that hold a lease, or want to.
const APPLICATION: &str = "weft-lease";
/// How long the database may take to answer about the lease. A session in which it takes longer is as good as gone.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// A lease that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its term; the next one has a higher.
    pub term: i64,
    /// The checkpoint that its holder goes on from.
    pub checkpoint: ConfigVersion,
}

/// A database session to look after the lease. While it lasts, a lease that was taken or renewed with it counts as held, at most
/// for its time. After an error it is to be dropped, and another one opened.
#[derive(Debug)]
pub struct LeaseSession {
    connection: PgConnection,
}

impl Store {
    /// Opens a session for the lease.
    ///
    /// # Errors
    /// If the database cannot be reached.
    pub async fn lease_session(&self) -> Result<LeaseSession, StoreError> {
        let options: PgConnectOptions = self.options.clone().application_name(APPLICATION);
        let connection = in_time("open a session for the projector's lease", options.connect()).await?;
        Ok(LeaseSession { connection })
    }
}

impl LeaseSession {
    /// Whether [`acquire`](Self::acquire) would succeed now, as far as can be told without waiting for anybody.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn is_free(&mut self, holder_id: Uuid) -> Result<bool, StoreError> {
        const SQL: &str = "select coalesce((select lease.expires_at < clock_timestamp() or lease.holder_id = $2 \
             or weft.lease_session_ended(lease) from weft.lease as lease where lease.name = $1), true)";
        let free = sqlx::query_scalar(SQL).bind(NAME).bind(holder_id).fetch_one(&mut self.connection);
        in_time("look at the projector's lease", free).await
    }

    /// Takes the lease if it is free, past its time, without its session, or already this holder's. None if somebody else
    /// has it.
    ///
    /// From then on, no writer of an earlier term succeeds.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn acquire(
        &mut self,
        holder: &str,
        holder_id: Uuid,
        ttl: Duration,
    ) -> Result<Option<Lease>, StoreError> {
        in_time("take the projector's lease", self.take(holder, holder_id, ttl)).await
    }

    async fn take(&mut self, holder: &str, holder_id: Uuid, ttl: Duration) -> sqlx::Result<Option<Lease>> {
        const TAKE: &str = "insert into weft.lease as lease \
             (name, term, holder, holder_id, expires_at, session_pid, session_term) \
             values ($1, 1, $2, $3, clock_timestamp() + make_interval(secs => $4), pg_backend_pid(), 1) \
             on conflict (name) do update set term = lease.term + 1, holder = excluded.holder, \
             holder_id = excluded.holder_id, expires_at = excluded.expires_at, \
             session_pid = excluded.session_pid, session_term = lease.term + 1 \
             where lease.expires_at < clock_timestamp() or lease.holder_id = excluded.holder_id \
             or weft.lease_session_ended(lease) \
             returning term";
        const CHECKPOINT: &str = "insert into weft.projection as projection (name, term, epoch, position, updated_at) \
             values ($1, $2, 0, 0, clock_timestamp()) \
             on conflict (name) do update set term = excluded.term where projection.term < excluded.term \
             returning epoch, position";
        let mut transaction = self.connection.begin().await?;
        let taken = sqlx::query(TAKE).bind(NAME).bind(holder).bind(holder_id).bind(ttl.as_secs_f64());
        let Some(row) = taken.fetch_optional(&mut *transaction).await? else {
            transaction.rollback().await?;
            return Ok(None);
        };
        let term: i64 = row.get(0);
        let checkpoint = sqlx::query(CHECKPOINT).bind(PROJECTION).bind(term);
        // No row: the checkpoint has a later term than the lease, so the lease's table was reset. Not ours to guess.
        let Some(row) = checkpoint.fetch_optional(&mut *transaction).await? else {
            transaction.rollback().await?;
            return Ok(None);
        };
        let checkpoint = version(row.get(0), row.get(1));
        transaction.commit().await?;
        Ok(Some(Lease { term, checkpoint }))
    }

    /// Prolongs the lease. False if it is not this term's any more.
    ///
    /// # Errors
    /// If the database fails; whether the lease was prolonged may be unknown.
    pub async fn renew(&mut self, holder_id: Uuid, term: i64, ttl: Duration) -> Result<bool, StoreError> {
        // Need not outlast a crash of the database, in which the session ends as well; so no disk is waited for.
        const SQL: &str = "update weft.lease set expires_at = clock_timestamp() + make_interval(secs => $4), \
             session_pid = pg_backend_pid(), session_term = term \
             from (select set_config('synchronous_commit', 'off', true) as flush) as hasty \
             where name = $1 and holder_id = $2 and term = $3 and flush = 'off'";
        let renewed = sqlx::query(SQL).bind(NAME).bind(holder_id).bind(term).bind(ttl.as_secs_f64());
        let done = in_time("renew the projector's lease", renewed.execute(&mut self.connection)).await?;
        Ok(done.rows_affected() == 1)
    }

    /// Gives the lease back, so that another controller need not wait until it ends.
    ///
    /// # Errors
    /// If the database fails; the lease then ends by itself.
    pub async fn release(&mut self, holder_id: Uuid, term: i64) -> Result<(), StoreError> {
        const SQL: &str = "update weft.lease set expires_at = '-infinity' \
                           where name = $1 and holder_id = $2 and term = $3";
        let released = sqlx::query(SQL).bind(NAME).bind(holder_id).bind(term);
        in_time("release the projector's lease", released.execute(&mut self.connection)).await.map(|_| ())
    }
}

async fn in_time<T>(
    doing: &'static str,
    answer: impl Future<Output = sqlx::Result<T>>,
) -> Result<T, StoreError> {
    let answer = timeout(ANSWER_MAX, answer).await;
    answer.unwrap_or_else(|_| Err(sqlx::Error::Io(io::ErrorKind::TimedOut.into()))).map_err(failed(doing))
}
