//! The fold: incremental equals full, over a made-up mesh's whole life.
//!
//! Random commands of every kind are decided ([`life`]), written down as the log stores events ([`stored`]), and folded
//! incrementally in batches of random sizes. At random points, and at the end, the projection is held against one that was
//! folded in bulk from the first stored event, and against what is built from the state alone: every shard, every manifest, every
//! sidecar's version. At the end another process reads the same stored events, in other batches, and has to come to the same hashes.

mod life;
mod stored;

use anyhow::Context;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use weft_model::Event;
use weft_routing::projection::Work;
use weft_routing::{Hash, Projection};

use crate::say;
use life::Life;

/// The word that a process is started with to read the events again.
pub(crate) const AGAIN: &str = "fold-again";
/// Most events of a batch. Pages of a busy log are longer, those of a quiet one have one event.
const BATCH_MAX: usize = 64;
/// Points at which everything is compared, besides the end.
const POINTS: usize = 8;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Repeat an earlier run [default: random, and printed]
    #[arg(long)]
    seed: Option<u64>,
    /// Events to fold
    #[arg(long, default_value_t = 20_000)]
    events: usize,
    /// Services of the mesh
    #[arg(long, default_value_t = 200)]
    services: usize,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Again {
    events: PathBuf,
    #[arg(long)]
    seed: u64,
}

/// What a projection comes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Outcome {
    /// Over the key, hash and position of every shard, the hash and position of every manifest, and the version of every sidecar.
    hash: String,
    shards: usize,
    manifests: usize,
    sidecars: usize,
}

impl Outcome {
    fn of(projection: &Projection) -> Self {
        let shards = projection.built();
        let mut lines: Vec<_> =
            shards.map(|(key, it)| format!("{key} {} {}\n", it.hash, it.position)).collect();
        lines.extend(
            projection
                .classes()
                .values()
                .map(|class| format!("{} {} {}\n", class.interest, class.manifest.hash(), class.position)),
        );
        lines.extend(projection.sidecars().map(|id| {
            let wanted = projection.wanted(id).map(|wanted| wanted.version.to_string());
            format!("{id} {}\n", wanted.unwrap_or_default())
        }));
        Self {
            hash: Hash::of_parts(lines.iter().map(String::as_bytes)).to_string(),
            shards: projection.shards().len(),
            manifests: projection.classes().len(),
            sidecars: projection.sidecars().count(),
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    seed: u64,
    events: usize,
    batches: usize,
    compared: usize,
    types: usize,
    shards_rebuilt_per_event: f64,
    manifests_rebuilt_per_event: f64,
    fold_seconds: f64,
    seconds: f64,
    #[serde(flatten)]
    outcome: Outcome,
}

/// Lives, folds and compares. True if nothing differs.
#[expect(clippy::disallowed_methods, reason = "tells how long it took")]
pub(crate) fn run(args: &Args) -> anyhow::Result<bool> {
    let seed = args.seed.unwrap_or_else(rand::random);
    say(&format!("fold: seed {seed}, {} events", args.events));
    let began = Instant::now();
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("events");
    let mut rng = StdRng::seed_from_u64(seed);
    let points = points(&mut rng, args.events);
    let mut life = Life::new(seed, args.services);
    let mut log = stored::Writer::create(&path)?;
    let mut projection = Projection::default();
    let mut types = BTreeSet::new();
    let (mut work, mut batches, mut folded, mut compared) = (Work::default(), 0, 0, 0);
    let mut fold_time = std::time::Duration::ZERO;
    while folded < args.events {
        let size = rng.random_range(1..=BATCH_MAX).min(args.events - folded);
        let batch = life.next(size)?;
        for fact in &batch {
            types.insert(fact.event.type_name());
            log.append(fact)?;
        }
        let started = Instant::now();
        work += projection.apply(&batch).context("a decided event does not fold")?.work;
        fold_time += started.elapsed();
        batches += 1;
        let before = folded;
        folded += batch.len();
        if points.range(before..folded).next().is_some() || folded >= args.events {
            log.flush()?;
            if !same(&projection, &path)? {
                say(&format!(
                    "the projections differ after {folded} events; to repeat: {}",
                    repeat(args, seed)
                ));
                return Ok(false);
            }
            compared += 1;
        }
    }
    let known: BTreeSet<_> = Event::known().map(|(name, _)| name).collect();
    let missing: Vec<_> = known.difference(&types).collect();
    anyhow::ensure!(
        missing.is_empty(),
        "no event of {missing:?} in so short a life; ask for some thousand --events"
    );
    let outcome = Outcome::of(&projection);
    let elsewhere = in_another_process(&path, seed)?;
    if elsewhere != outcome {
        say(&format!(
            "another process comes to {elsewhere:?}, not {outcome:?}; to repeat: {}",
            repeat(args, seed)
        ));
        return Ok(false);
    }
    #[expect(clippy::cast_precision_loss, reason = "a ratio")]
    let per_event = |count: usize| count as f64 / folded as f64;
    let report = Report {
        seed,
        events: folded,
        batches,
        compared,
        types: types.len(),
        shards_rebuilt_per_event: per_event(work.shards),
        manifests_rebuilt_per_event: per_event(work.manifests),
        fold_seconds: fold_time.as_secs_f64(),
        seconds: began.elapsed().as_secs_f64(),
        outcome,
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(true)
}

/// The other process: reads the events in batches of its own.
pub(crate) fn again(args: &Again) -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(!args.seed);
    let mut projection = Projection::default();
    let mut batch = Vec::new();
    let mut size = rng.random_range(1..=BATCH_MAX);
    stored::read(&args.events, |fact| {
        batch.push(fact);
        if batch.len() >= size {
            projection.apply(&batch)?;
            batch.clear();
            size = rng.random_range(1..=BATCH_MAX);
        }
        Ok(())
    })?;
    projection.apply(&batch)?;
    println!("{}", serde_json::to_string(&Outcome::of(&projection))?);
    Ok(())
}

fn points(rng: &mut StdRng, events: usize) -> BTreeSet<usize> {
    (0..POINTS).map(|_| rng.random_range(0..events.max(1))).collect()
}

/// Holds a projection against one that is folded in bulk from the stored events, and against what its state alone tells.
fn same(projection: &Projection, events: &Path) -> anyhow::Result<bool> {
    let mut bulk = Projection::default().into_bulk();
    stored::read(events, |fact| Ok(bulk.apply([&fact])?))?;
    let full = bulk.finish();
    Ok(full == *projection
        && projection.recompute() == *projection
        && Outcome::of(&full) == Outcome::of(projection))
}

fn in_another_process(events: &Path, seed: u64) -> anyhow::Result<Outcome> {
    let mut command = Command::new(std::env::current_exe()?);
    let output = command.arg(AGAIN).arg(events).args(["--seed", &seed.to_string()]).output()?;
    anyhow::ensure!(
        output.status.success(),
        "the other process: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn repeat(args: &Args, seed: u64) -> String {
    let Args { events, services, .. } = args;
    format!("cargo xtask torture fold --seed {seed} --events {events} --services {services}")
}
