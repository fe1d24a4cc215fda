//! The controller's binary: command line, logging, signals.

use clap::Parser;
use metrics_exporter_prometheus::PrometheusBuilder;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use weft_controller::config::{Cli, Command, Config, LogFormat, OperatorCommand, RunArgs};
use weft_controller::{Controller, clock, issue_operator};

/// A fleet that comes back at once is many small allocations on every core; this one makes them for a sixth less work than the system's. Without
/// huge pages (`no_thp`), which would take a third more memory for ten thousand sidecars: 62 KiB each and not 45.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let Cli { command, run } = Cli::parse();
    let result = match command {
        Some(Command::Operator(OperatorCommand::Issue(wanted))) => issue_operator(&wanted)
            .map(|()| println!("credential of {} in {}", wanted.name, wanted.out.display())),
        None => start(run),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-controller: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: RunArgs) -> anyhow::Result<()> {
    init_logging(args.log_format);
    let config = Config::try_from(args)?;
    let metrics = PrometheusBuilder::new().install_recorder()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let starting = Controller::start(config, Arc::new(clock::now), Some(metrics));
        let controller = tokio::select! {
            started = starting => started?,
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = controller.outdated() => {
                controller.stop().await;
                anyhow::bail!(
                    "the log was adopted without events that this process remembers; start it again, it goes on with the log as it is"
                );
            }
        }
        controller.stop().await;
        Ok(())
    })
}

/// What is logged unless `RUST_LOG` says otherwise. What PostgreSQL remarks about the statements of migrations ("already
/// exists, skipping") is no news to anybody.
const LOGGED: &str = "info,sqlx::postgres::notice=warn";

/// Lines go to stderr.
fn init_logging(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOGGED));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
}
