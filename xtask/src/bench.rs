//! `cargo xtask bench`: measures, on a private PostgreSQL that is set up as `cargo xtask up` sets it up.
//!
//! The bench of the data path, in `bench/proxy.rs`, is somebody else's: a comparison of proxies that Weft takes part in.

mod proxy;

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Context;
use weft_pgserver::Cluster;

use crate::cargo::{cargo, must, root, run, target_dir};
use crate::{Database, postgres, say};

/// What is built; a bench finds the controller beside itself.
const PACKAGES: &[&str] = &["weft-bench", "weft-controller"];

/// The settings of a small server that does nothing else, over those of a local mesh: with the 64 MB of the latter the
/// indexes of one range do not stay in memory, and a checkpoint comes every few seconds.
const SERVER: &[(&str, &str)] = &[("shared_buffers", "512MB"), ("max_wal_size", "4GB")];

#[derive(Debug, clap::Args)]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// The event log: how fast it appends, replays and verifies; crates/bench/README.md explains each figure
    Log(Log),
    /// The control plane: how fast changes reach fleets of sidecars, and what that costs; crates/bench/README.md explains each
    /// figure
    Fleet(Common),
    /// The sidecars' data path, beside other proxies on this machine; proxy/bench/README.md explains how
    Proxy(proxy::Proxy),
}

#[derive(Debug, clap::Args)]
struct Log {
    /// Also with ten million events
    #[arg(long)]
    full: bool,
    #[command(flatten)]
    common: Common,
}

/// What is said of every bench.
#[derive(Debug, clap::Args)]
struct Common {
    #[command(flatten)]
    database: Database,
    /// A few seconds, to see that it works; its figures mean nothing
    #[arg(long)]
    quick: bool,
    /// Only these figures: keys of the JSON, separated by commas
    #[arg(long, value_name = "KEYS")]
    only: Option<String>,
    /// Also write the JSON to this file
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
}

impl Bench {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        match self.what {
            What::Log(Log { full, common }) => {
                let full: &[&str] = if full { &["--full"] } else { &[] };
                common.run("weft-logbench", full)
            }
            What::Fleet(common) => common.run("weft-fleetbench", &[]),
            What::Proxy(proxy) => proxy.run(),
        }
    }
}

impl Common {
    fn run(self, program: &str, flags: &[&str]) -> anyhow::Result<ExitCode> {
        let mut build = cargo(["build", "--release"]);
        say("building with optimisation; the first time takes some minutes");
        must(build.args(PACKAGES.iter().flat_map(|package| ["--package", *package])))?;

        let mut bench = Command::new(target_dir()?.join("release").join(program));
        bench.args(flags);
        if self.quick {
            bench.arg("--quick");
        }
        if let Some(keys) = &self.only {
            bench.args(["--only", keys]);
        }
        if let Some(path) = &self.json {
            bench.arg("--json").arg(path);
        }
        if let Some(revision) = revision() {
            bench.args(["--revision", &revision]);
        }
        // Given by the environment, so that no list of processes shows the password.
        if let Some(url) = self.database.given() {
            must(bench.env("WEFT_DATABASE_URL", url))?;
            return Ok(ExitCode::SUCCESS);
        }
        let server = Cluster::open_scratch(postgres()?, &mut say)?.with_settings(SERVER).start(&mut say)?;
        let measured = must(bench.env("WEFT_DATABASE_URL", server.url("postgres")));
        server.stop().context("stopping the private PostgreSQL failed")?;
        measured.map(|()| ExitCode::SUCCESS)
    }
}

/// Whether the benches run and tell all their figures, which mean nothing here: a short run without optimisation, of programs
/// that are built.
pub(crate) fn runs(url: &str) -> anyhow::Result<bool> {
    for program in ["weft-logbench", "weft-fleetbench"] {
        say(&format!("{program} --quick, to see that it runs"));
        let mut bench = Command::new(target_dir()?.join("debug").join(program));
        let bench = bench.arg("--quick").env("WEFT_DATABASE_URL", url).stdout(Stdio::null());
        if !run(bench)?.success() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What is measured, where git can tell: the commit, and whether the tree differs from it.
fn revision() -> Option<String> {
    let described = Command::new("git")
        .current_dir(root())
        .args(["describe", "--always", "--dirty", "--exclude=*"])
        .output()
        .ok()?;
    let text = String::from_utf8(described.stdout).ok()?;
    let text = text.trim();
    (described.status.success() && !text.is_empty()).then(|| text.to_owned())
}
