//! `weft-partition`: cuts a mesh's sidecars off from their controllers for some minutes, and demands that no connection fails.
//! `cargo xtask torture partition` builds and runs it.
//!
//! Progress goes to standard error, how it went to standard output, as JSON on its last line.

use std::time::Duration;

use clap::Parser;
use weft_tests::partition;

/// Cut sidecars off from their controllers, in silence, while the mesh changes and connections come
#[derive(Debug, Parser)]
#[command(name = "weft-partition", version)]
struct Cli {
    /// For how long; leaves are renewed from half of their hour on, which takes a controller
    #[arg(long, value_name = "MINUTES", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=29))]
    minutes: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Cli { minutes } = Cli::parse();
    let outcome = partition::run(Duration::from_secs(minutes * 60)).await?;
    let partition::Outcome { passed, missed, back_after } = outcome;
    let report = serde_json::json!({
        "minutes": minutes,
        "connections_passed": passed,
        "changes_missed": missed,
        "back_after_ms": u64::try_from(back_after.as_millis())?,
    });
    println!("{report}");
    Ok(())
}
