//! `weft up`: run a whole mesh on this machine until Ctrl-C.

mod introduction;

use crate::failure::{Exit, Failure, Outcome, chain};
use crate::output::print;
use crate::output::text::printable;
use std::io::IsTerminal;
use std::num::NonZeroU8;
use std::path::PathBuf;
use tokio::signal::unix::{Signal, SignalKind, signal};
use weft_localmesh::home::{HOME_DIR, Home};
use weft_localmesh::{Config, LocalMesh, PortChoice, Programs, Progress, StartError};

/// `--home`, of the commands that run a local mesh.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct HomeArgs {
    /// The folder that the mesh lives in
    #[arg(long, value_name = "DIR", default_value = HOME_DIR)]
    home: PathBuf,
}

impl HomeArgs {
    pub(crate) fn home(&self) -> Home {
        Home::at(&self.home)
    }
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The second start resumes the log of the first. To begin anew, remove the folder; where PostgreSQL \
    could not enter it, its data lies elsewhere, and what is to be removed is printed when the mesh is up."
)]
pub(crate) struct Args {
    #[command(flatten)]
    home: HomeArgs,
    /// The first of the ports to use [default: those of the last start, else 7400]
    #[arg(long, value_name = "PORT")]
    base_port: Option<u16>,
    /// How many controllers to run: with two, the mesh can be changed and followed while one is gone
    #[arg(long, value_name = "NUMBER", default_value_t = NonZeroU8::MIN, value_parser = controllers)]
    controllers: NonZeroU8,
    /// Use this PostgreSQL (version 15 or newer) instead of a private one; the role must be a superuser
    #[arg(long, env = "WEFT_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,
}

/// Controllers on one machine that make sense: more only fold the same log as often.
const CONTROLLERS_MAX: u8 = 5;

fn controllers(text: &str) -> Result<NonZeroU8, String> {
    let number = text.parse().ok().filter(|number: &NonZeroU8| number.get() <= CONTROLLERS_MAX);
    number.ok_or_else(|| format!("a number from 1 to {CONTROLLERS_MAX}"))
}

pub(crate) async fn run(args: Args) -> Outcome<Exit> {
    let weft = std::env::current_exe().map_err(|error| Failure::from_error(&error))?;
    let config = Config {
        home: args.home.home,
        ports: args.base_port.map_or(PortChoice::Remembered, PortChoice::From),
        programs: Programs::beside(&weft),
        controllers: args.controllers,
        database_url: args.database_url.filter(|url| !url.is_empty()),
    };
    let mut ends = Ends::listen()?;
    let mut report = |progress: Progress| show(&progress);
    let mut mesh = LocalMesh::open(config, &mut report).await.map_err(|error| failure(&error))?;

    let started = tokio::select! {
        started = mesh.start(&mut report) => started.map_err(|error| failure(&error)),
        () = ends.next() => Err(Failure::fault("stopped before it was up")),
    };
    let outcome = match started {
        Ok(()) => watch(&mut mesh, &mut ends).await,
        Err(failure) => Err(failure),
    };
    if !mesh.processes().is_empty() {
        eprintln!("stopping");
    }
    // A second Ctrl-C changes nothing: everything in here is bounded.
    let stopped = mesh.stop(&mut report).await;
    for name in &stopped.forced {
        eprintln!("{name} did not end when asked and was killed");
    }
    if let Some(error) = stopped.postgres {
        return Err(Failure::fault(error));
    }
    outcome
}

/// Shows how to use the mesh, then tells what dies, until somebody wants the end.
async fn watch(mesh: &mut LocalMesh, ends: &mut Ends) -> Outcome<Exit> {
    print(&introduction::text(mesh).await?)?;
    loop {
        tokio::select! {
            () = ends.next() => return Ok(Exit::Ok),
            exited = mesh.next_exit() => {
                eprintln!("{exited}");
                eprintln!("  the rest keeps running; to have everything back, press Ctrl-C and run `weft up` again");
            }
        }
    }
}

/// The signals that mean: stop.
struct Ends(Vec<Signal>);

impl Ends {
    fn listen() -> Outcome<Self> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let signals = kinds.into_iter().map(signal).collect::<Result<_, _>>();
        signals.map(Self).map_err(|error| Failure::from_error(&error))
    }

    async fn next(&mut self) {
        let waiting = self.0.iter_mut().map(|signal| Box::pin(signal.recv()));
        futures_util::future::select_all(waiting).await;
    }
}

/// One line per step. On a terminal the line is there while the step takes, too.
fn show(progress: &Progress) {
    let terminal = std::io::stderr().is_terminal();
    let again = if terminal { "\r\x1b[2K" } else { "" };
    match progress {
        Progress::Doing(what) if terminal => eprint!("{again}  …   {what}"),
        Progress::Doing(_) => {}
        Progress::Note(what) => eprintln!("{again}      {}", printable(what)),
        Progress::Done { what, detail, took } => {
            let line = format!("  ok  {what:<16}{:>6} ms  {}", took.as_millis(), printable(detail));
            eprintln!("{again}{}", line.trim_end());
        }
    }
}

fn failure(error: &StartError) -> Failure {
    Failure::fault(chain(error)).next(match error {
        StartError::AlreadyRuns { .. } => "nothing was changed",
        StartError::PortBusy { .. } | StartError::NoProgram { .. } => "nothing was started",
        _ => {
            "mend it and run `weft up` again; the logs are in .weft/logs/. What was started is being stopped"
        }
    })
}
