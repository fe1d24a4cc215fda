//! Batches that were sent and not answered yet.
//!
//! While the server writes one batch the next is decided and sent behind it, on the assumption that the first succeeds.
//! If it does not, the server refuses the later ones too, because the log does not end where they expect it.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use tokio::time::Instant;
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

    /// Gives up waiting for all of them, and returns what they carried. Whether they were written is unknown.
    pub(super) fn abandon(&mut self) -> impl Iterator<Item = Item> {
        self.0.drain(..).flat_map(|flight| flight.items)
    }
}
