//! `cargo xtask torture`: faults, and the proof that nothing was lost.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::Context;

use crate::cargo::{cargo, must, run, target_dir};
use crate::{postgres, say};

/// What is run; `weft-torture` finds the controller beside itself, and brings its own PostgreSQL.
const PROGRAMS: &[&str] = &["weft-torture", "weft-controller"];

#[derive(Debug, clap::Args)]
pub(crate) struct Torture {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// The fold: incremental equals full over random events of every kind, here and in another process
    #[command(disable_help_flag = true)]
    Fold {
        /// Passed to weft-torture; see them with --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
    /// Several controllers: the one that leads is paused, killed and cut off
    #[command(disable_help_flag = true)]
    Leader {
        /// Passed to weft-torture; see them with --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
    /// The event log: kills, cuts, full disks, hostile edits; crates/torture/README.md says how
    #[command(disable_help_flag = true)]
    Log {
        /// Passed to weft-torture; see them with --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
}

impl Torture {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let (what, args) = match self.what {
            What::Fold { args } => ("fold", args),
            What::Leader { args } => ("leader", args),
            What::Log { args } => ("log", args),
        };
        postgres()?;
        let mut build = cargo(["build", "--release"]);
        say("building with optimisation; the first time takes some minutes");
        must(build.args(PROGRAMS.iter().flat_map(|package| ["--package", *package])))?;
        let program = target_dir()?.join("release/weft-torture");
        // It takes this process over: the terminal, its signals and the exit status are its own.
        Err(Command::new(&program).arg(what).args(args).exec())
            .with_context(|| format!("{} could not be run", program.display()))
    }
}

/// The short forms, of programs that are built.
pub(crate) fn passes() -> anyhow::Result<bool> {
    for what in ["fold", "log", "leader"] {
        say(&format!("torture {what}, the short form"));
        if !run(Command::new(target_dir()?.join("debug/weft-torture")).arg(what))?.success() {
            return Ok(false);
        }
    }
    Ok(true)
}
