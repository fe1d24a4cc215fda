//! Reading sealed segments.

use futures_util::{Stream, StreamExt};
use std::pin::Pin;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use weft_model::version::Position;

use crate::epoch::decode_hash;
use crate::event::UnixMicros;
use crate::segment::Segment;
use crate::session::{Session, StoreError, within};

use super::{REPLAY_SILENCE_MAX, rows};

/// The segment that holds position `$1`. Columns of [`decode`].
pub(super) const SEGMENT_SQL: &str = "select first_position, last_position, previous_hash, last_hash, raw_bytes, body_hash, \
     body, first_recorded_at, last_recorded_at from weft.log_segment where first_position <= $1 and last_position >= $1";

/// Segments that hold events with `$1 < position <= $2`. Columns of [`decode`].
const SEGMENTS_SQL: &str = "select first_position, last_position, previous_hash, last_hash, raw_bytes, body_hash, \
     body, first_recorded_at, last_recorded_at from weft.log_segment where last_position > $1 and first_position <= $2 order by first_position";

/// Up to where the log is sealed; zero if it is not.
const SEALED_SQL: &str = "select coalesce(max(last_position), 0) from weft.log_segment";

/// Segments, one by one as they are asked for.
pub(crate) struct Segments(Pin<Box<dyn Stream<Item = Result<Row, tokio_postgres::Error>> + Send>>);

impl Segments {
    pub(crate) async fn open(session: &Session, after: Position, to: Position) -> Result<Self, StoreError> {
        let failed = StoreError::while_doing("read sealed events");
        let (after, to) = (after.0.cast_signed(), to.0.cast_signed());
        let params: [&(dyn ToSql + Sync); 2] = [&after, &to];
        let rows = session.client.query_raw(SEGMENTS_SQL, params);
        let rows = within(REPLAY_SILENCE_MAX, rows).await?.map_err(failed)?;
        Ok(Self(Box::pin(rows)))
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Segment>, StoreError> {
        let row = within(REPLAY_SILENCE_MAX, self.0.next()).await?.transpose();
        let row = row.map_err(StoreError::while_doing("read sealed events"))?;
        row.as_ref().map(decode).transpose()
    }
}

/// Up to where the log is sealed.
pub(crate) async fn sealed_to(session: &Session) -> Result<Position, StoreError> {
    let row = within(REPLAY_SILENCE_MAX, session.client.query_one(SEALED_SQL, &[])).await?;
    let row = row.map_err(StoreError::while_doing("read up to where the log is sealed"))?;
    Ok(Position(rows::counter(&row, 0)?))
}

pub(super) fn decode(row: &Row) -> Result<Segment, StoreError> {
    let raw_bytes = usize::try_from(row.get::<_, i32>(4));
    let time = |column, name| {
        let undecodable = StoreError::Undecodable { table: "weft.log_segment", column: name };
        row.try_get(column).map(UnixMicros::from_database).map_err(|_| undecodable)
    };
    Ok(Segment {
        recorded_at: (time(7, "first_recorded_at")?, time(8, "last_recorded_at")?),
        first: Position(rows::counter(row, 0)?),
        last: Position(rows::counter(row, 1)?),
        previous_hash: decode_hash(row.get(2))?,
        last_hash: decode_hash(row.get(3))?,
        raw_bytes: raw_bytes
            .map_err(|_| StoreError::Undecodable { table: "weft.log_segment", column: "raw_bytes" })?,
        body_hash: decode_hash(row.get(5))?,
        body: row.get::<_, &[u8]>(6).to_vec().into(),
    })
}
