//! `cargo xtask torture`: faults, and the proof that nothing was lost.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::Context;

use crate::cargo::{cargo, must, run, target_dir};
use crate::{postgres, say};

/// What is run; `weft-torture` finds the controller beside itself, and brings its own PostgreSQL.
const PROGRAMS: &[&str] = &["weft-torture", "weft-controller"];
/// The same for `weft-partition`, `weft-crowd`, `weft-bytes` and `weft-restarts`, which start a whole mesh.
const MESH: &[&str] = &["weft-tests", "weft-cli", "weft-controller", "weft-proxy"];

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
    /// Sidecars of a whole mesh are out of touch with their controllers, for up to 29 minutes, and no connection fails
    #[command(disable_help_flag = true)]
    Partition {
        /// Passed to weft-partition; see them with --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
    /// Much on one connection and little on thousands, over a line that cuts and delays it: every byte arrives, once and in its stream
    #[command(disable_help_flag = true)]
    Bytes {
        /// Passed to weft-bytes; see them with --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
    /// Thousands of connections live while their policy changes at random: what is denied is cut, and nothing else
    #[command(disable_help_flag = true)]
    Crowd {
        /// Passed to weft-crowd; see them with --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
    /// Sidecars are restarted, drained and upgraded in place under 500 new connections a second, of which none may fail
    #[command(disable_help_flag = true)]
    Restarts {
        /// Passed to weft-restarts; see them with --help
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
        let (packages, line, args) = match self.what {
            What::Fold { args } => (PROGRAMS, &["weft-torture", "fold"][..], args),
            What::Leader { args } => (PROGRAMS, &["weft-torture", "leader"][..], args),
            What::Log { args } => (PROGRAMS, &["weft-torture", "log"][..], args),
            What::Partition { args } => (MESH, &["weft-partition"][..], args),
            What::Bytes { args } => (MESH, &["weft-bytes"][..], args),
            What::Restarts { args } => (MESH, &["weft-restarts"][..], args),
            What::Crowd { args } => (MESH, &["weft-crowd"][..], args),
        };
        postgres()?;
        let mut build = cargo(["build", "--release"]);
        say("building with optimisation; the first time takes some minutes");
        must(build.args(packages.iter().flat_map(|package| ["--package", *package])))?;
        let program = target_dir()?.join("release").join(line[0]);
        // It takes this process over: the terminal, its signals and the exit status are its own.
        Err(Command::new(&program).args(&line[1..]).args(args).exec())
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
