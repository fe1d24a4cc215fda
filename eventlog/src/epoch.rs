//! Epochs: one life of the database's history each.
//!
//! A database that lost its tail (a promoted standby, a restored backup, a crash) hands out positions again that
//! somebody has already seen with other events. So everything outside names `(epoch, position)`, and a new epoch
//! opens whenever the database may not be a plain continuation. Too many epochs are harmless; one too few is not.

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};
use weft_model::version::{Epoch, Position};

use crate::event::UnixMicros;
use crate::hash::EventHash;
use crate::session::StoreError;

/// What tells one life of the database from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lineage {
    /// Another cluster: the log was moved by dump and restore.
    system_identifier: i64,
    /// Another timeline: a standby was promoted or a backup restored.
    timeline: i32,
    /// Another start: a crash with unsafe settings loses the tail and changes nothing else.
    postmaster_start: UnixMicros,
    /// Another table: an older dump was restored inside the same running server.
    event_table: u32,
}

/// The last event of the log; position zero and the genesis hash if it has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogTail {
    /// Its position.
    pub position: Position,
    /// Its hash.
    pub hash: EventHash,
    /// When it was recorded.
    pub recorded_at: UnixMicros,
}

impl LogTail {
    /// Of a log without an event.
    pub const EMPTY: Self =
        Self { position: Position::ZERO, hash: EventHash::GENESIS, recorded_at: UnixMicros(i64::MIN) };
}

/// Reads the tail. Under the log's lock it stays the tail until the transaction ends.
pub(crate) const TAIL_SQL: &str =
    "select position, hash, recorded_at from weft.event order by position desc limit 1";

/// Takes the lock that serialises appends, until the transaction ends. Being a message of its own, it makes every later
/// statement of a READ COMMITTED transaction see the previous holder's commit; a statement that itself waited for the
/// lock would still look at its older snapshot.
///
/// A table that exists to be locked, and not an advisory lock: anybody who may log in can take any advisory lock and
/// keep it, so one forgotten session of a reader would stop every write. This mode of a table's lock takes a right to
/// change the table, which only those have who may append. It excludes itself and is not the strongest, so reading
/// everything, as `pg_dump` does for as long as it runs, neither waits for writers nor holds them up.
pub(crate) const LOCK_SQL: &str =
    "begin isolation level read committed; lock table weft.log_lock in exclusive mode";

/// Opens a new epoch if the database is not in the one last written, and returns the current one with the tail.
pub(crate) async fn establish(client: &Client) -> Result<(Epoch, LogTail), StoreError> {
    client.batch_execute(LOCK_SQL).await.map_err(StoreError::while_doing("lock the log"))?;
    let lineage = read_lineage(client).await?;
    let tail =
        client.query_opt(TAIL_SQL, &[]).await.map_err(StoreError::while_doing("read the log's tail"))?;
    let tail = tail.as_ref().map_or(Ok(LogTail::EMPTY), decode_tail)?;
    let last = read_last(client).await?;
    let epoch = epoch_to_open(last.as_ref(), &lineage);
    if let Some(epoch) = epoch {
        open_epoch(client, epoch, &lineage, &tail).await?;
    }
    client.batch_execute("commit").await.map_err(StoreError::while_doing("open an epoch"))?;
    if let Some(epoch) = epoch {
        tracing::info!(%epoch, position = %tail.position, "opened a new epoch of the log");
    }
    Ok((epoch.or(last.map(|(epoch, _)| epoch)).unwrap_or_default(), tail))
}

/// The epoch to open, or `None` if `last` still lives.
fn epoch_to_open(last: Option<&(Epoch, Lineage)>, now: &Lineage) -> Option<Epoch> {
    match last {
        None => Some(Epoch(1)),
        Some((_, lineage)) if lineage == now => None,
        Some((epoch, _)) => Some(epoch.next()),
    }
}

