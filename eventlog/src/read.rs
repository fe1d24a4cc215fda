//! Reading: pages by position or scope, the head, a point in time.
//!
//! Because the log only grows at its end and positions have no gap, a page needs no transaction: pages that are read
//! one after another fit together. Readers never wait for writers, nor writers for readers.
//!
//! Deliberately absent: any meaning of payloads, and filters other than position and scope.

mod pool;
mod rows;

use futures_util::stream::{Stream, try_unfold};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_postgres::Config;
use tokio_postgres::types::ToSql;
use uuid::Uuid;
use weft_model::version::{Epoch, Position, Version};

use crate::event::{RecordedEvent, UnixMicros};
use crate::hash::EventHash;
use crate::notify;
use crate::request::Appended;
use crate::session::StoreError;
use crate::tail::{Delivered, Tail};
use pool::{Pool, Query};

pub(crate) use rows::{OUTCOMES_SQL, decode_outcome};

/// Events that one page may hold.
pub const PAGE_EVENTS_MAX: usize = 4_096;
/// Bytes at which a page is full: what a reader holds in memory, plus one event.
pub const PAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Events asked for before it is known how large they are.
pub(crate) const FIRST_PAGE: usize = 512;

/// The end of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// The current epoch; zero if the log was never opened for appending.
    pub epoch: Epoch,
    /// Position of the last event; zero if there is none.
    pub position: Position,
    /// Hash of the last event; [`EventHash::GENESIS`] if there is none.
    pub hash: EventHash,
    /// When the last event was recorded.
    pub recorded_at: Option<UnixMicros>,
}

/// What an accepted command recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandOutcome {
    /// The command.
    pub command_id: Uuid,
    /// SHA-256 of what it asked for, see [`AppendRequest::fingerprint`](crate::AppendRequest::fingerprint).
    pub fingerprint: [u8; 32],
    /// What its first acceptance returned.
    pub appended: Appended,
}

/// What testifies about the log, all of one moment.
#[derive(Clone, Debug)]
pub(crate) struct Evidence {
    pub(crate) head: Head,
    /// What each epoch found when it was opened: the last position and its hash.
    pub(crate) forks: Vec<(Epoch, Position, EventHash)>,
    /// The last position that any accepted command was told.
    pub(crate) acknowledged: Position,
}

/// What the outcome of a command says about the events that it recorded.
#[derive(Clone, Debug)]
pub(crate) struct Testimony {
    pub(crate) command_id: Uuid,
    pub(crate) epoch: Epoch,
    pub(crate) positions: RangeInclusive<Position>,
    pub(crate) recorded_at: UnixMicros,
}

/// What became of an event that was read before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Anchor {
    /// An event is there, with this hash.
    Stands { hash: EventHash, end: Position },
    /// Not there, but this server is a standby, which may not have got so far yet.
    NotYet,
    /// Not there.
    Gone { end: Position },
}

/// Reads a log. Cheap to clone; clones share a few connections, which are made when first needed.
///
/// The role `weft_reader` is enough for everything here.
#[derive(Clone, Debug)]
pub struct Reader {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    pool: Pool,
    wake: watch::Sender<Position>,
    /// What tails have delivered; the writer of this process looks at it.
    delivered: Delivered,
    /// Listens for hints once somebody tails; ends with the last clone of the reader.
    listener: Mutex<JoinSet<()>>,
}

impl Reader {
    /// A reader of the log in the configured database. Connects when first used.
    #[must_use]
    pub fn new(connect: Config) -> Self {
        Self::with_shared(connect, watch::Sender::new(Position::ZERO), Delivered::default())
    }

    /// `wake` is told positions that exist, by whoever learns of them first.
    pub(crate) fn with_shared(connect: Config, wake: watch::Sender<Position>, delivered: Delivered) -> Self {
        let listener = Mutex::new(JoinSet::new());
        Self { shared: Arc::new(Shared { pool: Pool::new(connect), wake, delivered, listener }) }
    }

