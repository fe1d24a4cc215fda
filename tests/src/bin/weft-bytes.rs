//! `weft-bytes`: sends much on one connection and little on thousands through two sidecars whose line cuts and delays it, and demands that
//! every byte arrives, once and in its stream. `cargo xtask torture bytes` builds and runs it.
//!
//! Progress goes to standard error, how it went to standard output, as JSON on its last line.

use clap::Parser;
use weft_tests::bytes::{self, Plan};

/// Send bytes through two sidecars whose line is rough, and compare them
#[derive(Debug, Parser)]
#[command(name = "weft-bytes", version)]
struct Cli {
    /// Each way at once on one connection
    #[arg(long, value_name = "N", default_value_t = 10 << 10, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    mib: u64,
    /// Streams afterwards, eight at a time
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(8..=1_000_000))]
    streams: u32,
    /// Which pieces, pauses and lengths
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Cli { mib, streams, seed } = Cli::parse();
    let outcome = bytes::run(Plan { bytes: mib << 20, streams, seed }).await?;
    let took_ms = u64::try_from(outcome.took.as_millis())?;
    println!(
        "{}",
        serde_json::json!({
            "mib_each_way": mib, "took_ms": took_ms, "streams": streams, "tunnels": outcome.tunnels, "seed": seed,
        })
    );
    Ok(())
}
