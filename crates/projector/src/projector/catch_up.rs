//! What is in the log at a start: from a checkpoint of the fold, or from the first event, in bulk. Nothing is published
//! meanwhile, and this projector does not lead: it would find every row wrong.

use tokio::time::{Duration, Instant, sleep};
use weft_eventlog::{EventHash, Head};
use weft_model::{Chain, Position};

use super::{Projector, READ_RETRY, may_pass};
use crate::checkpoint;
use crate::fault::Fault;
use crate::replay::{Replay, ReplayError};

/// How often a long fold says how far it has come.
const TOLD_EVERY: Duration = Duration::from_secs(2);
/// Events that may have come meanwhile and are left to the tail: a page of it.
const LEFT_MAX: u64 = 4_096;

impl Projector {
    /// Folds what is there already and takes it into the view. Returns the last position.
    pub(super) async fn catch_up(&mut self) -> Result<Position, Fault> {
        let started = Instant::now();
        let mut head = self.head().await;
        let mut replay = Replay::from(checkpoint::load(&self.store, &self.reader, head.position).await);
        let begun = replay.version().position;
        self.keeper.begin_at(begun);
        loop {
            self.replay_to(&mut replay, head.position).await?;
            let reached = head.position;
            head = self.head().await;
            if head.position.0.saturating_sub(reached.0) <= LEFT_MAX {
                break;
            }
        }
        let mut delta = self.view.install(replay.finish());
        let position = delta.version.position;
        self.folded = if head.position == position {
            Some((position, head.hash))
        } else {
            self.hash_at(position).await.map(|hash| (position, hash))
        };
        delta.hash = self.hash();
        let events = position.0.saturating_sub(begun.0);
        tracing::info!(%position, from = %begun, events, took = ?started.elapsed(), "folded the log");
        metrics::counter!("weft_projector_events_folded_total").increment(events);
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        metrics::gauge!("weft_projector_folded_position").set(position.0 as f64);
        if position > Position::ZERO {
            self.leadership.folded(delta);
        }
        Ok(position)
    }

    /// The log's end; waits until it can be read.
    async fn head(&self) -> Head {
        loop {
            match self.reader.head().await {
                Ok(head) => return head,
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "the log cannot be read yet");
                    sleep(READ_RETRY).await;
                }
            }
        }
    }

    /// The chain hash of an event; waits until it can be read. None if it is not there any more: the tail will say so.
    async fn hash_at(&self, position: Position) -> Option<EventHash> {
        loop {
            match self.reader.read(Position(position.0.saturating_sub(1)), 1).await {
                Ok(page) => {
                    return page.first().filter(|event| event.position == position).map(|event| event.hash);
                }
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "the log cannot be read yet");
                    sleep(READ_RETRY).await;
                }
            }
        }
    }

    /// Folds up to `to`, however often the log cannot be read on the way. Where it ends before `to`, it was rewound: the tail
    /// will say so.
    async fn replay_to(&self, replay: &mut Replay, to: Position) -> Result<(), Fault> {
        let (mut told, mut told_at) = (Instant::now(), replay.version().position);
        loop {
            let progress = |folded: Position| {
                let since = told.elapsed();
                if since >= TOLD_EVERY {
                    #[expect(clippy::cast_precision_loss, reason = "a rate")]
                    let rate = (folded.0 - told_at.0) as f64 / since.as_secs_f64();
                    tracing::info!(%folded, of = %to, events_per_s = rate.round(), "folding the log");
                    (told, told_at) = (Instant::now(), folded);
                }
            };
            match replay.fold_to(&self.reader, to, progress).await {
                Ok(()) => return Ok(()),
                Err(ReplayError::Fault(fault)) => return Err(fault),
                Err(ReplayError::Store(error)) if may_pass(&error) => {
                    tracing::warn!(error = %Chain(&error), "the log cannot be read, trying again");
                    sleep(READ_RETRY).await;
                }
                Err(ReplayError::Store(error)) => return Err(Fault::History(error)),
            }
        }
    }
}