    /// The end of the log.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn head(&self) -> Result<Head, StoreError> {
        let rows = self.shared.pool.rows(Query::Head, &[], usize::MAX).await?;
        rows.first().map_or(Err(StoreError::NotMigrated), rows::decode_head)
    }

    /// Events after a position, in order: at most `limit` (but at least one), [`PAGE_EVENTS_MAX`], or about
    /// [`PAGE_BYTES_MAX`] bytes of them, whichever is least. Only an empty answer means that there are no more.
    ///
    /// # Errors
    /// If the store fails or holds what the log never writes.
    pub async fn read(&self, after: Position, limit: usize) -> Result<Vec<RecordedEvent>, StoreError> {
        self.read_to(after, Position(i64::MAX.cast_unsigned()), limit).await
    }

    /// As [`read`](Self::read), but nothing after `to`.
    pub(crate) async fn read_to(
        &self,
        after: Position,
        to: Position,
        limit: usize,
    ) -> Result<Vec<RecordedEvent>, StoreError> {
        let bounds = (signed(after.0), signed(to.0), signed(limit.clamp(1, PAGE_EVENTS_MAX) as u64));
        let params: [&(dyn ToSql + Sync); 3] = [&bounds.0, &bounds.1, &bounds.2];
        let rows = self.shared.pool.rows(Query::Range, &params, PAGE_BYTES_MAX).await?;
        rows.iter().map(rows::decode_event).collect()
    }

    /// Events of one scope after a version, in order, bounded as [`read`](Self::read) is.
    ///
    /// # Errors
    /// If the store fails or holds what the log never writes.
    pub async fn read_scope(
        &self,
        scope: &str,
        after: Version,
        limit: usize,
    ) -> Result<Vec<RecordedEvent>, StoreError> {
        let (after, limit) = (signed(after.0), signed(limit.clamp(1, PAGE_EVENTS_MAX) as u64));
        let rows = self.shared.pool.rows(Query::Scope, &[&scope, &after, &limit], PAGE_BYTES_MAX).await?;
        rows.iter().map(rows::decode_event).collect()
    }

    /// The events after `after` up to and including `to`, in order, a page at a time and so in bounded memory. Ends
    /// early where the log ends.
    pub fn stream(
        &self,
        after: Position,
        to: Position,
    ) -> impl Stream<Item = Result<Vec<RecordedEvent>, StoreError>> + Send + use<> {
        let start = (self.clone(), after, FIRST_PAGE);
        try_unfold(start, move |(reader, after, limit)| async move {
            if after >= to {
                return Ok(None);
            }
            let page = reader.read_to(after, to, limit).await?;
            let Some(last) = page.last().map(|event| event.position) else { return Ok(None) };
            let limit = next_limit(page.len(), limit);
            Ok(Some((page, (reader, last, limit))))
        })
    }

    /// Follows the log from after a position; see [`Tail`]. Needs a tokio runtime.
    #[must_use]
    pub fn tail(&self, after: Position) -> Tail {
        let mut listener = self.shared.listener.lock().unwrap_or_else(PoisonError::into_inner);
        if listener.is_empty() {
            listener.spawn(notify::listen(self.shared.pool.config().clone(), self.shared.wake.clone()));
        }
        Tail::new(self.clone(), after, self.shared.wake.subscribe())
    }

    /// Position of the last event recorded at or before a point in time; zero if there is none.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn position_at(&self, time: UnixMicros) -> Result<Position, StoreError> {
        let time = time.to_database();
        let rows = self.shared.pool.rows(Query::PositionAt, &[&time], usize::MAX).await?;
        rows.first().map_or(Err(StoreError::NotMigrated), |row| Ok(Position(rows::counter(row, 0)?)))
    }

    /// What a command recorded; `None` if it was never accepted, or had no events.
    ///
    /// # Errors
    /// If the store fails or holds what the log never writes.
    pub async fn outcome(&self, command_id: Uuid) -> Result<Option<CommandOutcome>, StoreError> {
        let ids = [command_id].to_vec();
        let rows = self.shared.pool.rows(Query::Outcomes, &[&ids], usize::MAX).await?;
        rows.first().map(decode_outcome).transpose()
    }

    /// What testifies about the log.
    pub(crate) async fn evidence(&self) -> Result<Evidence, StoreError> {
        let rows = self.shared.pool.rows(Query::Evidence, &[], usize::MAX).await?;
        rows.first().map_or(Err(StoreError::NotMigrated), rows::decode_evidence)
    }

    /// What commands were told, in the order of their events: a page of those whose events end after a position.
    pub(crate) async fn testimony(&self, after: Position) -> Result<Vec<Testimony>, StoreError> {
        let (after, limit) = (signed(after.0), signed(PAGE_EVENTS_MAX as u64));
        let rows = self.shared.pool.rows(Query::Testimony, &[&after, &limit], usize::MAX).await?;
        rows.iter().map(rows::decode_testimony).collect()
    }

    /// What became of the event at a position.
    pub(crate) async fn anchor(&self, at: Position) -> Result<Anchor, StoreError> {
        let rows = self.shared.pool.rows(Query::Anchor, &[&signed(at.0)], usize::MAX).await?;
        rows.first().map_or(Err(StoreError::NotMigrated), rows::decode_anchor)
    }

    pub(crate) fn delivered(&self) -> &Delivered {
        &self.shared.delivered
    }
}

/// How many events to ask for next. A page that was cut short was full of bytes, and the rest of what the server sent
/// was thrown away, so the next one asks for what fitted; short events let it grow again.
pub(crate) fn next_limit(got: usize, asked: usize) -> usize {
    if got < asked { got.max(16) } else { (asked * 2).min(PAGE_EVENTS_MAX) }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
