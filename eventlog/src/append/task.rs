//! The task that turns queued requests into batches and sees each batch through failures of the database.

use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use weft_model::Chain;
use weft_model::version::Position;

use super::flight::{Attempts, Flight, Flights};
use super::live::Landed;
use super::writer::{Failure, Writer};
use super::{AppendError, Item, Queue};
use crate::request::Appended;
use crate::session::StoreError;

/// Requests per batch. At this size the fsync costs each of them next to nothing, and the insert still takes only
/// tens of milliseconds, which is what the next batch waits.
pub(super) const BATCH_REQUESTS_MAX: usize = 2_048;
/// Bytes at which a batch is full; the request that crosses it still belongs to it.
const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Events at which a batch is full, likewise: with the largest request on top the insert still takes well under a
/// second, where the bytes alone would admit a hundred thousand events of few bytes.
const BATCH_EVENTS_MAX: usize = 4_096;
/// How long a batch is tried again while the database is away: long enough for a restart, short enough for people.
pub(super) const STORE_WAIT_MAX: Duration = Duration::from_secs(10);
/// Pause before a failed batch is tried again; doubled each time up to the second value.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Owns the writer. Runs until the log is closed and everything queued is answered.
pub(crate) struct AppendTask {
    writer: Writer,
    queue: Queue,
    /// Told the last position of every batch that was written here.
    committed: watch::Sender<Position>,
    /// Wakes the tails of this process.
    wake: watch::Sender<Position>,
    closing: CancellationToken,
    flights: Flights,
}

impl AppendTask {
    pub(crate) fn new(
        writer: Writer,
        queue: Queue,
        committed: watch::Sender<Position>,
        wake: watch::Sender<Position>,
        closing: CancellationToken,
    ) -> Self {
        Self { writer, queue, committed, wake, closing, flights: Flights::default() }
    }

    /// Natural batching: while one batch is written the next one queues up; there is no artificial delay. A batch is sent
    /// behind another one only if it is full: as long as it can grow, waiting costs nothing and saves a flush.
    pub(crate) async fn run(mut self) {
        let mut waiting = Batch::default();
        loop {
            tokio::select! {
                // First, because a busy queue may never be found empty.
                biased;
                () = self.closing.cancelled(), if !self.queue.items.is_closed() => {
                    self.queue.items.close();
                    continue;
                }
                (flight, result) = self.flights.landed(), if !self.flights.is_empty() => {
                    self.land(flight, result).await;
                }
                next = self.queue.items.recv(), if !waiting.is_full() => match next {
                    Some(item) => waiting.push(item),
                    None => break,
                },
            }
            let alone = self.flights.is_empty() && !waiting.is_empty();
            if alone || (waiting.is_full() && self.flights.has_room()) {
                // Callers answered by the last batch are about to send again; let them, then take them all.
                tokio::task::yield_now().await;
                waiting.fill(&mut self.queue.items);
                self.take_on(std::mem::take(&mut waiting).items).await;
            }
        }
        if !waiting.is_empty() {
            self.take_on(waiting.items).await;
        }
        self.land_all().await;
    }

    /// Sends a batch ahead if that can be; otherwise waits for those under way and decides it under the lock.
    async fn take_on(&mut self, batch: Vec<Item>) {
        let batch = match self.writer.send_ahead(batch).await {
            Ok(flight) => return self.flights.push(flight),
            Err(batch) => batch,
        };
        self.land_all().await;
        self.write(batch, Attempts::default()).await;
    }

    async fn land_all(&mut self) {
        while !self.flights.is_empty() {
            let (flight, result) = self.flights.landed().await;
            self.land(flight, result).await;
        }
    }

    /// Answers a batch that was sent ahead. If it was not written, or that is unknown, it and those sent after it are
    /// decided anew under the lock, where those that were written are found by their command ids.
    async fn land(&mut self, mut flight: Flight, result: Result<Landed, StoreError>) {
        match result {
            Ok(landed) => {
                self.writer.landed(&mut flight, &landed);
                self.note(flight.began, flight.last);
                answer(flight.items, flight.answers);
            }
            Err(error) => {
                tracing::debug!(error = %Chain(&error), "a batch sent ahead is decided anew");
                let refused = self.writer.crashed(&error);
                let (mut items, mut attempted) = (Vec::new(), Attempts::default());
                for flight in std::iter::once(flight).chain(self.flights.abandon()) {
                    for (item, answer) in flight.items.into_iter().zip(flight.answers) {
                        if !refused {
                            attempted.note(item.request.command_id, &answer);
                        }
                        items.push(item);
                    }
                }
                self.write(items, attempted).await;
            }
        }
    }

