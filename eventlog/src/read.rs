//! Reading: pages by position, the whole log in bulk, the head, a point in time.
//!
//! Because the log only grows at its end and positions have no gap, a page needs no transaction: pages that are read
//! one after another fit together. Readers never wait for writers, nor writers for readers. What is sealed is read as if
//! it were rows.
//!
//! Deliberately absent: any meaning of payloads, and filters other than position.

pub(crate) mod copy;
mod pool;
pub(crate) mod replay;
mod rows;
pub(crate) mod sealed;

use futures_util::stream::{Stream, try_unfold};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_postgres::Config;
use tokio_postgres::types::ToSql;
use uuid::Uuid;
use weft_model::version::{Epoch, Position};

use crate::event::{RecordedEvent, UnixMicros};
use crate::hash::EventHash;
use crate::notify;
use crate::page::Page;
use crate::partitions::Behind;
use crate::request::Appended;
use crate::rewind::{self, Adoption, Point, Rewind};
use crate::segment::{Segment, SegmentError};
use crate::session::StoreError;
use crate::tail::{Delivered, Tail};
use pool::{Pool, Query};
use replay::Replay;

pub(crate) use rows::{OUTCOMES_SQL, decode_outcome};

/// Events that one page may hold.
pub const PAGE_EVENTS_MAX: usize = 4_096;
/// Bytes at which a page is full: what a reader holds in memory, plus one event.
pub const PAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Longest silence of the server before a page of a bulk read: it may have to wait for the disk, and for an archive that
/// takes a range away.
pub(crate) const REPLAY_SILENCE_MAX: Duration = Duration::from_secs(30);
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
    /// The end of the last batch: the last position that any accepted command was told.
    pub(crate) acknowledged: Position,
    /// Up to where the log is sealed.
    pub(crate) sealed: Position,
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
    behind: Arc<Behind>,
    /// Up to where the log is known to be sealed; it may be further by now.
    sealed: AtomicU64,
    /// Listens for hints once somebody tails; ends with the last clone of the reader.
    listener: Mutex<JoinSet<()>>,
}

impl Reader {
    /// A reader of the log in the configured database. Connects when first used.
    #[must_use]
    pub fn new(connect: Config) -> Self {
        Self::with_shared(connect, watch::Sender::new(Position::ZERO), Delivered::default(), Arc::default())
    }

    /// `wake` is told positions that exist, by whoever learns of them first.
    /// `behind` says where commands need not be looked for.
    pub(crate) fn with_shared(
        connect: Config,
        wake: watch::Sender<Position>,
        delivered: Delivered,
        behind: Arc<Behind>,
    ) -> Self {
        let listener = Mutex::new(JoinSet::new());
        Self {
            shared: Arc::new(Shared {
                pool: Pool::new(connect),
                wake,
                delivered,
                behind,
                sealed: AtomicU64::new(0),
                listener,
            }),
        }
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
        let limit = limit.clamp(1, PAGE_EVENTS_MAX);
        if after.0 < self.shared.sealed.load(Ordering::Relaxed)
            && let Some(page) = self.read_sealed(after, to, limit).await?
        {
            return Ok(page);
        }
        let bounds = (signed(after.0), signed(to.0), signed(limit as u64));
        let params: [&(dyn ToSql + Sync); 3] = [&bounds.0, &bounds.1, &bounds.2];
        let rows = self.shared.pool.rows(Query::Range, &params, PAGE_BYTES_MAX).await?;
        let page = rows.iter().map(rows::decode_event).collect::<Result<Vec<_>, _>>()?;
        // Where the next one is not there, it may be sealed.
        if after < to
            && page.first().is_none_or(|first| first.position != after.next())
            && let Some(page) = self.read_sealed(after, to, limit).await?
        {
            return Ok(page);
        }
        Ok(page)
    }

