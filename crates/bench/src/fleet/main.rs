//! Measures the control plane with fleets of simulated sidecars, on a server that this program is told; `cargo xtask bench
//! fleet` runs it on a private one.
//!
//! PostgreSQL, controllers (processes of their own) and fleets share the machine. The README says what each figure means.
//! Progress goes to stderr; the table, and the figures as JSON on the last line, to stdout.

mod figures;
mod mesh;
mod plan;

use std::process::ExitCode;

use clap::Parser;
use weft_bench::report::{Aim, Better, aim, aim_of};
use weft_bench::run::{self, Common, say};

use crate::plan::Plan;

#[derive(Parser)]
#[command(name = "weft-fleetbench", about = "Measures Weft's control plane")]
struct Cli {
    #[command(flatten)]
    common: Common,
}

/// What the figures must be, and what they should be.
const AIMS: &[Aim] = &[
    aim_of("convergence_p99_ms", "1000", "convergence p99, 1,000 sidecars, ms", 120.0, 40.0, Better::Less),
    aim_of("convergence_p99_ms", "10000", "convergence p99, 10,000, ms", 600.0, 250.0, Better::Less),
    aim_of(
        "convergence_p99_ms",
        "100000_1pct",
        "the same, 100,000, 1 % interested",
        400.0,
        150.0,
        Better::Less,
    ),
    aim("bytes_per_endpoint_change", "bytes per change, 1,000 endpoints", 160.0, 100.0, Better::Less),
    aim("shards_rebuilt_per_change", "shards rebuilt per change", 1.0, 1.0, Better::Less),
    aim(
        "cpu_per_change_ratio_1000_vs_10_services",
        "CPU per change, 1,000 : 10 services",
        2.0,
        1.2,
        Better::Less,
    ),
    aim("reconnect_10000_s", "reconnect of 10,000, s", 5.0, 2.0, Better::Less),
    aim("memory_kib_per_sidecar", "memory per sidecar, KiB", 48.0, 16.0, Better::Less),
    aim("slow_readers_p99_ratio", "p99 beside 1,000 slow readers : alone", 1.2, 1.0, Better::Less),
    aim("slow_readers_memory_kib_each", "memory per slow reader, KiB", 128.0, 64.0, Better::Less),
    aim("leader_kill_to_publish_p99_s", "leader killed to publishing, p99, s", 5.0, 2.0, Better::Less),
    aim_of("flapper", "changes", "flapper: published changes", 12.0, 8.0, Better::Less),
    aim_of("flapper", "events", "flapper: events", 90.0, 70.0, Better::Less),
    aim("unused_services_bytes", "bytes for 10,000 unused services", 0.0, 0.0, Better::Less),
];

/// What every measurement needs.
type Bench = run::Bench<Plan>;

/// As in the controller: the fleet shares its cores with it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let Cli { common } = Cli::parse();
    let json = common.json.clone();
    let plan = Plan::new(common.quick, common.only.clone());
    let bench = plan.and_then(|plan| Bench::new("fleet", AIMS, common, plan));
    run::run("weft-fleetbench", json.as_deref(), bench, measure)
}

async fn measure(bench: &mut Bench) -> anyhow::Result<()> {
    bench.report.set("scale", bench.plan.scale());
    figures::convergence(bench).await?;
    figures::slow_readers(bench).await?;
    figures::change_size(bench).await?;
    figures::change_cost(bench).await?;
    figures::failover(bench).await?;
    figures::flapper(bench);
    figures::unused(bench).await?;
    bench.report.check(bench.plan.keys())
}
