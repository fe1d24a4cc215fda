//! `weft-restarts`: opens connections at a steady rate while sidecars are restarted, drained and upgraded in place, and demands that none
//! fails. `cargo xtask torture restarts` builds and runs it.
//!
//! Progress goes to standard error, how it went to standard output, as JSON on its last line.

use anyhow::ensure;
use clap::Parser;
use weft_tests::restarts::{self, Plan};

/// Restart, drain and upgrade sidecars while connections are opened at a steady rate
#[derive(Debug, Parser)]
#[command(name = "weft-restarts", version)]
struct Cli {
    /// Instances that are stopped and started again
    #[arg(long, value_name = "N", default_value_t = 34)]
    restarts: u16,
    /// The same with connections on them that do not end
    #[arg(long, value_name = "N", default_value_t = 33)]
    drains: u16,
    /// Sidecars that a new process takes the place of
    #[arg(long, value_name = "N", default_value_t = 33)]
    upgrades: u16,
    /// New connections each second
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=5000))]
    rate: u32,
    /// In which order, and which instances
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Cli { restarts, drains, upgrades, rate, seed } = Cli::parse();
    let plan =
        Plan { restarts: restarts.into(), drains: drains.into(), upgrades: upgrades.into(), rate, seed };
    let outcome = restarts::run(plan).await?;
    println!(
        "{}",
        serde_json::json!({
            "restarts": restarts, "drains": drains, "upgrades": upgrades, "rate": rate, "seed": seed,
            "passed": outcome.passed, "failed": outcome.failed, "failures": outcome.failures,
            "drained": outcome.drained, "cut_early": outcome.cut_early, "took_s": outcome.took.as_secs(),
        })
    );
    ensure!(outcome.passed > 0, "no connection passed");
    ensure!(outcome.failed == 0, "{} new connections failed", outcome.failed);
    ensure!(outcome.cut_early == 0, "{} connections did not get the whole drain", outcome.cut_early);
    Ok(())
}
