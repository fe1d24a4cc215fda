//! Measures the event log, on a server that this program is told; `cargo xtask bench log` runs it on a private one.
//!
//! The README says what each figure means. The machine is noisy, so what is compared takes turns within one run, and
//! medians are reported: quote ratios.
//!
//! Progress goes to stderr; the table, and the figures as JSON on the last line, to stdout.

mod baseline;
mod closed_loop;
mod figures;
mod fleet;
mod open_loop;
mod plan;
mod store;

use std::process::ExitCode;

use clap::Parser;
use weft_bench::report::{Aim, Better, aim, aim_of};
use weft_bench::run::{self, Common, say};

use crate::plan::{Part, Plan};

/// The default seed: any number would do, as long as it stays the same.
const SEED: u64 = 20_260_101;

#[derive(Parser)]
#[command(name = "weft-logbench", about = "Measures Weft's event log")]
struct Cli {
    #[command(flatten)]
    common: Common,
    /// Also with ten million events
    #[arg(long)]
    full: bool,
    /// What the load is made from
    #[arg(long, default_value_t = SEED)]
    seed: u64,
}

/// What the figures must be, and what they should be.
const AIMS: &[Aim] = &[
    aim_of("appends_per_s", "256", "appends/s, 256 callers", 15_000.0, 25_000.0, Better::More),
    aim("baseline_ratio_256", "times the baseline, 256 callers", 5.0, 10.0, Better::More),
    aim("batch100_events_per_s", "events/s, 100 per request", 40_000.0, 80_000.0, Better::More),
    aim("p99_ms_at_5000", "p99 at 5,000/s, ms", 20.0, 10.0, Better::Less),
    aim("conflict_loss", "loss with 20 % conflicts", 0.2, 0.1, Better::Less),
    aim_of("slowdown", "1000000", "slowdown at 1 M events", 0.15, 0.05, Better::Less),
    aim_of("slowdown", "10000000", "slowdown at 10 M events", 0.15, 0.05, Better::Less),
    aim("replay_rows_events_per_s", "replay + fold from rows, events/s", 200_000.0, 350_000.0, Better::More),
    aim("replay_sealed_events_per_s", "replay + fold sealed, events/s", 500_000.0, 1_000_000.0, Better::More),
    aim("verify_events_per_s", "verify, events/s", 300_000.0, 1_000_000.0, Better::More),
    aim("cold_start_1m_s", "cold start with 1 M events, s", 2.0, 0.5, Better::Less),
];

/// What every measurement needs.
type Bench = run::Bench<Plan>;

fn main() -> ExitCode {
    let Cli { common, full, seed } = Cli::parse();
    let json = common.json.clone();
    let plan = Plan::new(common.quick, full, common.only.clone(), seed);
    let bench = plan.and_then(|plan| Bench::new("log", AIMS, common, plan));
    run::run("weft-logbench", json.as_deref(), bench, measure)
}

async fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    let Plan { scale, rounds, times, seed, .. } = bench.plan;
    bench.report.set("scale", scale);
    bench.report.set("rounds", rounds);
    bench.report.set("round_s", times.measure.as_secs_f64());
    bench.report.set("seed", seed);
    bench.report.set("scopes", fleet::SCOPES);
    bench.report.set_of("fsync_ms", "before", figures::fsync_ms()?);
    if bench.plan.needs(Part::Appends) {
        figures::appends(bench).await?;
    }
    if bench.plan.needs(Part::Batches) {
        figures::batches(bench).await?;
    }
    if bench.plan.needs(Part::Latency) {
        figures::latency(bench).await?;
    }
    if bench.plan.needs(Part::Conflicts) {
        figures::conflicts(bench).await?;
    }
    if bench.plan.needs(Part::History) {
        figures::history(bench).await?;
    }
    bench.report.set_of("fsync_ms", "after", figures::fsync_ms()?);
    bench.report.check(bench.plan.keys())
}
