//! The mesh as of a position of the past: folded from the log when asked for, from a stored checkpoint before it if there is
//! one, and kept for a while, because questions about one moment come in groups.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use weft_eventlog::Reader;
use weft_model::Position;
use weft_projector::{FoldFrom, Store, fold_to};
use weft_routing::Projection;

use crate::convert::At;
use crate::status::ApiError;

/// Folds that run at once. Each takes a core and a whole mesh of memory.
const FOLDS_MAX: usize = 2;
/// How long a question waits for its turn.
const TURN_WAIT_MAX: Duration = Duration::from_secs(10);
/// Advice to whoever did not get a turn.
const RETRY_MS: u64 = 2_000;
/// Moments that are kept: a person who compares two or three of them.
const KEPT_MAX: usize = 4;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Past {
    reader: Reader,
    store: Store,
    turns: Semaphore,
    kept: Mutex<VecDeque<Arc<Projection>>>,
}

impl Past {
    pub(crate) fn new(reader: Reader, store: Store) -> Self {
        Self { reader, store, turns: Semaphore::new(FOLDS_MAX), kept: Mutex::default() }
    }

    /// The position that a moment means; none for now.
    pub(crate) async fn position(&self, at: At) -> Result<Option<Position>, ApiError> {
        match at {
            At::Now => Ok(None),
            At::Position(position) => Ok(Some(position)),
            At::Time(time) => Ok(Some(self.reader.position_at(time).await?)),
        }
    }

    /// The mesh after the event at `position`.
    pub(crate) async fn projection(&self, position: Position) -> Result<Arc<Projection>, ApiError> {
        if let Some(kept) = self.kept(position) {
            return Ok(kept);
        }
        let head = self.reader.head().await?.position;
        if position > head {
            return Err(ApiError::NotFound(format!("the log ends at position {head}, before {position}")));
        }
        let turn = tokio::time::timeout(TURN_WAIT_MAX, self.turns.acquire());
        let Ok(Ok(_turn)) = turn.await else {
            return Err(ApiError::Overloaded { retry_after_ms: RETRY_MS });
        };
        // Whoever had the turn before may have folded the same.
        if let Some(kept) = self.kept(position) {
            return Ok(kept);
        }
        let from = FoldFrom::Checkpoint(&self.store);
        let projection = Arc::new(fold_to(&self.reader, position, from, |_| ()).await?);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back(Arc::clone(&projection));
        if kept.len() > KEPT_MAX {
            kept.pop_front();
        }
        Ok(projection)
    }

    fn kept(&self, position: Position) -> Option<Arc<Projection>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().find(|projection| projection.version().position == position).cloned()
    }
}
