//! Room for what is to come: the log's ranges of positions, made ahead, and closed once they are full.
//!
//! Which ranges there are, and what closing one means, is in `migrations/0004_log_growth.sql`; both are done by functions
//! that run with their owner's rights, so that an appender needs none. Every appending process does this; they wait for
//! each other and find it done. Appends do not wait for it: ranges are made while a whole one is still free, and until a
//! range is closed its scopes are looked up in it. What a session must know of them at its start takes two queries.
//!
//! [`Behind`] says where appends need not look. Invariant: no command that may be repeated was recorded where it is not looked
//! for, and no scope has a later event there than `weft.scope_head` says. `a_repeat_is_found_in_whichever_range_…` in
//! `tests/sql/growth.rs` tries to break it.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_postgres::{Client, Config};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use weft_model::Chain;
use weft_model::version::{Epoch, Position};

use crate::session::{Duty, Session, StoreError};

/// Pause after it failed. There is room for a whole range until then.
const RETRY: Duration = Duration::from_secs(5);

/// What there is. A range of a million events each, it stays small: those of three days at the fastest are some thousands.
#[derive(Clone, Debug, Default)]
pub(crate) struct Room {
    /// The log's life that it was found in.
    epoch: Epoch,
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
    /// Takes what was found, unless it is of an earlier life of the log: what a server that is not the log's any more says is
    /// not to be believed.
    pub(crate) fn learn(&self, room: Room) {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if room.epoch >= known.epoch {
            *known = room;
        }
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

/// Makes the ranges that are missing. Commands are refused from 72 hours after their ids were made, by a clock that may be an
/// hour ahead when they are recorded; and an hour is for caution, such as a database's clock that is set back.
pub(crate) async fn make(client: &Client) -> Result<Room, StoreError> {
    const SQL: &str = "select (select coalesce(max(epoch), 0) from weft.log_epoch), \
                       (select min(last_position) from weft.log_partition where last_position > \
                       (select coalesce(max(last_position), 0) from weft.log_batch)), \
                       audit.position_at(clock_timestamp() - interval '74 hours')";
    let doing = StoreError::while_doing("make room for events");
    client.execute("select weft.make_partitions()", &[]).await.map_err(&doing)?;
    let row = client.query_one(SQL, &[]).await.map_err(&doing)?;
    let position = |column| Position(row.get::<_, i64>(column).cast_unsigned());
    let mut room = Room {
        epoch: Epoch(row.get::<_, i64>(0).cast_unsigned()),
        range_end: position(1),
        forgotten: position(2),
        ..Room::default()
    };
    room.find_closed(client).await?;
    Ok(room)
}

impl Room {
    /// Finds what is closed.
    async fn find_closed(&mut self, client: &Client) -> Result<(), StoreError> {
        const SQL: &str = "select position, greatest_command from weft.scope_head_mark \
                           where position >= (select coalesce(max(position), 0) from weft.scope_head_mark) or position > $1 \
                           order by position";
        let rows = client.query(SQL, &[&self.forgotten.0.cast_signed()]).await;
        self.ranges.clear();
        let mut before = Uuid::nil();
        for row in rows.map_err(StoreError::while_doing("look at the log's ranges"))? {
            self.closed = Position(row.get::<_, i64>(0).cast_unsigned());
            // Where it is not known, it could be any.
            let greatest = row.get::<_, Option<Uuid>>(1).unwrap_or(Uuid::max()).max(before);
            if self.closed > self.forgotten {
                self.ranges.push(Range { last: self.closed, greatest });
            }
            before = greatest;
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
                room.find_closed(&session.client).await?;
            }
            None => return Ok(room),
        }
    }
}

/// Lays a log without any event out in ranges of so many positions: for tests and measurements that have no million events.
/// Nobody may have it open.
///
/// # Errors
/// If the store fails, or the log has events.
pub async fn lay_out(connect: &Config, positions: u32) -> Result<(), StoreError> {
    let sql = format!(
        "do $$ declare made text; begin \
           if exists (select from weft.event) then raise exception 'the log has events'; end if; \
           for made in select table_name from weft.log_partition loop \
             execute format('drop table weft.%I', made); \
           end loop; \
         end $$; \
         alter table weft.log_partition disable trigger append_only; \
         delete from weft.log_partition; \
         alter table weft.log_partition enable always trigger append_only; \
         update weft.log_layout set partition_events = {positions}"
    );
    let session = Session::open(connect, Duty::Own).await?;
    session.client.batch_execute(&sql).await.map_err(StoreError::while_doing("lay the log out"))
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
        let room = behind.read().clone();
        behind.learn(Room { epoch: Epoch(1), closed: Position(7), ..room });
        behind.learn(Room { closed: Position(9), ..Room::default() });
        assert_eq!(behind.closed(), 7, "what an earlier life had is not believed");
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
