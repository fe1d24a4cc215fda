//! The readers' SQL and the decoding of its rows. What does not decode is an error that names its column.

use tokio_postgres::Row;
use weft_model::version::{Epoch, Position, Version};

use super::{CommandOutcome, Head};
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

pub(super) const SCOPE_SQL: &str =
    select_events!("where scope = $1 and version > $2 order by version limit $3");

/// One row also for an empty log.
pub(super) const HEAD_SQL: &str = "select tail.position, tail.hash, tail.recorded_at, (select coalesce(max(epoch), 0) from weft.log_epoch) \
     from (values (1)) as one left join lateral \
     (select position, hash, recorded_at from weft.event order by position desc limit 1) as tail on true";

/// Outcomes with the versions that their events brought each scope to. Columns of [`decode_outcome`].
pub(crate) const OUTCOMES_SQL: &str = "select outcome.command_id, outcome.fingerprint, outcome.epoch, outcome.first_position, \
     outcome.last_position, outcome.recorded_at, reached.scopes, reached.versions \
     from weft.command_outcome as outcome cross join lateral \
     (select array_agg(head.scope) as scopes, array_agg(head.version) as versions from \
     (select scope, max(version) as version from weft.event \
     where position between outcome.first_position and outcome.last_position group by scope) as head) as reached \
     where outcome.command_id = any($1)";

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
    let fingerprint = fingerprint.map_err(|_| undecodable("weft.command_outcome", "fingerprint"))?;
    Ok(CommandOutcome { command_id: row.get(0), fingerprint, appended })
}

pub(super) fn decode_fork(row: &Row) -> Result<(Epoch, Position, EventHash), StoreError> {
    Ok((Epoch(counter(row, 0)?), Position(counter(row, 1)?), decode_hash(row.get(2))?))
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
