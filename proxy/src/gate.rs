//! `weft-proxy gate -- app …`: an app that does not start before its sidecar is ready, and is otherwise as if the gate were not there.
//!
//! The gate asks the sidecar's `/ready` until it has a leaf, a snapshot and the local addresses that follow from it. Then it runs the app
//! as its child, passes signals on to it, and ends with its exit status, 128 and the signal's number if a signal ended it. It never
//! lets an app through that would only find closed doors, and it never stands between the app and a stop: a signal that comes before
//! the app was started ends the gate.
//!
//! It may be the first process of a container. Then it has no default for signals, and inherits whatever the app leaves behind;
//! both are seen to: each signal of [`FORWARDED`] is handled, and every child that ends is reaped, its own or not.
//!
//! Its own failures are told as `env` and `timeout` tell theirs: 125 if the gate gave up, 126 if the app cannot be run, 127 if there is
//! none.
//!
//! Called by `main` alone. It has no runtime and no thread: it lives beside the app for as long as that does.

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::origin::WithOrigin;
use signal_hook::low_level::siginfo::{Cause, Origin};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, ExitCode};
use std::time::Duration;
use tokio::time::Instant;

/// What is passed on to the app: what stops it, and what apps give a meaning of their own.
const FORWARDED: [i32; 6] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2];

/// Pause between two questions to the sidecar. A first join takes some 60 ms, a start with what is on the disk 20; asking costs well below
/// a millisecond.
const ASK_INTERVAL: Duration = Duration::from_millis(20);

/// How long one answer may take; the sidecar answers on loopback from memory.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// Most that is read of an answer: reasons and warnings are some lines.
const ANSWER_MAX: u64 = 64 * 1024;

/// The gate gave up.
const GAVE_UP: u8 = 125;
const CANNOT_RUN: u8 = 126;
const NO_SUCH_PROGRAM: u8 = 127;

/// The gate's command line.
#[derive(Debug, clap::Args)]
pub struct Gate {
    /// The sidecar's admin address: what it was given as --admin-listen
    #[arg(long, env = "WEFT_ADMIN_LISTEN", value_name = "IP:PORT", default_value = "127.0.0.1:15000")]
    pub admin: SocketAddr,
    /// How long the sidecar may take to be ready; then the gate ends with status 125
    #[arg(long, env = "WEFT_GATE_TIMEOUT", value_name = "TIME", value_parser = humantime::parse_duration, default_value = "60s")]
    pub timeout: Duration,
    /// The app, with its arguments
    #[arg(last = true, required = true, value_name = "APP")]
    pub app: Vec<OsString>,
}

/// Why the app does not run.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// The system refuses to tell of signals.
    #[error("signals cannot be handled")]
    Signals(#[source] io::Error),
    /// The sidecar was not ready in time.
    #[error(
        "the sidecar at {admin} was not ready within {limit:?}, so the app was not started: {last}; is it running, with this --admin-listen? \
         `curl http://{admin}/ready` says what it waits for, --timeout how long the gate does"
    )]
    NotReady {
        /// The sidecar's admin address.
        admin: SocketAddr,
        /// How long it was waited for.
        limit: Duration,
        /// What it said last, or why it could not be asked.
        last: String,
    },
    /// The app cannot be run.
    #[error("the app {program:?} cannot be run")]
    Spawn {
        /// The program.
        program: OsString,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The app's end cannot be waited for.
    #[error("the end of the app cannot be told")]
    Wait(#[source] io::Error),
}

impl GateError {
    /// The exit status that says so.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Spawn { source, .. } if source.kind() == io::ErrorKind::NotFound => NO_SUCH_PROGRAM,
            Self::Spawn { .. } => CANNOT_RUN,
            Self::Signals(_) | Self::NotReady { .. } | Self::Wait(_) => GAVE_UP,
        }
    }
}

