//! The readers' SQL and the decoding of its rows. What does not decode is an error that names its column.

use tokio_postgres::Row;
use weft_model::version::{Epoch, Position, Version};

use super::{Anchor, CommandOutcome, Evidence, Head};
use crate::epoch::{decode_hash, decode_tail};
use crate::event::{RecordedEvent, UnixMicros};
use crate::hash::EventHash;
use crate::request::Appended;
use crate::session::StoreError;

/// Columns of [`decode_event`], in its order. The payload is taken as text: byte for byte what was appended.
macro_rules! select_events {
    ($rest:literal) => {
        concat!(
            "select position, epoch, scope, version, type, schema, actor, reason, cause, command_id, recorded_at, ",
            "payload::text, hash from weft.event ",
            $rest
        )
    };
}

pub(super) const RANGE_SQL: &str =
    select_events!("where position > $1 and position <= $2 order by position limit $3");

/// One row also for an empty log.
pub(super) const HEAD_SQL: &str = "select tail.position, tail.hash, tail.recorded_at, (select coalesce(max(epoch), 0) from weft.log_epoch) \
     from (values (1)) as one left join lateral \
     (select position, hash, recorded_at from weft.event order by position desc limit 1) as tail on true";

/// What testifies about the log, all of one moment: the columns of [`HEAD_SQL`], the epochs, the end of the last batch, and
/// up to where the log is sealed.
pub(super) const EVIDENCE_SQL: &str = "select tail.position, tail.hash, tail.recorded_at, \
     coalesce(epochs.epoch[array_upper(epochs.epoch, 1)], 0), epochs.epoch, epochs.fork_position, epochs.fork_hash, \
     (select coalesce(max(last_position), 0) from weft.log_batch), \
     (select coalesce(max(last_position), 0) from weft.log_segment) \
     from (select array_agg(epoch order by epoch) as epoch, array_agg(fork_position order by epoch) as fork_position, \
     array_agg(fork_hash order by epoch) as fork_hash from weft.log_epoch) as epochs left join lateral \
     (select position, hash, recorded_at from weft.event order by position desc limit 1) as tail on true";

/// What stands at a position, and where the log ends. A standby may simply not have got so far yet.
pub(super) const ANCHOR_SQL: &str = "select (select hash from weft.event where position = $1), \
     (select coalesce(max(position), 0) from weft.event), pg_is_in_recovery()";

/// Outcomes with the versions that their events brought each scope to, of commands recorded after `$2`. Columns of
/// [`decode_outcome`].
pub(crate) const OUTCOMES_SQL: &str = "select first.command_id, first.fingerprint, first.epoch, first.position, \
     first.position + first.command_events - 1, first.recorded_at, reached.scopes, reached.versions \
     from weft.event as first cross join lateral \
     (select array_agg(head.scope) as scopes, array_agg(head.version) as versions from \
     (select scope, max(version) as version from weft.event \
     where position > $2 and position between first.position and first.position + first.command_events - 1 \
     group by scope) as head) as reached \
     where first.command_id = any($1) and first.fingerprint is not null and first.position > $2";

pub(super) fn decode_event(row: &Row) -> Result<RecordedEvent, StoreError> {
    Ok(RecordedEvent {
        position: Position(counter(row, 0)?),
        epoch: Epoch(counter(row, 1)?),
        scope: row.get(2),
        version: Version(counter(row, 3)?),
        event_type: row.get(4),
        schema: u16::try_from(row.get::<_, i16>(5)).map_err(|_| undecodable("weft.event", "schema"))?,
        actor: row.get(6),
        reason: row.get(7),
        cause: row.get::<_, Option<i64>>(8).map(|cause| Position(cause.cast_unsigned())),
        command_id: row.get(9),
        recorded_at: time(row, 10)?,
        payload: row.get(11),
        hash: decode_hash(row.get(12))?,
    })
}

pub(super) fn decode_head(row: &Row) -> Result<Head, StoreError> {
    let epoch = Epoch(counter(row, 3)?);
    if row.get::<_, Option<i64>>(0).is_none() {
        return Ok(Head { epoch, position: Position::ZERO, hash: EventHash::GENESIS, recorded_at: None });
    }
    let tail = decode_tail(row)?;
    Ok(Head { epoch, position: tail.position, hash: tail.hash, recorded_at: Some(tail.recorded_at) })
}

pub(crate) fn decode_outcome(row: &Row) -> Result<CommandOutcome, StoreError> {
    let fingerprint: &[u8] = row.get(1);
    let scopes: Option<Vec<String>> = row.get(6);
    let versions: Option<Vec<i64>> = row.get(7);
    let versions = versions.unwrap_or_default().into_iter().map(|version| Version(version.cast_unsigned()));
    let appended = Appended {
        epoch: Epoch(counter(row, 2)?),
        positions: Some(Position(counter(row, 3)?)..=Position(counter(row, 4)?)),
        versions: scopes.unwrap_or_default().into_iter().zip(versions).collect(),
        recorded_at: time(row, 5)?,
        repeated: false,
    };
    let fingerprint = fingerprint.try_into();
    let fingerprint = fingerprint.map_err(|_| undecodable("weft.event", "fingerprint"))?;
    Ok(CommandOutcome { command_id: row.get(0), fingerprint, appended })
}

pub(super) fn decode_evidence(row: &Row) -> Result<Evidence, StoreError> {
    let epochs: Option<Vec<i64>> = row.get(4);
    let positions: Option<Vec<i64>> = row.get(5);
    let hashes: Option<Vec<&[u8]>> = row.get(6);
    let forks = epochs.into_iter().flatten().zip(positions.into_iter().flatten());
    let forks = forks.zip(hashes.into_iter().flatten()).map(|((epoch, position), hash)| {
        Ok((Epoch(epoch.cast_unsigned()), Position(position.cast_unsigned()), decode_hash(hash)?))
    });
    Ok(Evidence {
        head: decode_head(row)?,
        forks: forks.collect::<Result<_, StoreError>>()?,
        acknowledged: Position(counter(row, 7)?),
        sealed: Position(counter(row, 8)?),
    })
}

pub(super) fn decode_anchor(row: &Row) -> Result<Anchor, StoreError> {
    let hash: Option<&[u8]> = row.get(0);
    let end = Position(counter(row, 1)?);
    Ok(match hash {
        Some(hash) => Anchor::Stands { hash: decode_hash(hash)?, end },
        None if row.get(2) => Anchor::NotYet,
        None => Anchor::Gone { end },
    })
}

/// A counter is never negative.
pub(super) fn counter(row: &Row, column: usize) -> Result<u64, StoreError> {
    u64::try_from(row.get::<_, i64>(column)).map_err(|_| undecodable("weft.event", "counter"))
}

/// The table has no infinite times, but its type has.
fn time(row: &Row, column: usize) -> Result<UnixMicros, StoreError> {
    let time = row.try_get(column).map_err(|_| undecodable("weft.event", "recorded_at"))?;
    Ok(UnixMicros::from_database(time))
}

fn undecodable(table: &'static str, column: &'static str) -> StoreError {
    StoreError::Undecodable { table, column }
}
