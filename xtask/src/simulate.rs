//! `cargo xtask simulate`: the control plane's decisions, seed by seed, under faults.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::Context;

use crate::cargo::{cargo, must, target_dir};
use crate::say;

#[derive(Debug, clap::Args)]
pub(crate) struct Simulate {
    /// Passed to weft-simulation; see them with --help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    args: Vec<OsString>,
}

impl Simulate {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        say("building with optimisation; the first time takes some minutes");
        must(cargo(["build", "--release"]).args(["--package", "weft-simulation"]))?;
        let program = target_dir()?.join("release/weft-simulation");
        // It takes this process over: the terminal, its signals and the exit status are its own.
        Err(Command::new(&program).args(self.args).exec())
            .with_context(|| format!("{} could not be run", program.display()))
    }
}
