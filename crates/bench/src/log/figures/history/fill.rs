//! Filling a log, fast: a hundred events per request, from several callers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use tokio::task::JoinSet;
use tokio::time::Instant;

use weft_eventlog::lay_out;

use crate::fleet::{Fleet, Lane};
use crate::say;
use crate::store::{Log, events};
use weft_bench::server::Database;

/// Callers: enough for full batches, and few enough that a batch is no more than one.
const CALLERS: usize = 32;
/// Events per request.
const PER_REQUEST: usize = 100;
/// Events between two lines about how far it has come.
const SAY_EVERY: u64 = 1_000_000;

/// What a log was filled with.
pub(super) struct Filled {
    pub(super) events: u64,
    pub(super) payload_bytes_average: f64,
    pub(super) events_per_s: f64,
}

/// What callers have written so far.
#[derive(Default)]
struct Progress {
    events: AtomicU64,
    payload_bytes: AtomicU64,
}

/// Fills an empty database with at least `wanted` events, then writes everything back and takes statistics, so that what is
/// measured next does not pay for it. Ranges hold `range` positions if that is said.
pub(super) async fn fill(
    database: &Database,
    fleet: &mut Fleet,
    wanted: u64,
    range: Option<u32>,
) -> anyhow::Result<Filled> {
    database.migrate().await?;
    if let Some(range) = range {
        lay_out(&database.config, range).await.context("the log cannot be laid out")?;
    }
    say(&format!("filling a log with {wanted} events"));
    let log = database.open_log().await?;
    let store = Log(log.appender());
    let progress = Arc::new(Progress::default());
    let begun = Instant::now();
    // Everything is declared before anything refers to it.
    for lane in fleet.iter_mut() {
        write(&store, lane.beginning()?, &progress).await?;
    }
    let mut callers = JoinSet::new();
    let mut hands: Vec<Vec<Lane>> = (0..CALLERS).map(|_| Vec::new()).collect();
    for lane in std::mem::take(fleet) {
        hands[lane.number % CALLERS].push(lane);
    }
    for lanes in hands {
        callers.spawn(go_on(store.clone(), lanes, wanted, Arc::clone(&progress)));
    }
    while let Some(ended) = callers.join_next().await {
        fleet.extend(ended.context("a caller ended")??);
    }
    fleet.sort_by_key(|lane| lane.number);
    let seconds = begun.elapsed().as_secs_f64();
    log.shutdown().await;
    database.run("checkpoint").await?;
    database.run("vacuum (analyze)").await?;
    let events = progress.events.load(Ordering::Relaxed);
    let bytes = progress.payload_bytes.load(Ordering::Relaxed);
    Ok(Filled {
        events,
        payload_bytes_average: bytes as f64 / events as f64,
        events_per_s: events as f64 / seconds,
    })
}

async fn go_on(
    store: Log,
    mut lanes: Vec<Lane>,
    wanted: u64,
    progress: Arc<Progress>,
) -> anyhow::Result<Vec<Lane>> {
    let mut turn = 0;
    while progress.events.load(Ordering::Relaxed) < wanted {
        turn = (turn + 1) % lanes.len();
        let request = lanes[turn].history(PER_REQUEST)?;
        write(&store, request, &progress).await?;
    }
    Ok(lanes)
}

async fn write(
    store: &Log,
    request: weft_eventlog::AppendRequest,
    progress: &Progress,
) -> anyhow::Result<()> {
    let written = request.scopes.iter().flat_map(|part| &part.events);
    let bytes: usize = written.map(|event| event.payload.len()).sum();
    let count = events(&store.append(request).await?);
    progress.payload_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    let before = progress.events.fetch_add(count, Ordering::Relaxed);
    if before / SAY_EVERY != (before + count) / SAY_EVERY {
        say(&format!("{} events", before + count));
    }
    Ok(())
}
