//! Appending: the callers' side.
//!
//! Any number of callers put requests into one bounded queue; one task per open log (`task.rs`) takes what has queued,
//! and writes it in one transaction (`writer.rs`) after deciding in memory which requests are accepted (`decide.rs`).
//! So the fsync that makes events durable is shared by everybody who waits for it.
//!
//! **Exactly once.** An accepted command's outcome is stored in the transaction that stores its events, and a repeat
//! gets it back. A refused command (a conflict) changed nothing and is not stored: a repeat is decided anew and may
//! then be accepted, which is what a caller who repeats it wants.

mod columns;
pub mod decide;
mod flight;
mod heads;
mod live;
mod task;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use weft_model::version::{ExpectedVersion, Position, Version};

use crate::request::{AppendRequest, Appended, Invalid, Malformed, TooLarge};
use crate::session::StoreError;

pub(crate) use columns::{
    Begun, COMMANDS_FORMAT, MARK_BYTES, MARKS_FORMAT, earlier_mark, encode_command, mark,
};
pub(crate) use decide::CLOCK_AHEAD_MAX;
pub(crate) use task::AppendTask;
pub(crate) use writer::{Unusable, Writer};

/// Requests that may wait: two full batches, one filling up while the other is written.
const QUEUE_MAX: usize = 2 * task::BATCH_REQUESTS_MAX;
/// Bytes of requests that may wait or be written, in KiB, because many large requests must not add up.
const QUEUE_KIB_MAX: u32 = 64 * 1024;
/// How long a caller waits for its answer. Longer than the task goes on beginning attempts for a batch
/// ([`task::STORE_WAIT_MAX`]) and than the last of them takes on a server that is gone. Reached when the server holds a
/// commit back, for example for an absent standby, and by those who queued behind a batch that took that long.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(30);
/// How long the outcome of a command is sure to be known, counted from when its id was made. A repeat after that is
/// refused, because nobody could tell whether it is one; three days are a long weekend.
pub const OUTCOME_KEPT: Duration = Duration::from_secs(72 * 60 * 60);
/// Bounds of the advice given to callers that come while the queue is full.
const RETRY_AFTER_MS: (u64, u64) = (5, 1_000);

/// Why a request was not accepted.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AppendError {
    /// An expectation does not hold. Read the scope, decide again, and repeat.
    #[error("scope {scope} is at version {current}, not at the expected {expected}")]
    Conflict {
        /// The first scope of the request whose expectation fails.
        scope: String,
        /// What the request expected.
        expected: ExpectedVersion,
        /// Its version, under the log's lock; zero if it has no event.
        current: Version,
    },
    /// The command id was accepted before with other content. Make a new id for a new command.
    #[error("the command id was already used for another command")]
    CommandIdReused,
    /// The command id is older than outcomes are kept ([`OUTCOME_KEPT`]). Look whether the log has its events; if it has
    /// not, make a new id.
    #[error("the command id is older than 72 hours; whether it was recorded is not known any more")]
    CommandIdExpired,
    /// Too much is waiting. Nothing happened; repeat after the time given.
    #[error("the log is overloaded; retry after {retry_after_ms} ms")]
    Overloaded {
        /// When to come back, in milliseconds.
        retry_after_ms: u64,
    },
    /// The request is above a bound; split it.
    #[error("the request is too large")]
    TooLarge(#[source] TooLarge),
    /// The request can never be accepted.
    #[error("the request is malformed")]
    Malformed(#[source] Malformed),
    /// The database has lost events that somebody has seen, so nothing more is appended: going on would fork history. An
    /// operator must find out what was lost, and decides ([`adopt`](crate::adopt)). If this process itself has seen them,
    /// it stays so until it is started anew.
    #[error("LOG_REWOUND: event {seen} was in the log and is not any more; the log now ends at {found}")]
    Rewound {
        /// The last event that this process knows to have been durable, or that the oldest finding which stands names.
        seen: Position,
        /// Where the log ended when that was found.
        found: Position,
    },
    /// The log is shut down. Nothing happened.
    #[error("the log is closed")]
    Closed,
    /// The store failed or did not answer. Whether the request was accepted may be unknown: repeat it with the same
    /// command id.
    #[error("the log's store failed")]
    Store(#[source] StoreError),
}

impl From<Invalid> for AppendError {
    fn from(invalid: Invalid) -> Self {
        match invalid {
            Invalid::Malformed(source) => Self::Malformed(source),
            Invalid::TooLarge(source) => Self::TooLarge(source),
        }
    }
}

/// A request on its way, and where its answer goes.
#[derive(Debug)]
struct Item {
    request: AppendRequest,
    fingerprint: [u8; 32],
    bytes: usize,
    respond: oneshot::Sender<Result<Appended, AppendError>>,
    /// Returned to the budget when the item is dropped.
    _budget: OwnedSemaphorePermit,
}

/// Appends to an open log. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Appender {
    queue: mpsc::Sender<Item>,
    budget: Arc<Semaphore>,
    /// How long the last batch took, in milliseconds; written by the task.
    batch_ms: Arc<AtomicU64>,
}

/// The task's end of the queue.
#[derive(Debug)]
pub(crate) struct Queue {
    items: mpsc::Receiver<Item>,
    batch_ms: Arc<AtomicU64>,
}

impl Appender {
    pub(crate) fn channel() -> (Self, Queue) {
        let (queue, items) = mpsc::channel(QUEUE_MAX);
        let batch_ms = Arc::new(AtomicU64::new(0));
        let budget = Arc::new(Semaphore::new(QUEUE_KIB_MAX as usize));
        (Self { queue, budget, batch_ms: Arc::clone(&batch_ms) }, Queue { items, batch_ms })
    }

    /// Appends a request: all its events or none. When this returns `Ok`, they are durable.
    ///
    /// Dropping the future before it is done leaves open whether the request is accepted; its command id tells.
    ///
    /// # Errors
    /// See [`AppendError`]; each variant says what to do next.
    pub async fn append(&self, request: AppendRequest) -> Result<Appended, AppendError> {
        request.check()?;
        let fingerprint = request.effective_fingerprint();
        let bytes = request.bytes();
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
        let budget = Arc::clone(&self.budget).try_acquire_many_owned(kib).map_err(|_| self.overloaded())?;
        let (respond, answer) = oneshot::channel();
        let item = Item { request, fingerprint, bytes, respond, _budget: budget };
        self.queue.try_send(item).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => self.overloaded(),
            mpsc::error::TrySendError::Closed(_) => AppendError::Closed,
        })?;
        match tokio::time::timeout(ANSWER_WAIT_MAX, answer).await {
            Ok(Ok(result)) => result,
            // Too late, or the task was torn down: either way the outcome is unknown.
            Ok(Err(_)) | Err(_) => Err(AppendError::Store(StoreError::Unanswered)),
        }
    }

    /// Two batches wait at most, so that is how long it takes until there is room.
    fn overloaded(&self) -> AppendError {
        let (low, high) = RETRY_AFTER_MS;
        let retry_after_ms = (2 * self.batch_ms.load(Ordering::Relaxed)).clamp(low, high);
        AppendError::Overloaded { retry_after_ms }
    }
}
