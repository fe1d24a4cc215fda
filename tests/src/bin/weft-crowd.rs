//! `weft-crowd`: holds thousands of connections through a mesh, changes their policy at random, and demands that exactly those are
//! cut which it denies. `cargo xtask torture crowd` builds and runs it.
//!
//! Progress goes to standard error, how it went to standard output, as JSON on its last line.

use std::time::Duration;

use anyhow::ensure;
use clap::Parser;
use weft_tests::crowd::{self, Plan};

/// Hold thousands of connections through a mesh while their policy changes at random
#[derive(Debug, Parser)]
#[command(name = "weft-crowd", version)]
struct Cli {
    /// Connections that live at once
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(4..=25_000))]
    connections: u32,
    /// Be the application at the other end of the connections
    #[arg(long, hide = true)]
    serve: bool,
    /// Changes of the policy
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    flips: u32,
    /// Which changes
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Cli { connections, serve, flips, seed } = Cli::parse();
    if serve {
        return crowd::serve().await;
    }
    let outcome = crowd::run(Plan { connections: connections.try_into()?, flips, seed }).await?;
    let ms = |percent| outcome.percentile(percent).as_ref().map(Duration::as_millis);
    println!(
        "{}",
        serde_json::json!({
            "connections": connections, "flips": flips, "seed": seed, "cuts": outcome.cut_after.len(),
            "cut_after_p50_ms": ms(50), "cut_after_p99_ms": ms(99), "cut_after_max_ms": ms(100),
            "wrong_cuts": outcome.wrong_cuts, "survivors": outcome.survivors,
        })
    );
    ensure!(outcome.wrong_cuts == 0, "{} connections were cut that nothing denied", outcome.wrong_cuts);
    ensure!(outcome.survivors == 0, "{} connections outlived their denial", outcome.survivors);
    Ok(())
}