    fn note(&self, began: Instant, last: Option<Position>) {
        let took = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.queue.batch_ms.store(took, Ordering::Relaxed);
        if let Some(position) = last {
            self.committed.send_replace(position);
            self.wake.send_replace(position);
        }
    }

    /// Writes a batch and answers everybody in it. If the database refuses the batch because of something in it, it
    /// is halved until only the culprit fails.
    ///
    /// `attempted` are commands whose commit may have been attempted: their outcome must be found out even if nobody waits
    /// any more, and an outcome found for them is their first.
    async fn write(&mut self, batch: Vec<Item>, mut attempted: Attempts) {
        let mut rest = vec![batch];
        while let Some(mut batch) = rest.pop() {
            match self.persist(&mut batch, &mut attempted).await {
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
    async fn persist(&mut self, batch: &mut Vec<Item>, attempted: &mut Attempts) -> Result<(), Failure> {
        let began = Instant::now();
        let deadline = began + STORE_WAIT_MAX;
        let mut pause = RETRY_PAUSE.0;
        loop {
            batch.retain(|item| !item.respond.is_closed() || attempted.include(item.request.command_id));
            if batch.is_empty() {
                return Ok(());
            }
            match self.writer.attempt(batch, attempted).await {
                Ok(written) => {
                    self.note(began, written.last);
                    answer(std::mem::take(batch), written.answers);
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

fn answer(items: Vec<Item>, answers: Vec<Result<Appended, AppendError>>) {
    for (item, answer) in items.into_iter().zip(answers) {
        // A caller that has gone needs no answer.
        let _ = item.respond.send(answer);
    }
}

/// What will be written together.
#[derive(Default)]
struct Batch {
    items: Vec<Item>,
    bytes: usize,
    events: usize,
}

impl Batch {
    fn push(&mut self, item: Item) {
        self.bytes += item.bytes;
        self.events += item.request.events();
        self.items.push(item);
    }

    fn is_full(&self) -> bool {
        self.items.len() >= BATCH_REQUESTS_MAX
            || self.bytes >= BATCH_BYTES_MAX
            || self.events >= BATCH_EVENTS_MAX
    }

    fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Takes what has queued, until the batch is full.
    fn fill(&mut self, queue: &mut mpsc::Receiver<Item>) {
        while !self.is_full()
            && let Ok(item) = queue.try_recv()
        {
            self.push(item);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use tokio::sync::{Semaphore, oneshot};
    use uuid::Uuid;
    use weft_model::version::ExpectedVersion;

    use super::*;
    use crate::event::NewEvent;
    use crate::request::{AppendRequest, ScopeAppend};

    fn item(events: usize, bytes: usize) -> Item {
        let event = NewEvent { event_type: "Happened".into(), schema: 1, payload: "{}".into() };
        let part =
            ScopeAppend { scope: "s".into(), expected: ExpectedVersion::Any, events: vec![event; events] };
        let command_id = Uuid::from_u128(1);
        let (actor, scopes) = ("a".into(), vec![part]);
        let request =
            AppendRequest { command_id, fingerprint: None, actor, reason: None, cause: None, scopes };
        let budget = Arc::new(Semaphore::new(1)).try_acquire_many_owned(1).unwrap();
        Item { request, fingerprint: [0; 32], bytes, respond: oneshot::channel().0, _budget: budget }
    }

    /// How many of `QUEUED` like items make a batch.
    fn taken(events: usize, bytes: usize) -> usize {
        const QUEUED: usize = 2 * BATCH_REQUESTS_MAX;
        let (queue, mut items) = mpsc::channel(QUEUED);
        for _ in 0..QUEUED {
            queue.try_send(item(events, bytes)).unwrap();
        }
        let mut batch = Batch::default();
        batch.fill(&mut items);
        batch.items.len()
    }

    #[test]
    fn a_batch_is_bounded_in_requests_bytes_and_events() {
        assert_eq!(taken(1, 1), BATCH_REQUESTS_MAX);
        assert_eq!(taken(1, BATCH_BYTES_MAX / 4), 4);
        assert_eq!(taken(1_000, 1), 5);
        assert_eq!(taken(4_096, 1), 1);
    }
}
