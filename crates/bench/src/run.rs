//! The course of a bench: what can be said to it, what it works with, what it prints.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::cpu;
use crate::report::{Aim, Report};
use crate::server::Server;

/// What is said to every bench.
#[derive(Debug, clap::Args)]
pub struct Common {
    /// A PostgreSQL on this machine whose role may create databases
    #[arg(long, env = "WEFT_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: String,
    /// A little of everything, to see that it works; its figures mean nothing
    #[arg(long)]
    pub quick: bool,
    /// Only these figures: keys of the JSON, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "KEYS")]
    pub only: Vec<String>,
    /// Also write the JSON to this file
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
    /// The controller's program; beside this one unless told
    #[arg(long, value_name = "PATH")]
    pub controller: Option<PathBuf>,
    /// What was built, for the report
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
}

/// What a bench works with.
#[derive(Debug)]
pub struct Bench<P> {
    /// The server that is measured.
    pub server: Server,
    /// Where it is, as it was given: a program that is started is told it with another database.
    pub url: String,
    /// The controller's program.
    pub controller: PathBuf,
    /// What was measured so far.
    pub report: Report,
    /// What is to be measured.
    pub plan: P,
}

impl<P> Bench<P> {
    /// Sets a bench up, with the figures that tell where it ran.
    ///
    /// # Errors
    /// The server's URL is malformed, or this program does not know where it is.
    pub fn new(name: &'static str, aims: &'static [Aim], common: Common, plan: P) -> anyhow::Result<Self> {
        let controller = match common.controller {
            Some(path) => path,
            None => std::env::current_exe()?.with_file_name("weft-controller"),
        };
        let mut report = Report::new(aims);
        let (machine, cores) = cpu::machine();
        report.set("machine", machine);
        report.set("cores", cores);
        report.set("revision", common.revision.map_or(Value::Null, |revision| json!(revision)));
        let server = Server::new(name, &common.database_url)?;
        Ok(Self { server, url: common.database_url, controller, report, plan })
    }
}

/// Runs a bench to its end, prints what it measured, and tells how it went. Whatever happens, the server is left as it was.
pub fn run<P>(
    program: &str,
    json: Option<&Path>,
    bench: anyhow::Result<Bench<P>>,
    measure: impl AsyncFnOnce(&mut Bench<P>) -> anyhow::Result<()>,
) -> ExitCode {
    let ended = bench.and_then(|bench| measured(bench, measure)).and_then(|report| tell(&report, json));
    ended.map_or_else(
        |error| {
            eprintln!("{program}: {error:#}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

fn measured<P>(
    mut bench: Bench<P>,
    measure: impl AsyncFnOnce(&mut Bench<P>) -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let described = bench.server.describe().await.map(|postgres| bench.report.set("postgres", postgres));
        let measured = match described {
            Ok(()) => Box::pin(measure(&mut bench)).await,
            Err(error) => Err(error),
        };
        let cleaned = bench.server.clean().await;
        measured.and(cleaned).map(|()| bench.report)
    })
}

fn tell(report: &Report, file: Option<&Path>) -> anyhow::Result<()> {
    let json = report.json()?;
    if let Some(path) = file {
        std::fs::write(path, format!("{json}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{}\n{json}", report.table());
    Ok(())
}

/// Checks that what is asked for are figures of the bench.
///
/// # Errors
/// One is not; then with those that are.
pub fn check_known(only: &[String], known: &[&str]) -> anyhow::Result<()> {
    match only.iter().find(|key| !known.contains(&key.as_str())) {
        Some(unknown) => anyhow::bail!("there is no figure {unknown}; there are {}", known.join(", ")),
        None => Ok(()),
    }
}

/// A line about what is going on.
pub fn say(line: &str) {
    eprintln!("bench: {line}");
}
