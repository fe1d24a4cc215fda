//! `weft-proxy`: reads the command line and does what it says; without a command it starts the sidecar, and stops it at SIGTERM or
//! SIGINT.

use anyhow::Context;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing_subscriber::EnvFilter;
use weft_model::Chain;
use weft_proxy::cli::{Command, Invocation};
use weft_proxy::config::LogFormat;
use weft_proxy::gate::Gate;
use weft_proxy::rules::Redirect;
use weft_proxy::{Cli, Proxy};

/// How long blocking work may go on after everything has stopped. What writes to a healthy disk ends in milliseconds.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let done = match Invocation::parse() {
        Invocation::Sidecar(cli) => sidecar(*cli),
        Invocation::Command(Command::Gate(command)) => return gate(command),
        Invocation::Command(Command::Redirect(command)) => redirect(command),
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
