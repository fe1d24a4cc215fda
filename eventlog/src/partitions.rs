//! Room for what is to come: the log's ranges of positions, made ahead, and closed once they are full.
//!
//! Which ranges there are, and what closing one means, is in `migrations/0004_log_growth.sql`; both are done by functions
//! that run with their owner's rights, so that an appender needs none. Every appending process does this; they wait for
//! each other and find it done. Nothing else waits for it: ranges are made while a whole one is still free, and until a
//! range is closed its scopes are looked up in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_postgres::{Client, Config};
use tokio_util::sync::CancellationToken;
use weft_model::Chain;
use weft_model::version::Position;

use crate::session::{Duty, Session, StoreError};

/// Pause after it failed. There is room for a whole range until then.
const RETRY: Duration = Duration::from_secs(5);

/// What there is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    /// The end of the range that the log's end is in.
    pub(crate) range_end: Position,
    /// Commands that were recorded up to here are too old to be repeated.
    forgotten: Position,
    /// Up to here the version of each scope is kept beside the log.
    closed: Position,
}

/// What nobody has to look for in the log's rows any more. What is known of it may be older than what is true: then more
/// ranges are looked at than need be, and the same is found. It is told to statements as numbers, so that they are planned
/// without the ranges before it: what they cost would otherwise grow with the log.
#[derive(Debug, Default)]
pub(crate) struct Behind {
    forgotten: AtomicI64,
    closed: AtomicI64,
}

impl Behind {
    pub(crate) fn learn(&self, room: &Room) {
        self.forgotten.store(room.forgotten.0.cast_signed(), Ordering::Relaxed);
        self.closed.store(room.closed.0.cast_signed(), Ordering::Relaxed);
    }

    /// See [`Room::forgotten`].
    pub(crate) fn forgotten(&self) -> i64 {
        self.forgotten.load(Ordering::Relaxed)
    }

    /// See [`Room::closed`].
    pub(crate) fn closed(&self) -> i64 {
        self.closed.load(Ordering::Relaxed)
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
    Ok(Room { range_end: position(0), forgotten: position(1), closed: position(2) })
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
                    behind.learn(&room);
                    if committed.wait_for(|position| *position >= room.range_end).await.is_err() {
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
            }
            None => return Ok(room),
        }
    }
}