impl Gate {
    /// Waits for the sidecar, runs the app, and tells the exit status that is to become the gate's own.
    ///
    /// # Errors
    /// If the sidecar is not ready in time or the app cannot be run. The app then does not run.
    pub fn run(self) -> Result<ExitCode, GateError> {
        // Before anything else: a signal is never missed, nor does one end the gate with the app left behind.
        let handled = FORWARDED.into_iter().chain([SIGCHLD]);
        let mut signals = SignalsInfo::<WithOrigin>::new(handled).map_err(GateError::Signals)?;
        if let Some(signal) = self.wait_until_ready(&mut signals)? {
            return Ok(ended_by(signal));
        }
        let app = self.spawn()?;
        loop {
            for origin in signals.wait() {
                if origin.signal == SIGCHLD {
                    if let Some(status) = reap(app)? {
                        return Ok(status);
                    }
                } else {
                    forward(&origin, app);
                }
            }
        }
    }

    /// None once the sidecar is ready; a signal that told to stop meanwhile.
    fn wait_until_ready(&self, signals: &mut SignalsInfo<WithOrigin>) -> Result<Option<i32>, GateError> {
        let until = Instant::now() + self.timeout;
        loop {
            let Err(last) = ask(self.admin) else { return Ok(None) };
            // Children that end here were somebody else's, given to the first process of a container.
            if let Some(stop) = signals.pending().find(|origin| origin.signal != SIGCHLD) {
                return Ok(Some(stop.signal));
            }
            if Instant::now() >= until {
                return Err(GateError::NotReady { admin: self.admin, limit: self.timeout, last });
            }
            std::thread::sleep(ASK_INTERVAL);
        }
    }

    fn spawn(&self) -> Result<Pid, GateError> {
        // At least one word: the parser sees to it.
        let (program, args) =
            self.app.split_first().map_or((OsString::new(), &[][..]), |(p, a)| (p.clone(), a));
        match Command::new(&program).args(args).spawn() {
            // Not waited for through the handle, but with every other child in `reap`.
            Ok(child) => Ok(Pid::from_raw(child.id().cast_signed())),
            Err(source) => Err(GateError::Spawn { program, source }),
        }
    }
}

/// Passes a signal on to the app. One that the kernel sent came from the terminal, which sends it to the app as well: passed on,
/// it would come twice.
fn forward(origin: &Origin, app: Pid) {
    if origin.cause == Cause::Kernel {
        return;
    }
    if let Ok(signal) = Signal::try_from(origin.signal) {
        // The app may have ended just now; then its end is what comes next.
        let _ = kill(app, signal);
    }
}

/// Reaps every child that ended, and tells the app's exit status if it is one of them.
fn reap(app: Pid) -> Result<Option<ExitCode>, GateError> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "the kernel keeps the low eight bits"
            )]
            Ok(WaitStatus::Exited(pid, status)) if pid == app => {
                return Ok(Some(ExitCode::from(status as u8)));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == app => {
                return Ok(Some(ended_by(signal as i32)));
            }
            Ok(WaitStatus::StillAlive) => return Ok(None),
            // Somebody else's child, left to the first process of the container.
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(GateError::Wait(error.into())),
        }
    }
}

/// The exit status for an end by a signal, as shells tell it.
fn ended_by(signal: i32) -> ExitCode {
    ExitCode::from(128 + u8::try_from(signal & 0x7f).unwrap_or_default())
}

/// Whether the sidecar is ready; if not, what it says, or why it cannot be asked.
fn ask(admin: SocketAddr) -> Result<(), String> {
    let answer = get_ready(admin).map_err(|error| format!("it cannot be asked: {error}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).unwrap_or_default();
    match status {
        "200" => Ok(()),
        "503" => Err(reasons(body).unwrap_or_else(|| body.trim().to_owned())),
        _ => Err(format!("it does not answer like a sidecar: {:?}", head.lines().next().unwrap_or_default())),
    }
}

fn get_ready(admin: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&admin, ASK_TIMEOUT)?;
    stream.set_read_timeout(Some(ASK_TIMEOUT))?;
    stream.set_write_timeout(Some(ASK_TIMEOUT))?;
    stream
        .write_all(format!("GET /ready HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// The reasons of a `/ready` that says no.
fn reasons(body: &str) -> Option<String> {
    let body: serde_json::Value = serde_json::from_str(body).ok()?;
    let reasons: Vec<_> = body["reasons"].as_array()?.iter().filter_map(|reason| reason.as_str()).collect();
    (!reasons.is_empty()).then(|| reasons.join("; "))
}
