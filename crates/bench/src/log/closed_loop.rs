//! A closed loop: so many callers, each with one request under way, for a fixed time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::fleet::{Fleet, Lane};
use crate::store::{Load, Store};

/// How long a round takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    /// Not measured.
    pub(crate) warm_up: Duration,
    /// Measured.
    pub(crate) measure: Duration,
}

/// What a round saw.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    /// Events made durable, per second.
    pub(crate) events: f64,
    /// Requests refused, per second.
    pub(crate) refused: f64,
}

#[derive(Debug, Default)]
struct Counters {
    events: AtomicU64,
    refused: AtomicU64,
    stop: AtomicBool,
}

impl Counters {
    fn read(&self) -> (u64, u64, Instant) {
        (self.events.load(Ordering::Relaxed), self.refused.load(Ordering::Relaxed), Instant::now())
    }
}

/// Runs a load with `callers` callers, among whom the fleet's lanes are dealt out. The fleet comes back as it is then.
pub(crate) async fn closed_loop<S: Store + Clone>(
    store: &S,
    fleet: &mut Fleet,
    callers: usize,
    load: Load,
    times: Times,
) -> anyhow::Result<Rates> {
    let counters = Arc::new(Counters::default());
    let mut tasks = JoinSet::new();
    for lanes in deal(std::mem::take(fleet), callers) {
        tasks.spawn(call(store.clone(), lanes, load, Arc::clone(&counters)));
    }
    sleep(times.warm_up).await;
    let before = counters.read();
    sleep(times.measure).await;
    let after = counters.read();
    counters.stop.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        fleet.extend(ended.context("a caller ended")??);
    }
    fleet.sort_by_key(|lane| lane.number);
    let seconds = (after.2 - before.2).as_secs_f64();
    let rate = |before: u64, after: u64| (after - before) as f64 / seconds;
    Ok(Rates { events: rate(before.0, after.0), refused: rate(before.1, after.1) })
}

async fn call<S: Store>(
    store: S,
    mut lanes: Vec<Lane>,
    load: Load,
    counters: Arc<Counters>,
) -> anyhow::Result<Vec<Lane>> {
    let mut turn = 0;
    while !counters.stop.load(Ordering::Relaxed) {
        turn = (turn + 1) % lanes.len();
        let written = store.write(&mut lanes[turn], load).await?;
        counters.events.fetch_add(written.events, Ordering::Relaxed);
        counters.refused.fetch_add(written.refused, Ordering::Relaxed);
    }
    Ok(lanes)
}

/// Deals the lanes out, as evenly as can be.
fn deal(fleet: Fleet, callers: usize) -> Vec<Vec<Lane>> {
    let mut hands: Vec<Vec<Lane>> = (0..callers).map(|_| Vec::new()).collect();
    for mut lane in fleet {
        lane.caller = lane.number % callers;
        hands[lane.number % callers].push(lane);
    }
    hands
}
