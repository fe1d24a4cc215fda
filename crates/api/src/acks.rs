//! What sidecars say they run: kept in memory, written to `weft.sidecar_ack` in groups.
//!
//! One entry per sidecar, the newest word wins, so memory is bounded by the sidecars that talk to this controller,
//! and a burst of acknowledgements becomes one statement. An entry goes when its sidecar has left and that is written.
//! Losing what is not yet written loses a moment of status, nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use weft_model::{Chain, ConfigVersion, InstanceId};
use weft_projector::{Ack, Store};
use weft_routing::Hash;

/// How often what changed is written: people see it as immediate, and the database as little.
const FLUSH_EVERY: Duration = Duration::from_millis(200);
/// Sidecars in one statement.
const FLUSH_MAX: usize = 1_000;
/// Every so many flushes, those who are connected are marked as seen: every 10 s, which `status.sidecars` counts on. Then
/// those who left long ago are forgotten, too.
const REFRESH_EVERY: u32 = 50;
/// How far apart acknowledgements should come: ten thousand a second take a fraction of a core.
const ACK_EVERY: Duration = Duration::from_micros(100);
/// Streams that one sidecar may have open: one, and for a moment one more for each time it broke off without a word.
const STREAMS_PER_SIDECAR_MAX: usize = 8;
/// Longest reason for a refused snapshot that is kept, in characters.
const ERROR_CHARS_MAX: usize = 500;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Acks {
    state: Mutex<State>,
    /// Streams that are open.
    streams: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    sidecars: BTreeMap<InstanceId, Sidecar>,
    changed: BTreeSet<InstanceId>,
}

#[derive(Debug)]
struct Sidecar {
    /// Streams that it holds open. A reconnecting sidecar may have two for a moment.
    streams: usize,
    ack: Ack,
}

impl State {
    fn sidecar(&mut self, instance: &InstanceId) -> &mut Sidecar {
        self.changed.insert(instance.clone());
        self.sidecars.entry(instance.clone()).or_insert_with(|| Sidecar {
            streams: 0,
            ack: Ack { connected: false, applied: None, took_ms: None, error: None },
        })
    }
}

/// A sidecar's open stream; dropping it says that the stream ended.
#[derive(Debug)]
pub struct Connected {
    acks: Arc<Acks>,
    instance: InstanceId,
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut state = self.acks.lock();
        let sidecar = state.sidecar(&self.instance);
        sidecar.streams = sidecar.streams.saturating_sub(1);
        sidecar.ack.connected = sidecar.streams > 0;
        self.acks.streams.fetch_sub(1, Ordering::Relaxed);
        metrics::gauge!("weft_api_subscribers").decrement(1.0);
    }
}

impl Acks {
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
        let mut state = self.lock();
        let sidecar = state.sidecar(instance);
        if sidecar.streams == STREAMS_PER_SIDECAR_MAX {
            return None;
        }
        sidecar.streams += 1;
        sidecar.ack.connected = true;
        sidecar.ack.applied = have;
        self.streams.fetch_add(1, Ordering::Relaxed);
        metrics::gauge!("weft_api_subscribers").increment(1.0);
        Some(Connected { acks: Arc::clone(self), instance: instance.clone() })
    }

    /// Over how long acknowledgements of one publication should come, so that they do not keep this controller from the next
    /// one.
    pub(crate) fn spread(&self) -> Duration {
        ACK_EVERY.saturating_mul(u32::try_from(self.streams.load(Ordering::Relaxed)).unwrap_or(u32::MAX))
    }

    /// A sidecar says what it runs now, or why it refused what it should.
    pub(crate) fn record(
        &self,
        instance: &InstanceId,
        applied: Option<(ConfigVersion, Hash)>,
        took_ms: u32,
        error: &str,
    ) {
        let mut state = self.lock();
        let ack = &mut state.sidecar(instance).ack;
        ack.applied = applied;
        ack.took_ms = Some(took_ms);
        let error: String = error.chars().filter(|c| !c.is_control()).take(ERROR_CHARS_MAX).collect();
        ack.error = Some(error).filter(|error| !error.is_empty());
    }

    /// Writes what changed until `drain`, and then once more, in the name of `controller`; `id` tells it from another
    /// process of that name.
    pub async fn run(self: Arc<Self>, store: Store, controller: String, id: Uuid, drain: CancellationToken) {
        let mut ticks = interval(FLUSH_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut until_refresh = REFRESH_EVERY;
        loop {
            tokio::select! {
                () = drain.cancelled() => break,
                _ = ticks.tick() => {}
            }
            self.flush(&store, &controller, id).await;
            until_refresh -= 1;
            if until_refresh == 0 {
                until_refresh = REFRESH_EVERY;
                self.refresh(&store, id).await;
            }
        }
        self.disconnect_all();
        self.flush(&store, &controller, id).await;
    }

    async fn flush(&self, store: &Store, controller: &str, id: Uuid) {
        loop {
            let batch = self.take();
            if batch.is_empty() {
                return;
            }
            if let Err(error) = store.put_acks(controller, id, &batch).await {
                tracing::warn!(error = %Chain(&error), sidecars = batch.len(), "acknowledgements not written yet");
                let mut state = self.lock();
                state.changed.extend(batch.into_iter().map(|(instance, _)| instance));
                return;
            }
            self.forget(&batch);
        }
    }

    async fn refresh(&self, store: &Store, id: Uuid) {
        let connected: Vec<_> = {
            let state = self.lock();
            let connected = state.sidecars.iter().filter(|(_, sidecar)| sidecar.streams > 0);
            connected.map(|(instance, _)| instance.clone()).collect()
        };
        for group in connected.chunks(FLUSH_MAX) {
            if let Err(error) = store.refresh_acks(id, group).await {
                tracing::warn!(error = %Chain(&error), "connected sidecars not refreshed");
                return;
            }
        }
        if let Err(error) = store.forget_acks().await {
            tracing::warn!(error = %Chain(&error), "sidecars that left long ago are not forgotten yet");
        }
    }

    fn take(&self) -> Vec<(InstanceId, Ack)> {
        let mut state = self.lock();
        let mut batch = Vec::new();
        while batch.len() < FLUSH_MAX
            && let Some(instance) = state.changed.pop_first()
        {
            if let Some(sidecar) = state.sidecars.get(&instance) {
                batch.push((instance, sidecar.ack.clone()));
            }
        }
        batch
    }

    /// Who left and was written needs no memory any more, unless it came back meanwhile.
    fn forget(&self, written: &[(InstanceId, Ack)]) {
        let mut state = self.lock();
        for (instance, _) in written.iter().filter(|(_, ack)| !ack.connected) {
            let left = state.sidecars.get(instance).is_some_and(|sidecar| sidecar.streams == 0);
            if left && !state.changed.contains(instance) {
                state.sidecars.remove(instance);
            }
        }
    }

    fn disconnect_all(&self) {
        let mut state = self.lock();
        let all: Vec<_> = state.sidecars.keys().cloned().collect();
        for instance in all {
            state.sidecar(&instance).ack.connected = false;
        }
    }
}
