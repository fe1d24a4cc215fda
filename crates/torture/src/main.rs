//! Fault injection on the event log, and random events on the fold. See the README beside this package.

mod child;
mod controllers;
mod fold;
mod frame;
mod journal;
mod leader;
mod phase;
mod proxy;
mod report;
mod server;
mod watch;
mod worker;
mod writer;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::time::Instant;

use phase::Findings;
use report::Report;
use server::Postgres;

#[derive(Debug, Parser)]
#[command(name = "weft-torture", about = "Tortures the event log and proves that nothing was lost")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the phases
    Log(Args),
    /// Several controllers: pause, kill and cut off the one that leads
    Leader(LeaderArgs),
    /// The fold: incremental equals full over random events of every kind, here and in another process
    Fold(fold::Args),
    /// The other process of it
    #[command(hide = true, name = fold::AGAIN)]
    FoldAgain(fold::Again),
    /// A process under test; started by the others
    #[command(hide = true)]
    Worker,
}

#[derive(Debug, clap::Args)]
struct Args {
    /// Repeat the decisions of an earlier run [default: random, and printed]
    #[arg(long)]
    seed: Option<u64>,
    /// The long form: a quarter of an hour instead of a minute or two
    #[arg(long)]
    long: bool,
    /// Only these phases
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Phase>,
    /// Process kills over all points of an append
    #[arg(long)]
    kills: Option<u64>,
    /// Kills of server processes, and immediate shutdowns
    #[arg(long)]
    server_kills: Option<u64>,
    /// Commits that are cut on either side of them
    #[arg(long)]
    ambiguous: Option<u64>,
    /// Events that 64 writers append
    #[arg(long)]
    events: Option<u64>,
    /// Times that the write-ahead log's volume runs full
    #[arg(long)]
    wal_cycles: Option<u64>,
    /// Hostile edits
    #[arg(long)]
    edits: Option<u64>,
    /// Kills of the controller
    #[arg(long)]
    controller_kills: Option<u64>,
    /// The controller's program [default: the one beside this program]
    #[arg(long)]
    controller: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct LeaderArgs {
    /// Repeat the decisions of an earlier run [default: random, and printed]
    #[arg(long)]
    seed: Option<u64>,
    /// The long form: a quarter of an hour instead of half a minute, with pauses of ten seconds to a minute
    #[arg(long)]
    long: bool,
    /// Faults of the one that leads
    #[arg(long)]
    rounds: Option<u64>,
    /// Only these faults
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<leader::Fault>,
    /// Times that sidecars are cut off from all controllers
    #[arg(long)]
    cuts: Option<u64>,
    /// The controller's program [default: the one beside this program]
    #[arg(long)]
    controller: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Phase {
    Kills,
    Ambiguous,
    ServerKills,
    Writers,
    Wal,
    Edits,
    Controller,
}

impl Phase {
    const ALL: [Self; 7] = [
        Self::Kills,
        Self::Ambiguous,
        Self::ServerKills,
        Self::Writers,
        Self::Wal,
        Self::Edits,
        Self::Controller,
    ];
}

impl Args {
    /// How much of a phase, in the short and in the long form.
    fn count(&self, phase: Phase) -> u64 {
        let (given, short, long) = match phase {
            Phase::Kills => (self.kills, 36, 1_020),
            Phase::Ambiguous => (self.ambiguous, 120, 5_200),
            Phase::ServerKills => (self.server_kills, 4, 104),
            Phase::Writers => (self.events, 30_000, 1_000_000),
            Phase::Wal => (self.wal_cycles, 1, 10),
            Phase::Edits => (self.edits, 60, 1_000),
            Phase::Controller => (self.controller_kills, 4, 60),
        };
        given.unwrap_or(if self.long { long } else { short })
    }

    async fn run(&self, phase: Phase, seed: u64, server: &mut Postgres) -> anyhow::Result<Findings> {
        let (count, mut findings) = (self.count(phase), Findings::default());
        let found = &mut findings;
        match phase {
            Phase::Kills => phase::kills(server, seed, count, found).await,
            Phase::Ambiguous => phase::ambiguous(server, seed, count, found).await,
            Phase::ServerKills => phase::server_kills(server, seed, count, found).await,
            Phase::Writers => phase::writers(server, seed, count, found).await,
            Phase::Wal => phase::wal_full(seed, count, found).await,
            Phase::Edits => phase::edits(server, seed, count, found).await,
            Phase::Controller => {
                phase::controller(server, &program(self.controller.as_deref())?, count, found).await
            }
        }
        .with_context(|| format!("phase {phase:?}"))?;
        Ok(findings)
    }
}

/// The controller's program: the given one, or the one beside this program.
fn program(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(program) = given {
        return Ok(program.to_owned());
    }
    let beside = std::env::current_exe()?.with_file_name("weft-controller");
    anyhow::ensure!(
        beside.is_file(),
        "{} is missing; build it, or name it with --controller",
        beside.display()
    );
    Ok(beside)
}

/// A line about what is going on. On stderr: stdout is for results.
fn say(line: &str) {
    eprintln!("torture: {line}");
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let ended = runtime.context("no runtime").and_then(|runtime| match Cli::parse().command {
        Command::Log(args) => runtime.block_on(torture(&args)),
        Command::Leader(args) => runtime.block_on(torture_leader(&args)),
        Command::Fold(args) => fold::run(&args),
        Command::FoldAgain(args) => fold::again(&args).map(|()| true),
        Command::Worker => {
            let ended = runtime.block_on(async {
                let url = std::env::vars().find(|(name, _)| name == child::URL_VARIABLE);
                worker::run(&url.context("a worker is started by its parent")?.1).await
            });
            // Reading standard input holds a thread up for ever.
            runtime.shutdown_background();
            ended.map(|()| true)
        }
    });
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn torture(args: &Args) -> anyhow::Result<bool> {
    let seed = args.seed.unwrap_or_else(rand::random);
    let repeat = format!("cargo xtask torture log --seed {seed}{}", if args.long { " --long" } else { "" });
    say(&format!("seed {seed}"));
    let began = Instant::now();
    let mut server = Postgres::start(None).await?;
    let mut report = Report::new(seed, args.long);
    for phase in Phase::ALL {
        if !args.only.is_empty() && !args.only.contains(&phase) {
            continue;
        }
        if args.only.is_empty() && phase == Phase::Wal && !nix::unistd::geteuid().is_root() {
            say("Wal is left out: it mounts a small volume, which takes root");
            continue;
        }
        say(&format!("{phase:?}: {}", args.count(phase)));
        let phase_began = Instant::now();
        let findings =
            args.run(phase, seed, &mut server).await.with_context(|| format!("to repeat: {repeat}"))?;
        for complaint in findings.complaints.iter().take(10) {
            say(complaint);
        }
        report.add(&format!("{phase:?}"), findings, phase_began.elapsed());
    }
    report.print(began.elapsed())?;
    if !report.is_sound() {
        say(&format!("something is broken; to repeat: {repeat}"));
    }
    Ok(report.is_sound())
}

async fn torture_leader(args: &LeaderArgs) -> anyhow::Result<bool> {
    let seed = args.seed.unwrap_or_else(rand::random);
    let (rounds, cuts) = if args.long { (200, 20) } else { (8, 2) };
    let plan = leader::Plan {
        seed,
        rounds: args.rounds.unwrap_or(rounds),
        only: args.only.clone(),
        cuts: args.cuts.unwrap_or(cuts),
        long: args.long,
    };
    let form = if args.long { " --long" } else { "" };
    let repeat = format!("cargo xtask torture leader --seed {seed} --rounds {}{form}", plan.rounds);
    say(&format!("seed {seed}"));
    let program = program(args.controller.as_deref())?;
    let began = Instant::now();
    let server = Postgres::start(None).await?;
    let (mut report, mut findings) = (Report::new(seed, args.long), Findings::default());
    let done = leader::leader(&server, &program, &plan, &mut findings);
    done.await.with_context(|| format!("to repeat: {repeat}"))?;
    for complaint in findings.complaints.iter().take(10) {
        say(complaint);
    }
    report.add("Leader", findings, began.elapsed());
    report.print(began.elapsed())?;
    if !report.is_sound() {
        say(&format!("something is broken; to repeat: {repeat}"));
    }
    Ok(report.is_sound())
}
