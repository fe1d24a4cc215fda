//! One process of the mesh: started, watched, signalled, waited for.
//!
//! A task owns the process and is the only one that signals or reaps it, so a signal never reaches a process that has
//! taken over the number of one that ended.

use crate::error::StartError;
use crate::home::{open_log, tail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::process::Command;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// Signals that wait to be sent to one process. More than a few at once mean that its task is gone.
const ORDERS_MAX: usize = 8;

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    pub(crate) log: PathBuf,
}

/// A command that gets its settings from its arguments alone: what is set for `weft` itself, such as a database or a
/// context, must not reach a controller or a sidecar by the way of the environment. What it prints goes into a file,
/// so without colours.
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("NO_COLOR", "1");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("WEFT_") {
            command.env_remove(name);
        }
    }
    command
}

/// How a process stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildState {
    /// It runs.
    Running,
    /// It ended like this.
    Ended(ExitStatus),
}

/// A process ended without having been asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exited {
    /// Its name in the mesh, such as `api-2`.
    pub name: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its log.
    pub log: PathBuf,
    /// The log's end.
    pub tail: String,
}

impl fmt::Display for Exited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ended by itself ({})", self.name, self.status)?;
        if self.tail.is_empty() {
            write!(f, " without a word in {}", self.log.display())
        } else {
            write!(f, "; the end of {}:\n{}", self.log.display(), self.tail)
        }
    }
}

/// A process and its task's two ends.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) recipe: Recipe,
    pub(crate) pid: u32,
    orders: mpsc::Sender<Order>,
    state: watch::Receiver<ChildState>,
}

#[derive(Debug)]
enum Order {
    Signal(Signal),
    /// The same, and its end is no news.
    Stop(Signal),
}

impl Child {
    /// Starts the process in a group of its own, so that a Ctrl-C in the terminal reaches only its owner. Returns the
    /// task that watches it.
    pub(crate) fn start(
        recipe: Recipe,
        exits: mpsc::Sender<Exited>,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static), StartError> {
        let doing = || StartError::io(format!("starting {} ({})", recipe.name, recipe.program.display()));
        let log = open_log(&recipe.log).map_err(doing())?;
        let mut process = command(&recipe.program)
            .args(&recipe.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(doing())?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(doing())?;
        let pid = process.id().unwrap_or_default();
        let (orders, mut received) = mpsc::channel(ORDERS_MAX);
        let (ended, state) = watch::channel(ChildState::Running);

        let (name, log) = (recipe.name.clone(), recipe.log.clone());
        let task = async move {
            let mut expected = false;
            let status = loop {
                tokio::select! {
                    status = process.wait() => break status,
                    Some(order) = received.recv() => {
                        let signal = match order {
                            Order::Signal(signal) => signal,
                            Order::Stop(signal) => {
                                expected = true;
                                signal
                            }
                        };
                        // Not reaped yet, so the number is still its own.
                        if let Some(pid) = process.id() {
                            let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
                        }
                    }
                }
            };
            let status = status.unwrap_or_default();
            ended.send_replace(ChildState::Ended(status));
            if !expected {
                let tail = tail(&log);
                // Nobody listens any more when the mesh is being dropped.
                let _ = exits.send(Exited { name, status, log, tail }).await;
            }
        };
        Ok((Self { recipe, pid, orders, state }, task))
    }

    pub(crate) fn state(&self) -> ChildState {
        *self.state.borrow()
    }

    /// Sends a signal, as anybody might: if it ends the process, that is news.
    pub(crate) async fn signal(&self, signal: Signal) {
        let _ = self.orders.send(Order::Signal(signal)).await;
    }

    /// Asks it to end, and after `grace` ends it. Whether it went by itself.
    pub(crate) async fn stop(&self, grace: Duration) -> bool {
        let _ = self.orders.send(Order::Stop(Signal::SIGTERM)).await;
        if timeout(grace, self.ended()).await.is_ok() {
            return true;
        }
        let _ = self.orders.send(Order::Stop(Signal::SIGKILL)).await;
        self.ended().await;
        false
    }

    /// Waits for its end.
    pub(crate) async fn ended(&self) {
        let mut state = self.state.clone();
        // The sender goes only after it has said how the process ended.
        let _ = state.wait_for(|state| *state != ChildState::Running).await;
    }
}
