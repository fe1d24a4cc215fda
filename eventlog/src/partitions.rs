//! Room for what is to come: the log's ranges of positions, made ahead, and closed once they are full.
//!
//! Which ranges there are, and what closing one means, is in `migrations/0004_log_growth.sql`; both are done by functions
//! that run with their owner's rights, so that an appender needs none. Every appending process does this; they wait for
//! each other and find it done. Nothing else waits for it: ranges are made while a whole one is still free, and until a
//! range is closed its scopes are looked up in it.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_postgres::{Client, Config};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use weft_model::Chain;
use weft_model::version::Position;

use crate::session::{Duty, Session, StoreError};

/// Pause after it failed. There is room for a whole range until then.
const RETRY: Duration = Duration::from_secs(5);

/// What there is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Room {
    /// The end of the range that the log's end is in.
    pub(crate) range_end: Position,
    /// Commands that were recorded up to here are too old to be repeated.
    forgotten: Position,
    /// Up to here the version of each scope is kept beside the log.
    closed: Position,
    /// The closed ranges after `forgotten`, in order.
    ranges: Vec<Range>,
}

/// A closed range: nothing is added to it any more.
#[derive(Clone, Copy, Debug)]
struct Range {
    last: Position,
    /// No command in it, or in those before it, has a greater id.
    greatest: Uuid,
}

/// What need not be looked for in all of the log's rows. What is known of it may be older than what is true: then more
/// ranges are looked at than need be, and the same is found. It is told to statements as numbers, so that they are planned
/// and run without the ranges before it: what they cost would otherwise grow with the log.
#[derive(Debug, Default)]
pub(crate) struct Behind(RwLock<Room>);

impl Behind {
    pub(crate) fn learn(&self, room: Room) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = room;
    }

    fn read(&self) -> RwLockReadGuard<'_, Room> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// A position that none of these commands was recorded at or before, if it can still be repeated. Ids are ordered by the
    /// time that they were made, so what is new is looked for in the newest ranges only.
    pub(crate) fn commands_after<'a>(&self, ids: impl IntoIterator<Item = &'a Uuid>) -> i64 {
        let room = self.read();
        let oldest = ids.into_iter().min();
        let passed =
            room.ranges.partition_point(|range| oldest.is_none_or(|oldest| range.greatest < *oldest));
        let last = passed
            .checked_sub(1)
            .and_then(|at| room.ranges.get(at))
            .map_or(room.forgotten, |range| range.last);
        last.0.cast_signed()
    }

    /// See [`Room::closed`].
    pub(crate) fn closed(&self) -> i64 {
        self.read().closed.0.cast_signed()
    }
}

/// Makes the ranges that are missing. Their ids are refused from 72 hours after they were made, by a clock that may be an
/// hour ahead when they are recorded; and an hour is for caution.
pub(crate) async fn make(client: &Client) -> Result<Room, StoreError> {
    const SQL: &str = "select (select min(last_position) from weft.log_partition where last_position > \
                       (select coalesce(max(last_position), 0) from weft.log_batch)), \
                       audit.position_at(clock_timestamp() - interval '74 hours'), \
                       (select coalesce(max(position), 0) from weft.scope_head_mark)";
    let doing = StoreError::while_doing("make room for events");
    client.execute("select weft.make_partitions()", &[]).await.map_err(&doing)?;
    let row = client.query_one(SQL, &[]).await.map_err(&doing)?;
    let position = |column| Position(row.get::<_, i64>(column).cast_unsigned());
    let mut room =
        Room { range_end: position(0), forgotten: position(1), closed: position(2), ranges: Vec::new() };
    room.find_ranges(client).await?;
    Ok(room)
}

impl Room {
    /// Finds the closed ranges that are not known yet.
    async fn find_ranges(&mut self, client: &Client) -> Result<(), StoreError> {
        const RANGES_SQL: &str = "select first_position, last_position from weft.log_partition \
                                  where last_position > $1 and last_position <= $2 order by 1";
        const GREATEST_SQL: &str = "select command_id from weft.event where position between $1 and $2 \
                                    and fingerprint is not null order by command_id desc limit 1";
        let doing = StoreError::while_doing("look at the log's ranges");
        let known = self.ranges.last().map_or(self.forgotten, |range| range.last);
        let (known, closed) = (known.0.cast_signed(), self.closed.0.cast_signed());
        for row in client.query(RANGES_SQL, &[&known, &closed]).await.map_err(&doing)? {
            let (first, last): (i64, i64) = (row.get(0), row.get(1));
            let found = client.query_opt(GREATEST_SQL, &[&first, &last]).await.map_err(&doing)?;
            // One that is sealed holds no command that may be repeated.
            let greatest = found.map_or(Uuid::nil(), |row| row.get(0));
            let before = self.ranges.last().map_or(Uuid::nil(), |range| range.greatest);
            let last = Position(last.cast_unsigned());
            self.ranges.push(Range { last, greatest: greatest.max(before) });
        }
        Ok(())
    }
}

/// Looks after the ranges while events are committed, until `closing`.
pub(crate) async fn look_after(
    config: Config,
    behind: Arc<Behind>,
    mut committed: watch::Receiver<Position>,
    closing: CancellationToken,
) {
    let work = async {
        loop {
            match tend(&config).await {
                Ok(room) => {
                    let range_end = room.range_end;
                    behind.learn(room);
                    if committed.wait_for(|position| *position >= range_end).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "no room is made for events yet");
                    sleep(RETRY).await;
                }
            }
        }
    };
    closing.run_until_cancelled(work).await;
}

/// Makes and closes what is due, on a connection of its own: a million times fewer than there are events.
async fn tend(config: &Config) -> Result<Room, StoreError> {
    let session = Session::open(config, Duty::Append).await?;
    let mut room = make(&session.client).await?;
    loop {
        let closed = session.client.query_one("select weft.close_partition()", &[]).await;
        let closed = closed.map_err(StoreError::while_doing("close a range"))?;
        match closed.get::<_, Option<i64>>(0) {
            Some(position) => {
                tracing::info!(position, "closed a range of the log");
                room.closed = Position(position.cast_unsigned());
                room.find_ranges(&session.client).await?;
            }
            None => return Ok(room),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_looked_for_wherever_one_like_it_could_be() {
        let range = |last, greatest| Range { last: Position(last), greatest: Uuid::from_u128(greatest) };
        let behind = Behind::default();
        assert_eq!(behind.commands_after([&Uuid::from_u128(5)]), 0);
        behind.learn(Room {
            forgotten: Position(100),
            ranges: vec![range(200, 10), range(300, 20), range(400, 20), range(500, 30)],
            ..Room::default()
        });
        for (ids, after) in [
            (&[31][..], 500),
            (&[30], 400),
            (&[21], 400),
            (&[20], 200),
            (&[10], 100),
            (&[1], 100),
            (&[31, 21], 400),
            (&[], 500),
        ] {
            let ids: Vec<Uuid> = ids.iter().map(|id| Uuid::from_u128(*id)).collect();
            assert_eq!(behind.commands_after(&ids), after, "{ids:?}");
        }
    }
}
