//! What sidecars say they run: kept in memory, written in groups, in as few rows as tell it ([`fleet`]); and from it, how
//! every version reached them ([`propagation`]).
//!
//! A burst of acknowledgements becomes one transaction, in the background: nothing waits for it, neither appends nor what is
//! published. Losing what is not yet written loses a moment of status, nothing else.

mod fleet;
mod propagation;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use weft_model::{Chain, ConfigVersion, InstanceId};
use weft_projector::{Published, Serving, Store, View};
use weft_routing::Hash;

use crate::convert;

use fleet::{Fleet, SETTLED_AFTER};
use propagation::{Propagation, Word};

/// How often what changed is written, at the most: people see it as immediate, and the database as little. A large fleet is
/// written as often as its words come.
const FLUSH_EVERY: Duration = Duration::from_millis(200);
/// How often the rows of versions are written.
const PROPAGATION_EVERY: Duration = Duration::from_secs(1);
/// How often a controller that has nothing to write says that it is there, which `status.sidecars` counts on.
const REFRESH_EVERY: Duration = Duration::from_secs(10);
/// How often what is old is forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(60);
/// How often the leader counts who is outside the propagation bound.
const COUNT_EVERY: Duration = Duration::from_secs(5);
/// How far apart acknowledgements should come: ten thousand a second take a fraction of a core.
const ACK_EVERY: Duration = Duration::from_micros(100);
/// Longest reason for a refused snapshot that is kept, in characters.
const ERROR_CHARS_MAX: usize = 500;
/// Swaps that one acknowledgement may tell.
pub(crate) const SWAPS_MAX: usize = 32;

/// See the module's documentation.
#[derive(Debug)]
pub struct Acks {
    view: View,
    state: Mutex<State>,
    /// Streams that are open.
    streams: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    fleet: Fleet,
    propagation: Propagation,
    /// Announcements that were taken in.
    announced: u64,
}

/// A sidecar's word of what it did.
#[derive(Debug, Default)]
pub(crate) struct Said {
    /// What it runs now.
    pub(crate) applied: Option<(ConfigVersion, Hash)>,
    /// How long the last swap took.
    pub(crate) took_ms: u32,
    /// Why it refused a newer snapshot; empty if it did not.
    pub(crate) error: String,
    /// What it put in force how long ago, oldest first.
    pub(crate) swaps: Vec<(ConfigVersion, Duration)>,
}

/// A sidecar's open stream; dropping it says that the stream ended.
#[derive(Debug)]
pub struct Connected {
    acks: Arc<Acks>,
    instance: InstanceId,
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.acks.lock().fleet.end_stream(&self.instance);
        self.acks.streams.fetch_sub(1, Ordering::Relaxed);
        metrics::gauge!("weft_api_subscribers").decrement(1.0);
    }
}

impl State {
    /// Takes in what was published since the last time, and looks at what is published then.
    fn catch_up<R>(&mut self, view: &View, look: impl FnOnce(&Published) -> R) -> R {
        let (seen, (count, fresh)) =
            view.published(|published| (look(published), published.announced(self.announced)));
        self.announced = count;
        fresh.into_iter().for_each(|announced| self.propagation.announce(announced));
        seen
    }
}

