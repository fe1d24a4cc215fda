//! `cargo xtask bench proxy`: two sidecars of a mesh, beside the other proxies that this machine has.
//!
//! What measures is the peer benchmark, which lives in a folder of its own, outside the repository, since it belongs to no
//! proxy. Weft takes part through `proxy/bench/weft.py`.

use std::ffi::OsString;
use std::fs;
use std::path::{PathBuf, absolute};
use std::process::{Command, ExitCode};

use anyhow::Context;

use crate::bench::revision;
use crate::cargo::{cargo, must, root, run, target_dir};
use crate::{postgres, say};

/// The programs of a mesh with two sidecars.
const PROGRAMS: &[&str] = &["weft-cli", "weft-controller", "weft-proxy"];

/// Where the peer benchmark is told of adapters that are not its own; separated by colons.
const ADAPTERS: &str = "PEERS_EXTRA";

/// What Weft is called in the peer benchmark: its adapter's name.
const OURS: &str = "weft";

#[derive(Debug, clap::Args)]
pub(crate) struct Proxy {
    /// The peer benchmark's folder, with `run` and `proxies/` in it
    #[arg(long, env = "WEFT_PEERS_DIR", value_name = "DIR")]
    peers: Option<PathBuf>,
    /// Measure the programs in this folder instead of building them, such as those of another revision
    #[arg(long, env = "WEFT_BIN_DIR", value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// Only these proxies, separated by commas, such as direct,haproxy,weft [default: all that are found]
    #[arg(long, value_name = "NAMES")]
    only: Option<String>,
    /// Only these workloads, separated by commas
    #[arg(long, value_name = "NAMES")]
    workloads: Option<String>,
    /// Only these modes, separated by commas
    #[arg(long, value_name = "NAMES")]
    modes: Option<String>,
    /// How often everything is measured
    #[arg(long, value_name = "N")]
    rounds: Option<u32>,
    /// How long each measurement takes, in seconds
    #[arg(long, value_name = "N")]
    secs: Option<u32>,
    /// Where the results go [default: bench/proxy in the target folder]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Passed to the peer benchmark; its README explains its flags
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<OsString>,
}

impl Proxy {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        // Before anything is built.
        let measure = self.peers()?.join("run");
        let postgres = postgres()?;
        let target = target_dir()?;
        let out = absolute(self.out.clone().unwrap_or_else(|| target.join("bench/proxy")))?;

        let mut peers = Command::new(measure);
        let programs = match &self.bin_dir {
            Some(dir) => absolute(dir)?,
            None => {
                let mut build = cargo(["build", "--release"]);
                say("building with optimisation; the first time takes some minutes");
                must(build.args(PROGRAMS.iter().flat_map(|package| ["--package", *package])))?;
                if let Some(revision) = revision() {
                    peers.env("WEFT_BENCH_REVISION", revision);
                }
                target.join("release")
            }
        };
        let here = root().join("proxy/bench");
        // Others may have adapters of theirs there.
        let mut adapters = here.join("weft.py").into_os_string();
        if let Some(others) = std::env::var_os(ADAPTERS) {
            adapters.push(":");
            adapters.push(others);
        }
        peers
            .env(ADAPTERS, adapters)
            .env("WEFT_BIN_DIR", programs)
            .env("WEFT_POSTGRES_DIR", postgres.dir())
            .args(["--ours", OURS])
            .args(self.passed_on())
            .arg("--out")
            .arg(&out)
            .args(&self.args)
            // The path of the table; the table itself is printed below.
            .stdout(std::io::stderr());
        must(&mut peers)?;

        let table = out.join("table.md");
        let text = fs::read_to_string(&table);
        println!("{}", text.with_context(|| format!("{} cannot be read", table.display()))?.trim_end());
        let results = out.join("results.json");
        let ratios = run(Command::new("python3").arg(here.join("ratios.py")).arg(results))?;
        Ok(if ratios.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// The peer benchmark's folder.
    fn peers(&self) -> anyhow::Result<PathBuf> {
        let dir = self.peers.as_deref().context(
            "the peer benchmark is not in this repository; name its folder with --peers DIR or WEFT_PEERS_DIR \
             (proxy/bench/README.md says what it is)",
        )?;
        anyhow::ensure!(
            dir.join("run").is_file() && dir.join("proxies").is_dir(),
            "{} is not the peer benchmark: there is no `run` or no `proxies/` in it; name another folder with --peers DIR",
            dir.display()
        );
        absolute(dir).context("the current folder is unknown")
    }

    fn passed_on(&self) -> Vec<String> {
        let Self { only, workloads, modes, rounds, secs, .. } = self;
        let numbers =
            [("--rounds", rounds), ("--secs", secs)].map(|(flag, n)| (flag, n.map(|n| n.to_string())));
        let names = [("--only", only), ("--workloads", workloads), ("--modes", modes)]
            .map(|(flag, names)| (flag, names.clone()));
        let given =
            names.into_iter().chain(numbers).filter_map(|(flag, value)| Some([flag.to_owned(), value?]));
        given.flatten().collect()
    }
}
