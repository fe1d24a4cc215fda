//! The task that turns queued requests into batches and sees each batch through failures of the database.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use weft_model::version::Position;

use super::writer::{Failure, Writer};
use super::{AppendError, Item, Queue};

/// Requests per batch. At this size the fsync costs each of them next to nothing, and the insert still takes only
/// tens of milliseconds, which is what the next batch waits.
pub(super) const BATCH_REQUESTS_MAX: usize = 2_048;
/// Bytes at which a batch is full; the request that crosses it still belongs to it.
const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;
/// How long a batch is tried again while the database is away: long enough for a restart, short enough for people.
pub(super) const STORE_WAIT_MAX: Duration = Duration::from_secs(10);
/// Pause before a failed batch is tried again; doubled each time up to the second value.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Owns the writer. Runs until the log is closed and everything queued is answered.
pub(crate) struct AppendTask {
    pub(crate) writer: Writer,
    pub(crate) queue: Queue,
    /// Told the last position of every batch that was written here.
    pub(crate) committed: watch::Sender<Position>,
    /// Wakes the tails of this process.
    pub(crate) wake: watch::Sender<Position>,
    pub(crate) closing: CancellationToken,
}

impl AppendTask {
    /// Natural batching: while one batch is written the next one queues up; there is no artificial delay.
    pub(crate) async fn run(mut self) {
        loop {
            let next = tokio::select! {
                biased;
                next = self.queue.items.recv() => next,
                () = self.closing.cancelled(), if !self.queue.items.is_closed() => {
                    self.queue.items.close();
                    continue;
                }
            };
            let Some(first) = next else { return };
            // Callers answered by the last batch are about to send again; let them, then take them all.
            tokio::task::yield_now().await;
            let batch = self.fill(first);
            let started = Instant::now();
            self.write(batch).await;
            let took = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.queue.batch_ms.store(took, Ordering::Relaxed);
        }
    }

    fn fill(&mut self, first: Item) -> Vec<Item> {
        let mut bytes = first.bytes;
        let mut batch = vec![first];
        while batch.len() < BATCH_REQUESTS_MAX && bytes < BATCH_BYTES_MAX {
            let Ok(item) = self.queue.items.try_recv() else { break };
            bytes += item.bytes;
            batch.push(item);
        }
        batch
    }

    /// Writes a batch and answers everybody in it. If the database refuses the batch because of something in it, it
    /// is halved until only the culprit fails.
    async fn write(&mut self, batch: Vec<Item>) {
        let mut rest = vec![batch];
        while let Some(mut batch) = rest.pop() {
            match self.persist(&mut batch).await {
                Ok(()) => {}
                Err(Failure::Content(_)) if batch.len() > 1 => {
                    rest.push(batch.split_off(batch.len() / 2));
                    rest.push(batch);
                }
                Err(failure) => {
                    let error = AppendError::from(failure);
                    tracing::error!(requests = batch.len(), error = %Chain(&error), "append failed");
                    for item in batch {
                        // A caller that has gone needs no answer.
                        let _ = item.respond.send(Err(error.clone()));
                    }
                }
            }
        }
    }

    /// Tries a batch until it is written, cannot be, or [`STORE_WAIT_MAX`] is over. Answers and empties it if written.
    async fn persist(&mut self, batch: &mut Vec<Item>) -> Result<(), Failure> {
        let deadline = Instant::now() + STORE_WAIT_MAX;
        let mut pause = RETRY_PAUSE.0;
        // Commands whose commit was attempted: their outcome must be found out even if nobody waits any more, and an
        // outcome found for them is their first.
        let mut attempted = BTreeSet::new();
        loop {
            batch.retain(|item| !item.respond.is_closed() || attempted.contains(&item.request.command_id));
            if batch.is_empty() {
                return Ok(());
            }
            match self.writer.attempt(batch, &mut attempted).await {
                Ok(written) => {
                    if let Some(position) = written.last {
                        self.committed.send_replace(position);
                        self.wake.send_replace(position);
                    }
                    for (item, answer) in batch.drain(..).zip(written.answers) {
                        // A caller that has gone needs no answer.
                        let _ = item.respond.send(answer);
                    }
                    return Ok(());
                }
                Err(Failure::Transient(error)) if Instant::now() + pause < deadline => {
                    tracing::warn!(error = %Chain(&error), "append interrupted, trying again");
                    sleep(pause).await;
                    pause = (pause * 2).min(RETRY_PAUSE.1);
                }
                Err(failure) => return Err(failure),
            }
        }
    }
}

/// Prints an error and its sources, for the log line where it is handled.
pub(crate) struct Chain<'a>(pub(crate) &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
