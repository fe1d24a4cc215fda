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

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use serde_json::json;

use crate::plan::{Part, Plan};
use weft_bench::report::{Aim, Better, Report, aim, aim_of};
use weft_bench::server::Server;

/// The default seed: any number would do, as long as it stays the same.
const SEED: u64 = 20_260_101;

#[derive(Parser)]
#[command(name = "weft-logbench", about = "Measures Weft's event log")]
struct Cli {
    /// A PostgreSQL on this machine whose role may create databases
    #[arg(long, env = "WEFT_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: String,
    /// A few seconds, to see that it works; its figures mean nothing
    #[arg(long)]
    quick: bool,
    /// Also with ten million events
    #[arg(long)]
    full: bool,
    /// Only these figures: keys of the JSON, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "KEYS")]
    only: Vec<String>,
    /// Also write the JSON to this file
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
    /// What the load is made from
    #[arg(long, default_value_t = SEED)]
    seed: u64,
    /// The controller's program; beside this one unless told
    #[arg(long, value_name = "PATH")]
    controller: Option<PathBuf>,
    /// What was built, for the report
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
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
struct Bench {
    server: Server,
    /// As it was given: a program that is started is told it with another database.
    url: String,
    plan: Plan,
    seed: u64,
    controller: PathBuf,
    report: Report,
}

fn main() -> ExitCode {
    let ended = run(Cli::parse());
    ended.map_or_else(
        |error| {
            eprintln!("weft-logbench: {error:#}");
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
        let measured = bench.measure().await;
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
        let plan = Plan::new(cli.quick, cli.full, cli.only)?;
        let controller = match cli.controller {
            Some(path) => path,
            None => std::env::current_exe()?.with_file_name("weft-controller"),
        };
        let mut report = Report::new(AIMS);
        let (machine, cores) = weft_bench::cpu::machine();
        report.set("machine", machine);
        report.set("cores", cores);
        report.set("scale", plan.scale);
        report.set("rounds", plan.rounds);
        report.set("round_s", plan.times.measure.as_secs_f64());
        report.set("seed", cli.seed);
        report.set("scopes", fleet::SCOPES);
        report.set("revision", cli.revision.map_or(serde_json::Value::Null, |revision| json!(revision)));
        let server = Server::new("log", &cli.database_url)?;
        Ok(Self { server, url: cli.database_url, plan, seed: cli.seed, controller, report })
    }

    async fn measure(&mut self) -> anyhow::Result<()> {
        self.report.set("postgres", self.server.describe().await?);
        self.report.set_of("fsync_ms", "before", figures::fsync_ms()?);
        if self.plan.needs(Part::Appends) {
            figures::appends(self).await?;
        }
        if self.plan.needs(Part::Batches) {
            figures::batches(self).await?;
        }
        if self.plan.needs(Part::Latency) {
            figures::latency(self).await?;
        }
        if self.plan.needs(Part::Conflicts) {
            figures::conflicts(self).await?;
        }
        if self.plan.needs(Part::History) {
            figures::history(self).await?;
        }
        self.report.set_of("fsync_ms", "after", figures::fsync_ms()?);
        let missing: Vec<&str> = self.plan.keys().filter(|key| !self.report.has(key)).collect();
        anyhow::ensure!(missing.is_empty(), "not measured, though asked for: {}", missing.join(", "));
        Ok(())
    }
}

/// A line about what is going on.
fn say(line: &str) {
    eprintln!("bench: {line}");
}
