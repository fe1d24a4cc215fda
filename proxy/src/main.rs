//! `weft-proxy`: reads the command line and does what it says; without a command it starts the sidecar, and stops it at SIGTERM or
//! SIGINT. At SIGUSR2 it starts its program anew, to take its place.

use anyhow::Context;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing_subscriber::EnvFilter;
use weft_model::Chain;
use weft_proxy::cli::{self, Invocation};
use weft_proxy::config::LogFormat;
use weft_proxy::gate::Gate;
use weft_proxy::rules::Redirect;
use weft_proxy::{Cli, Proxy};

/// How long blocking work may go on after everything has stopped. What writes to a healthy disk ends in milliseconds.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// The flag with which a process takes the place of this one.
const UPGRADE: &str = "--upgrade";

fn main() -> ExitCode {
    let done = match Invocation::parse() {
        Invocation::Sidecar(cli) => sidecar(*cli),
        Invocation::Command(cli::Command::Gate(command)) => return gate(command),
        Invocation::Command(cli::Command::Redirect(command)) => redirect(command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-proxy: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Statuses tell the gate's own failures from the app's.
fn gate(command: Gate) -> ExitCode {
    command.run().unwrap_or_else(|error| {
        eprintln!("weft-proxy gate: {}", Chain(&error));
        ExitCode::from(error.exit_status())
    })
}

fn redirect(command: Redirect) -> anyhow::Result<()> {
    let said = command.run()?;
    io::stdout().write_all(said.as_bytes()).context("standard output cannot be written")
}

fn sidecar(cli: Cli) -> anyhow::Result<()> {
    start_log(cli.log_format);
    weft_proxy::limits::raise_open_files();
    let config = cli.into_config()?;
    let metrics = weft_proxy::metrics::install()?;
    // Control tasks are few and light; connections have threads of their own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("weft-control")
        .enable_all()
        .build()
        .context("the system gives no threads")?;
    let ended = runtime.block_on(async {
        let stop = CancellationToken::new();
        let proxy = Proxy::bind(config, metrics).await?;
        let signals = TaskTracker::new();
        signals.spawn(stop_at_signal(stop.clone())?);
        signals.spawn(upgrade_at_signal()?);
        Ok(proxy.run(stop).await?)
    });
    // A thread that waits for a hung disk does not end; it is left behind.
    runtime.shutdown_timeout(STOP_TIMEOUT);
    ended
}

fn stop_at_signal(stop: CancellationToken) -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stop.cancel();
    })
}

/// Starts the program that has this one's name now, with this one's arguments, whenever SIGUSR2 comes. It asks for the sockets itself.
fn upgrade_at_signal() -> io::Result<impl Future<Output = ()>> {
    let mut asked = signal(SignalKind::user_defined2())?;
    let mut line = std::env::args_os();
    let program = line.next().unwrap_or_default();
    let mut arguments: Vec<_> = line.collect();
    if !arguments.iter().any(|argument| argument == UPGRADE) {
        arguments.push(UPGRADE.into());
    }
    Ok(async move {
        while asked.recv().await.is_some() {
            // It says itself why it ends; this process goes on unless it is told that the other one has its place.
            match Command::new(&program).args(&arguments).spawn() {
                Ok(mut new) => match new.wait().await {
                    Ok(status) => {
                        tracing::warn!(%status, "the process that was started for an upgrade ended");
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the process that was started for an upgrade is lost");
                    }
                },
                Err(error) => {
                    tracing::error!(%error, program = %program.display(), "no new process can be started");
                }
            }
        }
    })
}

/// The log goes to stderr: stdout is for connection records.
fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}