impl Acks {
    /// What sidecars say of what is published in this view.
    #[must_use]
    pub fn new(view: View) -> Self {
        Self { view, state: Mutex::default(), streams: AtomicUsize::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sidecar opened a stream and says what it runs. None if it has enough of them open.
    #[must_use]
    pub fn connect(
        self: &Arc<Self>,
        instance: &InstanceId,
        have: Option<(ConfigVersion, Hash)>,
    ) -> Option<Connected> {
        if !self.lock().fleet.open_stream(instance) {
            return None;
        }
        self.hear(instance, have, &[], |_| ());
        self.streams.fetch_add(1, Ordering::Relaxed);
        metrics::gauge!("weft_api_subscribers").increment(1.0);
        Some(Connected { acks: Arc::clone(self), instance: instance.clone() })
    }

    /// Streams that are open.
    pub(crate) fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    /// Over how long acknowledgements of one publication should come, so that they do not keep this controller from the next
    /// one.
    pub(crate) fn spread(&self) -> Duration {
        ACK_EVERY.saturating_mul(u32::try_from(self.streams()).unwrap_or(u32::MAX))
    }

    /// A sidecar says what it runs now, or why it refused what it should.
    pub(crate) fn record(&self, instance: &InstanceId, said: Said) {
        let Said { applied, took_ms, error, swaps } = said;
        let now = Instant::now();
        // What cannot be so long ago was before anything that is asked for.
        let swaps: Vec<_> =
            swaps.into_iter().filter_map(|(version, ago)| Some((version, now.checked_sub(ago)?))).collect();
        let error = convert::words(&error, ERROR_CHARS_MAX);
        self.hear(instance, applied, &swaps, |ack| {
            ack.took_ms = Some(took_ms);
            ack.error = Some(error).filter(|error| !error.is_empty());
        });
    }

    fn hear(
        &self,
        instance: &InstanceId,
        applied: Option<(ConfigVersion, Hash)>,
        swaps: &[(ConfigVersion, Instant)],
        edit: impl FnOnce(&mut weft_projector::Ack),
    ) {
        let came_at = Instant::now();
        let mut state = self.lock();
        let class = state.catch_up(&self.view, |published| published.class_of(instance));
        let before = state.fleet.say(instance, class.map(|(class, _)| class), |ack| {
            ack.applied = applied;
            edit(ack);
        });
        // Who ran nothing before starts; that is not a change's way.
        if let (Some((class, since)), Some((applied, _)), Some(before)) = (class, applied, before) {
            let word = Word { since, before, applied, swaps, came_at };
            state.propagation.hear(instance, class, word);
        }
    }

    /// How often what changed is written now.
    fn flush_every(&self) -> Duration {
        FLUSH_EVERY.max(self.spread())
    }

    /// Writes what changed until `drain`, and then once more, in the name of `controller`; `id` tells it from another
    /// process of that name.
    pub async fn run(self: Arc<Self>, store: Store, controller: String, id: Uuid, drain: CancellationToken) {
        let writer = Writer { acks: self, store, controller, id };
        let start = Instant::now();
        let (mut acks_at, mut refresh_at) = (start, start);
        let (mut propagation_at, mut count_at, mut forget_at) = (start, start, start + FORGET_EVERY);
        loop {
            tokio::select! {
                () = drain.cancelled() => break,
                () = sleep_until(acks_at.min(propagation_at).min(count_at).min(forget_at)) => {}
            }
            let now = Instant::now();
            if now >= acks_at {
                if writer.flush(now >= refresh_at).await {
                    refresh_at = Instant::now() + REFRESH_EVERY;
                }
                acks_at = Instant::now() + writer.acks.flush_every();
            }
            if now >= propagation_at {
                writer.flush_propagation().await;
                propagation_at = Instant::now() + PROPAGATION_EVERY;
            }
            if now >= count_at {
                writer.count_outside_bound().await;
                count_at = Instant::now() + COUNT_EVERY;
            }
            if now >= forget_at {
                writer.forget().await;
                forget_at = Instant::now() + FORGET_EVERY;
            }
        }
        writer.acks.lock().fleet.end_all();
        writer.flush(true).await;
        writer.flush_propagation().await;
    }
}

/// Writes what is said to one controller.
struct Writer {
    acks: Arc<Acks>,
    store: Store,
    controller: String,
    id: Uuid,
}

impl Writer {
    /// Writes what changed; `anyway` also that nothing did. Says whether something was written.
    async fn flush(&self, anyway: bool) -> bool {
        let (plan, sidecars) = {
            let mut state = self.acks.lock();
            let plan = state.fleet.plan();
            if plan.is_empty() && !anyway {
                return false;
            }
            (plan, state.fleet.subscribed())
        };
        let spread = self.acks.spread();
        // Held back, then in the rows after the looks that a class may take, and the write itself.
        let looks = u32::try_from(SETTLED_AFTER + 2).unwrap_or(u32::MAX);
        let known_within = spread + self.acks.flush_every().saturating_mul(looks);
        let known_within_ms = u64::try_from(known_within.as_millis()).unwrap_or(u64::MAX);
        let serving = Serving { id: self.id, name: self.controller.clone(), sidecars, known_within_ms };
        match self.store.put_acks(&serving, &plan.sidecars, &plan.classes).await {
            Ok(()) => {
                metrics::counter!("weft_api_ack_rows_total")
                    .increment((plan.sidecars.len() + plan.classes.len()) as u64);
                self.acks.lock().fleet.written(plan);
                true
            }
            Err(error) => {
                tracing::warn!(error = %Chain(&error), rows = plan.sidecars.len(), "acknowledgements not written yet");
                self.acks.lock().fleet.lost();
                false
            }
        }
    }

    async fn flush_propagation(&self) {
        let rows = {
            let mut state = self.acks.lock();
            state.catch_up(&self.acks.view, |_| ());
            state.propagation.unwritten()
        };
        let written = self.store.put_propagation(self.id, &rows).await;
        let mut state = self.acks.lock();
        if let Err(error) = written {
            tracing::warn!(error = %Chain(&error), rows = rows.len(), "how changes reached sidecars is not written yet");
            state.propagation.failed(&rows);
        }
        state.propagation.retire(Instant::now());
    }

    /// The leader says how many sidecars of the mesh are outside the bound; the others' gauge is 0, so that a sum is right.
    async fn count_outside_bound(&self) {
        let count = if self.acks.view.leads() { self.store.sidecars_outside_bound().await } else { Ok(0) };
        match count {
            Ok(count) => {
                #[expect(clippy::cast_precision_loss, reason = "a gauge")]
                metrics::gauge!("weft_api_sidecars_outside_bound").set(count as f64);
            }
            Err(error) => tracing::warn!(error = %Chain(&error), "sidecars outside the bound not counted"),
        }
    }

    async fn forget(&self) {
        self.acks.lock().fleet.forget_classes();
        if let Err(error) = self.store.forget_acks().await {
            tracing::warn!(error = %Chain(&error), "sidecars that left long ago are not forgotten yet");
        }
        if let Err(error) = self.store.forget_propagation().await {
            tracing::warn!(error = %Chain(&error), "versions of long ago are not forgotten yet");
        }
    }
}
