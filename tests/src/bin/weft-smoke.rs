//! `weft-smoke`: starts a mesh, tries everything it promises, stops it. `cargo xtask up --smoke` builds and runs it.
//!
//! One line per step on standard output, the last one is `smoke: N/N ok`; the exit status is 0 only then. Progress goes
//! to standard error. The mesh lives in a temporary folder, which is kept and named if a step fails.

use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use weft_tests::report::Report;
use weft_tests::smoke::Smoke;

/// As a shell says that SIGINT ended a program.
const INTERRUPTED: u8 = 130;

/// Start a whole mesh, try everything it promises, and stop it
#[derive(Debug, Parser)]
#[command(name = "weft-smoke", version)]
struct Cli {
    /// Use this PostgreSQL (version 15 or newer) instead of a private one; the role must be a superuser
    #[arg(long, env = "WEFT_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let mut smoke = Smoke::prepare(cli.database_url.filter(|url| !url.is_empty()))?;
    let mut report = Report::new(smoke.logs());
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let interrupted = tokio::select! {
        () = Box::pin(smoke.run(&mut report)) => false,
        _ = interrupt.recv() => true,
        _ = terminate.recv() => true,
    };
    if interrupted {
        eprintln!("interrupted; stopping the mesh");
        smoke.abandon().await?;
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if !report.all_ok() {
        eprintln!("the mesh's folder is kept: {}", smoke.keep().display());
    }
    println!("{}", report.sum());
    Ok(if report.all_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
