//! `weft down`: stop the mesh that `weft up` runs, from another terminal.

use crate::command::up::HomeArgs;
use crate::failure::{Exit, Failure, Outcome};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::Duration;
use tokio::time::{Instant, sleep};
use weft_localmesh::leftover;

/// Every process has ten seconds to end; they end in four rounds.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
/// How often is looked.
const STOP_POLL: Duration = Duration::from_millis(50);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    home: HomeArgs,
}

pub(crate) async fn run(args: &Args) -> Outcome<Exit> {
    let home = args.home.home();
    let unreadable = |error: std::io::Error| Failure::fault(format!("{}: {error}", home.dir().display()));
    let Some(pid) = home.holder().map_err(unreadable)? else {
        let stopped = leftover::stop_all(&home);
        return if stopped.is_empty() {
            eprintln!("no local mesh runs in {}", home.dir().display());
            Ok(Exit::Ok)
        } else {
            eprintln!("stopped what an earlier run left: {}", stopped.join(", "));
            Ok(Exit::Ok)
        };
    };
    eprintln!("stopping the local mesh of process {pid}");
    kill(Pid::from_raw(pid), Signal::SIGTERM).map_err(|error| {
        Failure::fault(format!("process {pid} cannot be signalled: {error}"))
            .next("stop it as the user who started it")
    })?;
    let begun = Instant::now();
    while home.holder().map_err(unreadable)?.is_some() {
        if begun.elapsed() > STOP_TIMEOUT {
            return Err(Failure::fault(format!(
                "process {pid} still runs after {} s",
                STOP_TIMEOUT.as_secs()
            ))
            .next(format!("end it with `kill -9 {pid}`; what it leaves is stopped by its watchdog")));
        }
        sleep(STOP_POLL).await;
    }
    eprintln!("stopped in {} ms", begun.elapsed().as_millis());
    Ok(Exit::Ok)
}
