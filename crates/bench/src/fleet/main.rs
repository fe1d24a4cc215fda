//! Measures the control plane with fleets of simulated sidecars, on a server that this program is told; `cargo xtask bench
//! fleet` runs it on a private one.
//!
//! PostgreSQL, controllers (processes of their own) and fleets share the machine. The README says what each figure means.
//! Progress goes to stderr; the table, and the figures as JSON on the last line, to stdout.

mod figures;
mod mesh;
mod plan;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use serde_json::json;
use weft_bench::cpu;
use weft_bench::report::{Aim, Better, Report, aim, aim_of};
use weft_bench::server::Server;

use crate::plan::Plan;

#[derive(Parser)]
#[command(name = "weft-fleetbench", about = "Measures Weft's control plane")]
struct Cli {
    /// A PostgreSQL on this machine whose role may create databases
    #[arg(long, env = "WEFT_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: String,
    /// A minute, to see that it works; its figures mean nothing
    #[arg(long)]
    quick: bool,
    /// Only these figures: keys of the JSON, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "KEYS")]
    only: Vec<String>,
    /// Also write the JSON to this file
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
    /// The controller's program; beside this one unless told
    #[arg(long, value_name = "PATH")]
    controller: Option<PathBuf>,
    /// What was built, for the report
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
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
    aim("leader_kill_to_publish_p99_s", "leader killed to publishing, p99, s", 5.0, 2.0, Better::Less),
    aim("slow_readers_ratio", "p99 beside 1,000 slow readers", 1.2, 1.2, Better::Less),
    aim_of("flapper", "changes", "flapper: published changes", 12.0, 8.0, Better::Less),
    aim_of("flapper", "events", "flapper: events", 90.0, 70.0, Better::Less),
    aim("unused_services_bytes", "bytes for 10,000 unused services", 0.0, 0.0, Better::Less),
];

/// What every measurement needs.
struct Bench {
    server: Server,
    /// As it was given: a controller is told it with another database.
    url: String,
    plan: Plan,
    controller: PathBuf,
    report: Report,
}

fn main() -> ExitCode {
    let ended = run(Cli::parse());
    ended.map_or_else(
        |error| {
            eprintln!("weft-fleetbench: {error:#}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let json_path = cli.json.clone();
    let report = runtime.block_on(async {
        let mut bench = Bench::new(cli)?;
        let measured = Box::pin(bench.measure()).await;
        // Whatever happened, somebody's server is left as it was.
        let cleaned = bench.server.clean().await;
        measured.and(cleaned).map(|()| bench.report)
    })?;
    let json = report.json()?;
    if let Some(path) = json_path {
        std::fs::write(&path, format!("{json}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{}\n{json}", report.table());
    Ok(())
}

impl Bench {
    fn new(cli: Cli) -> anyhow::Result<Self> {
        let plan = Plan::new(cli.quick, cli.only)?;
        let controller = match cli.controller {
            Some(path) => path,
            None => std::env::current_exe()?.with_file_name("weft-controller"),
        };
        let mut report = Report::new(AIMS);
        let (machine, cores) = cpu::machine();
        report.set("machine", machine);
        report.set("cores", cores);
        report.set("scale", plan.scale());
        report.set("revision", cli.revision.map_or(serde_json::Value::Null, |revision| json!(revision)));
        let server = Server::new("fleet", &cli.database_url)?;
        Ok(Self { server, url: cli.database_url, plan, controller, report })
    }

    async fn measure(&mut self) -> anyhow::Result<()> {
        self.report.set("postgres", self.server.describe().await?);
        figures::convergence(self).await?;
        figures::change_size(self).await?;
        figures::change_cost(self).await?;
        figures::failover(self).await?;
        figures::flapper(self);
        figures::unused(self).await?;
        Ok(())
    }
}

/// A line about what is going on.
fn say(line: &str) {
    eprintln!("bench: {line}");
}
