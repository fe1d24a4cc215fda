//! `weft-simulation`: many seeds, until one shows that something is broken. `cargo xtask simulate` builds and runs it.

use anyhow::Context;
use clap::{Parser, ValueEnum};
use serde::Serialize;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;
use tokio::time::Instant;
use weft_simulation::{Outcome, Plant, run};

/// How often progress is told.
const TOLD_EVERY: Duration = Duration::from_secs(10);
/// Seeds within which a planted bug is to be found.
const PLANTED_SEEDS: u64 = 1_000;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask simulate", about = "Simulates the control plane under faults, seed by seed")]
struct Args {
    /// How many seeds to run
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Only this one, with everything that happens
    #[arg(long, conflicts_with_all = ["seeds", "from", "minutes", "all_plants"])]
    seed: Option<u64>,
    /// Stop after so many minutes, whatever is left
    #[arg(long)]
    minutes: Option<u64>,
    /// Threads, each of which runs seeds of its own; as many as cores if not given
    #[arg(long)]
    threads: Option<usize>,
    /// Plant this bug; it is to be found
    #[arg(long, value_name = "BUG")]
    plant: Option<Plant>,
    /// Plant each bug in turn, and say at which seed it is found
    #[arg(long, conflicts_with = "plant")]
    all_plants: bool,
}

/// The last line.
#[derive(Debug, Default, Serialize)]
struct Summary {
    seeds: u64,
    bounded: u64,
    rewound: u64,
    lines: u64,
    events: u64,
    seconds: f64,
    plant: Option<Plant>,
    violations: Vec<Outcome>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    plants: Vec<Found>,
}

#[derive(Debug, Serialize)]
struct Found {
    plant: Plant,
    /// After how many seeds; none if it was not found.
    after: Option<u64>,
    violation: Option<String>,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let began = Instant::now();
    let (summary, good) = if let Some(seed) = args.seed {
        let outcome = run(seed, args.plant, true);
        tell(&outcome, args.plant, false);
        let mut summary = Summary { plant: args.plant, ..Summary::default() };
        summary.add(&outcome);
        finish(summary, vec![outcome], args.plant)
    } else if args.all_plants {
        plants(&args)
    } else {
        let (summary, outcomes) = seeds(&args, args.plant, args.seeds)?;
        outcomes.iter().take(3).for_each(|outcome| tell(outcome, args.plant, true));
        finish(summary, outcomes, args.plant)
    };
    let summary = Summary { seconds: began.elapsed().as_secs_f64(), ..summary };
    println!("{}", serde_json::to_string(&summary)?);
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn finish(mut summary: Summary, outcomes: Vec<Outcome>, plant: Option<Plant>) -> (Summary, bool) {
    summary.violations = outcomes.into_iter().filter(|outcome| outcome.violation.is_some()).collect();
    let good = summary.violations.is_empty() == plant.is_none();
    (summary, good)
}

/// Runs seeds on all threads, until the first that is broken. Returns those.
fn seeds(args: &Args, plant: Option<Plant>, count: u64) -> anyhow::Result<(Summary, Vec<Outcome>)> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or(cores).max(1);
    let end = args.from.checked_add(count).context("these seeds end beyond the last one")?;
    let deadline = args.minutes.map(|minutes| Instant::now() + Duration::from_secs(minutes * 60));
    let (next, stop) = (AtomicU64::new(args.from), AtomicBool::new(false));
    let summary = Mutex::new((Summary { plant, ..Summary::default() }, Vec::new(), Instant::now()));
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
                    if seed >= end || late || stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let outcome = run(seed, plant, false);
                    let mut summary = summary.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let (summary, broken, told) = &mut *summary;
                    summary.add(&outcome);
                    if outcome.violation.is_some() {
                        stop.store(true, Ordering::Relaxed);
                        broken.push(outcome);
                    }
                    if told.elapsed() >= TOLD_EVERY {
                        *told = Instant::now();
                        eprintln!("simulate: {} of {count} seeds, {} broken", summary.seeds, broken.len());
                    }
                }
            });
        }
    });
    let (summary, mut broken, _) = summary.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    broken.sort_by_key(|outcome| outcome.seed);
    Ok((summary, broken))
}

impl Summary {
    fn add(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        self.bounded += u64::from(outcome.bounded);
        self.rewound += u64::from(outcome.rewound);
        self.lines += outcome.lines;
        self.events += outcome.events as u64;
    }
}

/// Each bug, and after how many seeds it is found.
fn plants(args: &Args) -> (Summary, bool) {
    let mut summary = Summary::default();
    for plant in Plant::value_variants() {
        let (from, mut found) = (args.from, Found { plant: *plant, after: None, violation: None });
        for seed in from..from.saturating_add(PLANTED_SEEDS) {
            let outcome = run(seed, Some(*plant), false);
            summary.add(&outcome);
            if let Some(violation) = outcome.violation {
                (found.after, found.violation) = (Some(seed - from + 1), Some(violation));
                break;
            }
        }
        let after = found.after.map_or_else(|| "NOT FOUND".to_owned(), |after| format!("{after:>4} seed(s)"));
        let violation = found.violation.as_deref().unwrap_or_default();
        println!("{:<24} {after}  {violation}", plant.name());
        summary.plants.push(found);
    }
    let good = summary.plants.iter().all(|found| found.after.is_some());
    (summary, good)
}

/// What a seed showed, and how to see it again.
fn tell(outcome: &Outcome, plant: Option<Plant>, with_tail: bool) {
    if with_tail {
        outcome.tail.iter().for_each(|line| println!("{line}"));
    }
    let plant = plant.map(|plant| format!(" --plant {}", plant.name())).unwrap_or_default();
    match &outcome.violation {
        Some(violation) => println!("seed {}: {violation}", outcome.seed),
        None => println!("seed {}: nothing is wrong", outcome.seed),
    }
    println!("trace {}; again with: cargo xtask simulate --seed {}{plant}", outcome.trace, outcome.seed);
}
