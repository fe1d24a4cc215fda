//! Batches that were sent and not answered yet.
//!
//! While the server writes one batch the next is decided and sent behind it, on the assumption that the first succeeds.
//! If it does not, the server refuses the later ones too, because the log does not end where they expect it.

use std::collections::{BTreeSet, VecDeque};
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use tokio::time::Instant;
use uuid::Uuid;
use weft_model::version::Position;

use super::live::Landed;
use super::{AppendError, Item};
use crate::epoch::LogTail;
use crate::request::Appended;
use crate::session::StoreError;

/// Batches under way at once: one that the server works on, and one that waits for it so that the server never waits for
/// us. A third would only make batches smaller, and each costs a flush.
pub(super) const FLIGHTS_MAX: usize = 2;

type Landing = Pin<Box<dyn Future<Output = Result<Landed, StoreError>> + Send>>;

/// A batch under way.
pub(super) struct Flight {
    pub(super) items: Vec<Item>,
    /// One per item, to be given once the batch is durable.
    pub(super) answers: Vec<Result<Appended, AppendError>>,
    /// Where the log then ends.
    pub(super) tail: LogTail,
    /// The last position written; `None` if no event was.
    pub(super) last: Option<Position>,
    pub(super) began: Instant,
    landing: Landing,
    landed: Option<Result<Landed, StoreError>>,
}

impl Flight {
    /// Sends the batch: `landing` is polled once, which is when a statement is sent.
    pub(super) async fn launch(
        items: Vec<Item>,
        answers: Vec<Result<Appended, AppendError>>,
        tail: LogTail,
        last: Option<Position>,
        landing: impl Future<Output = Result<Landed, StoreError>> + Send + 'static,
    ) -> Self {
        let mut landing: Landing = Box::pin(landing);
        let landed = poll_fn(|context| match landing.as_mut().poll(context) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending => Poll::Ready(None),
        })
        .await;
        Self { items, answers, tail, last, began: Instant::now(), landing, landed }
    }
}

/// What commands would have recorded, in commits of which it is not known what became of them: a command that turns out
/// to have recorded just that did so then, and is told so for the first time.
#[derive(Debug, Default)]
pub(super) struct Attempts(BTreeSet<(Uuid, Position)>);

impl Attempts {
    /// A commit was attempted after which the command would be answered so.
    pub(super) fn note(&mut self, command: Uuid, answer: &Result<Appended, AppendError>) {
        if let Ok(Appended { positions: Some(positions), repeated: false, .. }) = answer {
            self.0.insert((command, *positions.start()));
        }
    }

    /// Whether the command's outcome must be found out.
    pub(super) fn include(&self, command: Uuid) -> bool {
        self.0.range((command, Position::ZERO)..=(command, Position(u64::MAX))).next().is_some()
    }

    /// Whether it was one of these that recorded the command; only once, since only one request is the first.
    pub(super) fn settle(&mut self, command: Uuid, appended: &Appended) -> bool {
        appended.positions.as_ref().is_some_and(|positions| self.0.remove(&(command, *positions.start())))
    }
}

/// The batches under way, in the order in which they were sent.
#[derive(Default)]
pub(super) struct Flights(VecDeque<Flight>);

impl Flights {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn has_room(&self) -> bool {
        self.0.len() < FLIGHTS_MAX
    }

    pub(super) fn push(&mut self, flight: Flight) {
        self.0.push_back(flight);
    }

    /// Waits for the first of them. Dropping the future loses nothing. Never resolves if there is none.
    pub(super) async fn landed(&mut self) -> (Flight, Result<Landed, StoreError>) {
        let result = poll_fn(|context| {
            let Some(first) = self.0.front_mut() else { return Poll::Pending };
            match first.landed.take() {
                Some(result) => Poll::Ready(result),
                None => first.landing.as_mut().poll(context),
            }
        })
        .await;
        match self.0.pop_front() {
            Some(first) => (first, result),
            None => std::future::pending().await,
        }
    }

    /// Gives up waiting for all of them, and returns them. Whether they were written is unknown.
    pub(super) fn abandon(&mut self) -> impl Iterator<Item = Flight> {
        self.0.drain(..)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use weft_model::version::Epoch;

    use super::*;
    use crate::event::UnixMicros;

    #[test]
    fn a_command_is_new_once_and_only_where_it_was_attempted() {
        let (command, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let appended = |first, repeated| Appended {
            epoch: Epoch(1),
            positions: Some(Position(first)..=Position(first)),
            versions: BTreeMap::new(),
            recorded_at: UnixMicros(0),
            repeated,
        };
        let mut attempts = Attempts::default();
        attempts.note(command, &Ok(appended(7, false)));
        attempts.note(command, &Ok(appended(9, false)));
        attempts.note(command, &Ok(appended(3, true)));
        attempts.note(other, &Err(AppendError::Closed));
        assert!(attempts.include(command) && !attempts.include(other));
        assert!(!attempts.settle(command, &appended(3, true)), "it was recorded before");
        assert!(attempts.settle(command, &appended(9, true)));
        assert!(!attempts.settle(command, &appended(9, true)), "the next one repeats it");
    }
}
