//! Following the log, and noticing that it was rewound.
//!
//! What is delivered depends only on polling by position. The in-process wake-up and PostgreSQL's notifications are
//! hints: a lost one costs at most half a second, a false one an empty query.
//!
//! Positions alone do not tell that the database lost events that were read and has recorded others in their place, in
//! the same epoch perhaps. So a tail keeps the hash of the event that it stands on, its *anchor*, and every event that
//! it delivers follows that one. Where nothing comes for a while it looks whether the anchor is still there. What the
//! tails of a process have delivered is also known to its writer ([`Delivered`]), which refuses to append to a log
//! without it.
//!
//! A standby that has not got as far as the anchor proves nothing and is waited for.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;
use weft_model::version::{Epoch, Position};

use crate::event::RecordedEvent;
use crate::hash::EventHash;
use crate::read::{Anchor, FIRST_PAGE, PAGE_BYTES_MAX, Reader, next_limit};
use crate::rewind::Point;
use crate::session::StoreError;

/// Pause before the log is asked again without a hint, right after events came and after a quiet time. Hints
/// usually come first; the polls bound how late a lost hint makes a reader.
const POLL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Yields every event after a position, once and in order, as it is committed.
///
/// Each event follows the one before it by its hash, the first one the event that the tail began after. If the log
/// loses an event that was delivered, the tail says so within two seconds, if the store answers, whether or not
/// another event takes the place of the lost one.
#[derive(Debug)]
pub struct Tail {
    reader: Reader,
    after: Position,
    /// Hash of the event at `after`; `None` until it was looked up.
    hash: Option<EventHash>,
    wake: watch::Receiver<Position>,
    pause: Duration,
    limit: usize,
}

impl Tail {
    pub(crate) fn new(reader: Reader, after: Position, wake: watch::Receiver<Position>) -> Self {
        let hash = (after == Position::ZERO).then_some(EventHash::GENESIS);
        Self { reader, after, hash, wake, pause: POLL.0, limit: FIRST_PAGE }
    }

    /// The last position that was delivered.
    #[must_use]
    pub fn position(&self) -> Position {
        self.after
    }

    /// Waits for the next events and returns a page of them, never an empty one. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`StoreError::Rewound`] if the event that the tail stands on is not in the log any more (or, at first, never
    /// was), and [`StoreError::Broken`] if the next one does not follow it: these stay. Otherwise if the store fails or
    /// holds what the log never writes: the tail stays where it is; call again to go on.
    pub async fn next(&mut self) -> Result<Vec<RecordedEvent>, StoreError> {
        loop {
            // Before reading, so that a hint that comes during the read is not lost.
            self.wake.mark_unchanged();
            if let Some(hash) = self.anchor_hash().await? {
                let page = self.reader.read(self.after, self.limit).await?;
                if !page.is_empty() {
                    self.check(&page, hash).await?;
                    self.advance(&page);
                    return Ok(page);
                }
                // While events come, they tell. A quiet log may have become shorter.
                if self.pause == POLL.1 {
                    self.look_back(hash).await?;
                }
            }
            // The reader, which is ours, keeps the other end alive.
            let _ = timeout(self.pause, self.wake.changed()).await;
            self.pause = (self.pause * 2).min(POLL.1);
        }
    }

    /// The hash of the event that the tail stands on; `None` if the server has not got so far yet.
    async fn anchor_hash(&mut self) -> Result<Option<EventHash>, StoreError> {
        if self.hash.is_none() {
            self.hash = match self.reader.anchor(self.after).await? {
                Anchor::Stands { hash, .. } => {
                    // Who begins here has read what is before elsewhere, in bulk.
                    self.reader.delivered().note(self.after, hash);
                    Some(hash)
                }
                Anchor::NotYet => None,
                Anchor::Gone { end } => return Err(StoreError::Rewound { seen: self.after, found: end }),
            };
        }
        Ok(self.hash)
    }

    /// Checks that a page follows the anchor, event by event.
    async fn check(&self, page: &[RecordedEvent], anchor: EventHash) -> Result<(), StoreError> {
        let Some(stray) = first_stray(page, self.after, anchor) else { return Ok(()) };
        // A page is of one moment, so only its first event may be of another history than the anchor.
        if page.first().is_some_and(|first| first.position == stray) {
            self.look_back(anchor).await?;
        }
        Err(StoreError::Broken { position: stray })
    }