pub(crate) async fn read_lineage(client: &Client) -> Result<Lineage, StoreError> {
    // The timeline is the first eight hex digits of the current WAL file's name. The control file's checkpoint also
    // has one, which lags after a promotion.
    const SQL: &str = "select (select system_identifier from pg_control_system()), \
                       ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int, \
                       pg_postmaster_start_time(), 'weft.event'::regclass::oid";
    let row = client.query_one(SQL, &[]).await.map_err(StoreError::while_doing("identify itself"))?;
    Ok(decode_lineage(&row, 0))
}

async fn read_last(client: &Client) -> Result<Option<(Epoch, Lineage)>, StoreError> {
    const SQL: &str = "select system_identifier, timeline, postmaster_start, event_table, epoch \
                       from weft.log_epoch order by epoch desc limit 1";
    let row = client.query_opt(SQL, &[]).await.map_err(StoreError::while_doing("read the last epoch"))?;
    Ok(row.map(|row| (Epoch(row.get::<_, i64>(4).cast_unsigned()), decode_lineage(&row, 0))))
}

fn decode_lineage(row: &Row, at: usize) -> Lineage {
    Lineage {
        system_identifier: row.get(at),
        timeline: row.get(at + 1),
        postmaster_start: UnixMicros::from_database(row.get(at + 2)),
        event_table: row.get(at + 3),
    }
}

/// Opens an epoch after what the log holds. The caller has the log's lock.
pub(crate) async fn open_epoch(
    client: &Client,
    epoch: Epoch,
    lineage: &Lineage,
    tail: &LogTail,
) -> Result<(), StoreError> {
    const SQL: &str = "insert into weft.log_epoch (epoch, system_identifier, timeline, postmaster_start, \
                       event_table, fork_position, fork_hash, opened_at) \
                       values ($1, $2, $3, $4, $5, $6, $7, clock_timestamp())";
    let (epoch, position) = (epoch.0.cast_signed(), tail.position.0.cast_signed());
    let (started, hash) = (lineage.postmaster_start.to_database(), tail.hash.0.as_slice());
    let params: [&(dyn ToSql + Sync); 7] = [
        &epoch,
        &lineage.system_identifier,
        &lineage.timeline,
        &started,
        &lineage.event_table,
        &position,
        &hash,
    ];
    client.execute(SQL, &params).await.map(|_| ()).map_err(StoreError::while_doing("open an epoch"))
}

/// Decodes a row of [`TAIL_SQL`], or of any query that starts with the same columns.
pub(crate) fn decode_tail(row: &Row) -> Result<LogTail, StoreError> {
    Ok(LogTail {
        position: Position(row.get::<_, i64>(0).cast_unsigned()),
        hash: decode_hash(row.get(1))?,
        recorded_at: UnixMicros::from_database(row.get(2)),
    })
}

/// Decodes a column whose length the table checks.
pub(crate) fn decode_hash(bytes: &[u8]) -> Result<EventHash, StoreError> {
    let undecodable = StoreError::Undecodable { table: "weft.event", column: "hash" };
    bytes.try_into().map(EventHash).map_err(|_| undecodable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lineage() -> Lineage {
        Lineage {
            system_identifier: 7_300_000_000_000_000_001,
            timeline: 1,
            postmaster_start: UnixMicros(1_753_000_000_000_000),
            event_table: 16_400,
        }
    }

    #[test]
    fn the_first_epoch_is_one_and_an_unchanged_database_stays_in_its_epoch() {
        assert_eq!(epoch_to_open(None, &lineage()), Some(Epoch(1)));
        assert_eq!(epoch_to_open(Some(&(Epoch(4), lineage())), &lineage()), None);
    }

    #[test]
    fn any_other_life_of_the_database_is_a_new_epoch() {
        let last = (Epoch(4), lineage());
        let others = [
            Lineage { system_identifier: 1, ..lineage() },
            Lineage { timeline: 2, ..lineage() },
            Lineage { postmaster_start: UnixMicros(1_753_000_000_000_001), ..lineage() },
            Lineage { event_table: 16_500, ..lineage() },
        ];
        for other in others {
            assert_eq!(epoch_to_open(Some(&last), &other), Some(Epoch(5)), "{other:?}");
        }
    }
}