    /// The same of what is sealed; none if the event after `after` is not.
    async fn read_sealed(
        &self,
        after: Position,
        to: Position,
        limit: usize,
    ) -> Result<Option<Vec<RecordedEvent>>, StoreError> {
        let next = signed(after.next().0);
        let rows = self.shared.pool.rows(Query::Segment, &[&next], usize::MAX).await?;
        let Some(segment) = rows.first().map(sealed::decode).transpose()? else { return Ok(None) };
        self.shared.sealed.fetch_max(segment.last.0, Ordering::Relaxed);
        let events = record(&segment)?.into_iter();
        Ok(Some(events.filter(|event| after < event.position && event.position <= to).take(limit).collect()))
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

    /// As [`stream`](Self::stream), but in bulk: made for walking the whole log. Has a connection of its own; while it lasts,
    /// an archive waits.
    pub fn replay(
        &self,
        after: Position,
        to: Position,
    ) -> impl Stream<Item = Result<Page, StoreError>> + Send + use<> {
        let replay = Replay::new(self.shared.pool.config().clone(), after, to);
        try_unfold(replay, |mut replay| async move { Ok(replay.next().await?.map(|page| (page, replay))) })
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
        let at = time.to_database();
        let rows = self.shared.pool.rows(Query::PositionAt, &[&at], usize::MAX).await?;
        let row = rows.first().ok_or(StoreError::NotMigrated)?;
        let whole = Position(rows::counter(row, 0)?);
        // What is sealed is told by whole segments. The next one may begin in time.
        let rows = self.shared.pool.rows(Query::Segment, &[&signed(whole.next().0)], usize::MAX).await?;
        let Some(segment) = rows.first().map(sealed::decode).transpose()? else { return Ok(whole) };
        let page = segment.open().map_err(|source| broken(&segment, source))?;
        let within = page.events().rfind(|event| event.recorded_at <= time);
        Ok(within.map_or(whole, |event| event.position))
    }

    /// What a command recorded; `None` if it was never accepted, had no events, or was sealed. The reader of an open log
    /// looks no further back than [`OUTCOME_KEPT`](crate::OUTCOME_KEPT).
    ///
    /// # Errors
    /// If the store fails or holds what the log never writes.
    pub async fn outcome(&self, command_id: Uuid) -> Result<Option<CommandOutcome>, StoreError> {
        let after = self.shared.behind.commands_after([&command_id]);
        let ids = [command_id].to_vec();
        let rows = self.shared.pool.rows(Query::Outcomes, &[&ids, &after], usize::MAX).await?;
        rows.first().map(decode_outcome).transpose()
    }

    /// What testifies about the log.
    pub(crate) async fn evidence(&self) -> Result<Evidence, StoreError> {
        let rows = self.shared.pool.rows(Query::Evidence, &[], usize::MAX).await?;
        rows.first().map_or(Err(StoreError::NotMigrated), rows::decode_evidence)
    }

    /// What became of the event at a position.
    pub(crate) async fn anchor(&self, at: Position) -> Result<Anchor, StoreError> {
        let rows = self.shared.pool.rows(Query::Anchor, &[&signed(at.0)], usize::MAX).await?;
        let found = rows.first().map_or(Err(StoreError::NotMigrated), rows::decode_anchor)?;
        let Anchor::Gone { end } = found else { return Ok(found) };
        let sealed = self.read_sealed(Position(at.0.saturating_sub(1)), at, 1).await?;
        let hash = sealed.and_then(|events| events.first().map(|event| event.hash));
        Ok(hash.map_or(found, |hash| Anchor::Stands { hash, end }))
    }

    /// The findings that stand, the oldest first: while there is one, nothing is appended.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn standing_rewinds(&self) -> Result<Vec<Rewind>, StoreError> {
        let rows = self.shared.pool.rows(Query::Rewinds, &[], usize::MAX).await?;
        rows.iter().map(rewind::decode_rewind).collect()
    }

    /// The newest decision to go on with a log that was rewound.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn newest_adoption(&self) -> Result<Option<Adoption>, StoreError> {
        let rows = self.shared.pool.rows(Query::Adoption, &[], usize::MAX).await?;
        rows.first().map(rewind::decode_adoption).transpose()
    }

    /// Whether what was seen belongs to a history that was given up.
    pub(crate) async fn given_up(&self, seen: &Point) -> Result<bool, StoreError> {
        let (epoch, position) = (signed(seen.epoch.0), signed(seen.position.0));
        let rows = self.shared.pool.rows(Query::GivenUp, &[&epoch, &position], usize::MAX).await?;
        Ok(rows.first().is_some_and(|row| row.get(0)))
    }

    pub(crate) fn config(&self) -> &Config {
        self.shared.pool.config()
    }

    pub(crate) fn delivered(&self) -> &Delivered {
        &self.shared.delivered
    }
}

/// The events of a segment with their hashes, which must lead from the one before it to the one at its end.
fn record(segment: &Segment) -> Result<Vec<RecordedEvent>, StoreError> {
    let page = segment.open().map_err(|source| broken(segment, source))?;
    let mut hash = segment.previous_hash;
    let events = page.events().map(|event| {
        hash = event.chain(hash);
        event.record(hash)
    });
    let events = events.collect();
    if hash != segment.last_hash {
        return Err(StoreError::Broken { position: segment.last });
    }
    Ok(events)
}

pub(crate) const fn broken(segment: &Segment, source: SegmentError) -> StoreError {
    StoreError::Segment { first: segment.first, source }
}

/// How many events to ask for next. A page that was cut short was full of bytes, and the rest of what the server sent
/// was thrown away, so the next one asks for what fitted; short events let it grow again.
pub(crate) fn next_limit(got: usize, asked: usize) -> usize {
    if got < asked { got.max(16) } else { (asked * 2).min(PAGE_EVENTS_MAX) }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
