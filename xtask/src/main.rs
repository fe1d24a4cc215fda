//! `cargo xtask`: the developer's and the newcomer's door.
//!
//! It builds quickly, since it is the first thing a newcomer waits for: nothing of Weft itself is linked in, only the
//! private PostgreSQL. What belongs to a running mesh is in `weft`, which `up` builds and becomes.

mod bench;
mod cargo;
mod check;
mod fuzz;
mod simulate;
mod test;
mod tools;
mod torture;
mod up;

use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use weft_pgserver::Binaries;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Weft's developer commands")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Build what is needed and run a whole mesh on this machine until Ctrl-C
    Up(up::Up),
    /// Run every test, on a real PostgreSQL
    Test(test::Test),
    /// Break things on purpose, and prove that nothing was lost
    Torture(torture::Torture),
    /// Give the sidecar's parsers what nobody would send
    Fuzz(fuzz::Fuzz),
    /// Run the control plane's decisions in one thread with one seed, under faults, and check every invariant
    #[command(disable_help_flag = true)]
    Simulate(simulate::Simulate),
    /// Check format, lints, the layering of the crates, and the dependencies
    Check(check::Check),
    /// Measure, on a real PostgreSQL
    Bench(bench::Bench),
}

#[derive(Debug, Args)]
struct Database {
    /// Use this PostgreSQL (version 15 or newer) instead of a private one; the role must be a superuser
    #[arg(long, env = "WEFT_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,
}

impl Database {
    /// The server to use, if one is named; an empty variable names none.
    fn given(&self) -> Option<&str> {
        self.database_url.as_deref().filter(|url| !url.is_empty())
    }
}

/// The server programs of this machine, installed if need be.
fn postgres() -> anyhow::Result<Binaries> {
    Binaries::find_or_install(&mut say).context("PostgreSQL cannot be provided")
}

/// A line about what is going on. On stderr: stdout is for results, which others may read.
fn say(line: &str) {
    eprintln!("xtask: {line}");
}

fn main() -> ExitCode {
    let ended = match Cli::parse().command {
        Task::Up(up) => up.run(),
        Task::Test(test) => test.run(),
        Task::Torture(torture) => torture.run(),
        Task::Fuzz(fuzz) => fuzz.run(),
        Task::Simulate(simulate) => simulate.run(),
        Task::Check(check) => check.run(),
        Task::Bench(bench) => bench.run(),
    };
    ended.unwrap_or_else(|error| {
        say(&format!("{error}"));
        for cause in error.chain().skip(1) {
            eprintln!("  because {cause}");
        }
        ExitCode::FAILURE
    })
}