    /// Checks that the event that the tail stands on is still there.
    async fn look_back(&self, hash: EventHash) -> Result<(), StoreError> {
        if self.after == Position::ZERO {
            return Ok(());
        }
        let found = match self.reader.anchor(self.after).await? {
            Anchor::NotYet => return Ok(()),
            Anchor::Stands { hash: stored, .. } if stored == hash => return Ok(()),
            Anchor::Stands { end, .. } | Anchor::Gone { end } => end,
        };
        self.reader.delivered().lose(self.after, hash);
        Err(StoreError::Rewound { seen: self.after, found })
    }

    fn advance(&mut self, page: &[RecordedEvent]) {
        if let Some(last) = page.last() {
            self.after = last.position;
            self.hash = Some(last.hash);
            self.reader.delivered().note(last.position, last.hash);
            self.reader.delivered().in_epoch(last.epoch);
        }
        self.pause = POLL.0;
        self.limit = self.limit_after(page);
    }

    /// A short page at the end of the log says nothing about the size of events; a short one of many bytes does.
    fn limit_after(&self, page: &[RecordedEvent]) -> usize {
        let bytes: usize = page.iter().map(|event| event.payload.len()).sum();
        if bytes >= PAGE_BYTES_MAX / 2 {
            next_limit(page.len(), self.limit)
        } else {
            next_limit(self.limit, self.limit)
        }
    }
}

/// The first event that does not follow the one before it, of which the first one is at `after` and has this hash. Pure.
#[must_use]
pub fn first_stray(page: &[RecordedEvent], after: Position, hash: EventHash) -> Option<Position> {
    let mut before = (after, hash);
    for event in page {
        if event.position != before.0.next() || event.expected_hash(before.1) != event.hash {
            return Some(event.position);
        }
        before = (event.position, event.hash);
    }
    None
}

/// The newest event that a tail of this process has delivered, for the writer of this process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delivered {
    newest: Arc<Mutex<Newest>>,
    /// The newest event that this process knows to be lost, read here or appended here.
    lost: watch::Sender<Option<Point>>,
}

#[derive(Debug, Default)]
struct Newest {
    event: Option<(Position, EventHash)>,
    /// The latest epoch that this process knows of.
    epoch: Epoch,
    /// Set once that event was found to be lost: later ones are of another history, and must not cover it.
    lost: bool,
}

impl Delivered {
    /// The newest event, or the one that was lost.
    pub(crate) fn newest(&self) -> Option<(Position, EventHash)> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).event
    }

    fn note(&self, position: Position, hash: EventHash) {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if !newest.lost && newest.event.is_none_or(|(known, _)| known < position) {
            newest.event = Some((position, hash));
        }
    }

    /// The log is in this epoch, or in a later one.
    pub(crate) fn in_epoch(&self, epoch: Epoch) {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        newest.epoch = newest.epoch.max(epoch);
    }

    fn lose(&self, position: Position, hash: EventHash) {
        {
            let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
            (newest.event, newest.lost) = (Some((position, hash)), true);
        }
        self.tell_lost(position, hash);
    }

    /// Tells those who watch that an event which was in the log is not any more.
    pub(crate) fn tell_lost(&self, position: Position, hash: EventHash) {
        let epoch = self.newest.lock().unwrap_or_else(PoisonError::into_inner).epoch;
        self.lost.send_if_modified(|lost| {
            let further = lost.is_none_or(|known| known.position < position);
            if further {
                *lost = Some(Point { epoch, position, hash });
            }
            further
        });
    }

    pub(crate) fn lost(&self) -> watch::Receiver<Option<Point>> {
        self.lost.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_is_not_covered_by_what_came_in_its_place() {
        let delivered = Delivered::default();
        assert_eq!(delivered.newest(), None);
        let hash = |n| EventHash([n; 32]);
        delivered.note(Position(5), hash(5));
        delivered.note(Position(4), hash(4));
        assert_eq!(delivered.newest(), Some((Position(5), hash(5))));
        delivered.lose(Position(5), hash(5));
        delivered.note(Position(6), hash(6));
        assert_eq!(delivered.newest(), Some((Position(5), hash(5))));
    }
}
