//! `cargo xtask up`: build the mesh's programs and become `weft up`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::Context;

use crate::cargo::{cargo, must, target_dir};
use crate::{Database, postgres, say};

/// The programs of a running mesh. `weft` finds the other two beside itself.
const PROGRAMS: &[&str] = &["weft-cli", "weft-controller", "weft-proxy"];

#[derive(Debug, clap::Args)]
pub(crate) struct Up {
    #[command(flatten)]
    database: Database,
    /// Build with optimisation; takes longer to build
    #[arg(long)]
    release: bool,
    /// Start a mesh, try everything it promises, stop it, and end with `smoke: N/N ok`
    #[arg(long)]
    smoke: bool,
    /// Passed to `weft up`, or with --smoke to the smoke run
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    args: Vec<OsString>,
}

impl Up {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        if self.database.given().is_none() {
            let found = postgres()?;
            say(&format!("PostgreSQL {} in {}", found.major(), found.dir().display()));
        }

        let mut build = cargo(["build"]);
        build.args(PROGRAMS.iter().flat_map(|package| ["--package", *package]));
        if self.smoke {
            build.args(["--package", "weft-tests", "--bins"]);
        }
        if self.release {
            build.arg("--release");
        }
        say("building; the first time takes some minutes");
        must(&mut build)?;

        let programs = target_dir()?.join(if self.release { "release" } else { "debug" });
        let mut mesh = if self.smoke {
            Command::new(programs.join("weft-smoke"))
        } else {
            let mut weft = Command::new(programs.join("weft"));
            weft.arg("up");
            weft
        };
        if let Some(url) = self.database.given() {
            mesh.env("WEFT_DATABASE_URL", url);
        }
        // It takes this process over: the terminal, its signals and the exit status are its own.
        let program = mesh.get_program().to_owned();
        Err(mesh.args(self.args).exec()).with_context(|| format!("{} could not be run", program.display()))
    }
}
