//! Following the log.

use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;
use weft_model::version::Position;

use crate::event::RecordedEvent;
use crate::read::{FIRST_PAGE, PAGE_BYTES_MAX, Reader, next_limit};
use crate::session::StoreError;

/// Pause before the log is asked again without a hint, right after events came and after a quiet time. Hints
/// usually come first; the polls bound how late a lost hint makes a reader.
const POLL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Yields every event after a position, once and in order, as it is committed.
///
/// What is delivered depends only on polling by position. The in-process wake-up and PostgreSQL's notifications are
/// hints: a lost one costs at most half a second, a false one an empty query.
#[derive(Debug)]
pub struct Tail {
    reader: Reader,
    after: Position,
    wake: watch::Receiver<Position>,
    pause: Duration,
    limit: usize,
}

impl Tail {
    pub(crate) fn new(reader: Reader, after: Position, wake: watch::Receiver<Position>) -> Self {
        Self { reader, after, wake, pause: POLL.0, limit: FIRST_PAGE }
    }

    /// The last position that was delivered.
    #[must_use]
    pub fn position(&self) -> Position {
        self.after
    }

    /// Waits for the next events and returns a page of them, never an empty one. Dropping the future loses nothing.
    ///
    /// # Errors
    /// If the store fails or holds what the log never writes. The tail stays where it is; call again to go on.
    pub async fn next(&mut self) -> Result<Vec<RecordedEvent>, StoreError> {
        loop {
            // Before reading, so that a hint that comes during the read is not lost.
            self.wake.mark_unchanged();
            let page = self.reader.read(self.after, self.limit).await?;
            if let Some(last) = page.last() {
                self.after = last.position;
                self.pause = POLL.0;
                self.limit = self.limit_after(&page);
                return Ok(page);
            }
            // The reader, which is ours, keeps the other end alive.
            let _ = timeout(self.pause, self.wake.changed()).await;
            self.pause = (self.pause * 2).min(POLL.1);
        }
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
