//! `cargo xtask check`: what can be said about the code without running it, one line per check.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;

use crate::cargo::{cargo, has, root, run, shown, target_dir};
use crate::say;

/// What makes a crate do I/O, or need somebody who does.
const IO_CRATES: &[&str] = &[
    "async-std",
    "axum",
    "hyper",
    "mio",
    "nix",
    "postgres",
    "rustls",
    "smol",
    "socket2",
    "sqlx",
    "sqlx-core",
    "tokio",
    "tokio-postgres",
    "tokio-rustls",
    "tonic",
];
/// What reaches the database.
const DATABASE_CRATES: &[&str] = &["postgres", "sqlx", "sqlx-core", "tokio-postgres", "weft-eventlog"];

/// Which crates must never appear below which: the architecture, as far as a dependency tree shows it.
const LAYERS: &[Layer] = &[
    Layer { package: "weft-model", folder: "crates/model", forbidden: IO_CRATES, because: "it is pure" },
    Layer { package: "weft-routing", folder: "crates/routing", forbidden: IO_CRATES, because: "it is pure" },
    Layer { package: "weft-audit", folder: "crates/audit", forbidden: IO_CRATES, because: "it is pure" },
    Layer {
        package: "weft-proxy",
        folder: "proxy",
        forbidden: DATABASE_CRATES,
        because: "a sidecar never sees SQL",
    },
];
/// Packages of [`LAYERS`] that need not exist yet.
const OPTIONAL: &[&str] = &["weft-audit"];

/// The cargo-deny that is installed where there is none: the version that `deny.toml` was written for.
const CARGO_DENY_VERSION: &str = "0.20.2";

struct Layer {
    package: &'static str,
    folder: &'static str,
    forbidden: &'static [&'static str],
    because: &'static str,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Check {
    /// Also compare the dependencies with the advisory database, which needs access to github.com
    #[arg(long)]
    advisories: bool,
}

/// A check that did not hold: what is wrong and what to do.
type Outcome = Result<String, anyhow::Error>;

impl Check {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let mut checks: Vec<(String, Outcome)> = vec![
            ("format".to_owned(), format()),
            ("lints".to_owned(), lints()),
            ("dependencies".to_owned(), self.dependencies()),
        ];
        for layer in LAYERS {
            if OPTIONAL.contains(&layer.package) && !root().join(layer.folder).exists() {
                continue;
            }
            checks.push((format!("layering of {}", layer.package), layer.check()));
        }

        let mut failed = 0;
        for (name, outcome) in &checks {
            match outcome {
                Ok(seen) => println!("ok    {name}: {seen}"),
                Err(error) => {
                    failed += 1;
                    println!("FAIL  {name}: {error:#}");
                }
            }
        }
        println!("check: {}/{} ok", checks.len() - failed, checks.len());
        Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn dependencies(&self) -> Outcome {
        let deny = cargo_deny()?;
        let mut command = Command::new(deny);
        command.current_dir(root()).args(["--all-features", "--log-level", "error", "check"]);
        command.args(["bans", "licenses", "sources"]);
        if self.advisories {
            command.arg("advisories");
        }
        let status = run(&mut command)?;
        anyhow::ensure!(
            status.success(),
            "change the dependency, or argue for it in deny.toml; cargo-deny's report is above"
        );
        let advisories = if self.advisories { "no known advisory" } else { "advisories not asked for" };
        Ok(format!("no banned crate, licences and sources as deny.toml allows, {advisories}"))
    }
}

fn format() -> Outcome {
    let status = run(&mut cargo(["fmt", "--all", "--check"]))?;
    anyhow::ensure!(status.success(), "run `cargo fmt --all`");
    Ok("as rustfmt.toml says".to_owned())
}

fn lints() -> Outcome {
    let mut command = cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    let status = run(&mut command)?;
    anyhow::ensure!(status.success(), "mend what {} reports above", shown(&command));
    Ok("no warning in any target".to_owned())
}

impl Layer {
    fn check(&self) -> Outcome {
        let tree = self.tree()?;
        let wrong: Vec<&str> = self.forbidden.iter().copied().filter(|name| tree.contains(*name)).collect();
        anyhow::ensure!(
            wrong.is_empty(),
            "{} depends on {}, but {}; see how with `cargo tree -p {} -e normal -i {}`",
            self.package,
            wrong.join(", "),
            self.because,
            self.package,
            wrong.first().copied().unwrap_or_default(),
        );
        Ok(format!("{} crates below it, none of them forbidden ({})", tree.len() - 1, self.because))
    }

    /// The names of the package and of all that it is linked with.
    fn tree(&self) -> anyhow::Result<BTreeSet<String>> {
        let mut command = cargo(["tree", "--edges", "normal", "--prefix", "none", "--package", self.package]);
        let output = command.output().with_context(|| format!("{} could not be run", shown(&command)))?;
        anyhow::ensure!(
            output.status.success(),
            "{} failed: {}",
            shown(&command),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let text = String::from_utf8(output.stdout)?;
        let tree: BTreeSet<String> =
            text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
        anyhow::ensure!(tree.contains(self.package), "{} printed no tree", shown(&command));
        Ok(tree)
    }
}

/// cargo-deny: the one on this machine, else the one in the target folder, built there once.
fn cargo_deny() -> anyhow::Result<PathBuf> {
    if has("deny") {
        return Ok(PathBuf::from("cargo-deny"));
    }
    let tools = target_dir()?.join("tools");
    let program = tools.join("bin/cargo-deny");
    if !program.is_file() {
        say(&format!("cargo-deny is not on this machine; building it once, into {}", tools.display()));
        let version = format!("cargo-deny@{CARGO_DENY_VERSION}");
        let mut install = cargo(["install", "--locked", "--debug", version.as_str(), "--root"]);
        let status = run(install.arg(&tools))?;
        anyhow::ensure!(status.success(), "install cargo-deny with `cargo install --locked cargo-deny`");
    }
    Ok(program)
}
