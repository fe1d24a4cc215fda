//! `weft.fold_checkpoint`: a few rows, of which the newest are kept.

use sqlx::Row;
use sqlx::postgres::PgRow;
use weft_eventlog::EventHash;
use weft_model::{ConfigVersion, Position};
use weft_routing::Hash;

use super::{Store, StoreError, failed, version};

/// Checkpoints that are kept: the newest, and two more should that one prove unusable or a question be about a moment before it.
const KEPT_MAX: i64 = 3;
/// Rows that are looked at: those that are kept, and a few that another version or a crash may have left.
const LISTED_MAX: i64 = 16;

/// A stored checkpoint without its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredCheckpoint {
    pub(crate) version: ConfigVersion,
    pub(crate) log_hash: EventHash,
    pub(crate) fold_version: i32,
    pub(crate) body_hash: Hash,
    pub(crate) body_bytes: i64,
}

impl Store {
    /// The stored checkpoints, the newest first.
    pub(crate) async fn fold_checkpoints(&self) -> Result<Vec<StoredCheckpoint>, StoreError> {
        const SQL: &str = "select epoch, position, log_hash, fold_version, body_hash, octet_length(body)::bigint \
                           from weft.fold_checkpoint order by position desc limit $1";
        let rows = sqlx::query(SQL).bind(LISTED_MAX).fetch_all(&self.pool).await;
        rows.map_err(failed("list the fold's checkpoints"))?.iter().map(decode).collect()
    }

    /// The body of a checkpoint; none if it went in the meantime.
    pub(crate) async fn fold_checkpoint_body(&self, at: Position) -> Result<Option<Vec<u8>>, StoreError> {
        const SQL: &str = "select body from weft.fold_checkpoint where position = $1";
        let row = sqlx::query(SQL).bind(at.0.cast_signed()).fetch_optional(&self.pool).await;
        Ok(row.map_err(failed("read a checkpoint of the fold"))?.map(|row| row.get(0)))
    }

    /// Writes a checkpoint. Those at or after its position are of events that the log lost, or are this one, and go.
    pub(crate) async fn put_fold_checkpoint(
        &self,
        checkpoint: &StoredCheckpoint,
        body: &[u8],
    ) -> Result<(), StoreError> {
        const CLEAR: &str = "delete from weft.fold_checkpoint where position >= $1";
        const PUT: &str = "insert into weft.fold_checkpoint \
             (position, epoch, log_hash, fold_version, body, body_hash, made_at) \
             values ($1, $2, $3, $4, $5, $6, clock_timestamp())";
        let failed = failed("write a checkpoint of the fold");
        let position = checkpoint.version.position.0.cast_signed();
        let mut transaction = self.pool.begin().await.map_err(&failed)?;
        sqlx::query(CLEAR).bind(position).execute(&mut *transaction).await.map_err(&failed)?;
        let put = sqlx::query(PUT)
            .bind(position)
            .bind(checkpoint.version.epoch.0.cast_signed())
            .bind(&checkpoint.log_hash.0[..])
            .bind(checkpoint.fold_version)
            .bind(body)
            .bind(&checkpoint.body_hash.0[..]);
        put.execute(&mut *transaction).await.map_err(&failed)?;
        transaction.commit().await.map_err(&failed)
    }

    /// Removes all but the newest checkpoints. Apart from writing, so that a failure of either leaves the other's work.
    pub(crate) async fn prune_fold_checkpoints(&self) -> Result<u64, StoreError> {
        const SQL: &str = "delete from weft.fold_checkpoint where position not in \
             (select position from weft.fold_checkpoint order by position desc limit $1)";
        let pruned = sqlx::query(SQL).bind(KEPT_MAX).execute(&self.pool).await;
        Ok(pruned.map_err(failed("remove old checkpoints of the fold"))?.rows_affected())
    }
}

fn decode(row: &PgRow) -> Result<StoredCheckpoint, StoreError> {
    let hash = |column| Hash::from_slice(row.get::<&[u8], _>(column));
    let version = version(row.get(0), row.get(1));
    let (Some(log_hash), Some(body_hash)) = (hash(2), hash(4)) else {
        return Err(StoreError::Row { table: "weft.fold_checkpoint", key: version.position.to_string() });
    };
    let (fold_version, body_bytes) = (row.get(3), row.get(5));
    Ok(StoredCheckpoint { version, log_hash: EventHash(log_hash.0), fold_version, body_hash, body_bytes })
}
