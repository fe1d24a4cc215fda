//! A running server: started as our own child, waited for, stopped.
//!
//! `postgres` is a direct child in a process group of its own: its pid is known, and a Ctrl-C in the terminal reaches
//! the owner only, who stops the server's clients first. Waiting is by polls of bounded number, so no clock is read.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::Say;
use crate::account::Account;
use crate::cluster::{Cluster, SUPERUSER, private_dir};
use crate::log;
use crate::port::reserve_loopback_port;
use crate::watchdog::Watchdog;

/// How often a condition is looked at: short beside the 100–300 ms that a start takes.
const POLL: Duration = Duration::from_millis(20);
/// Two minutes: a start after a crash replays up to a checkpoint interval of log, on a slow disk.
const START_POLLS: u32 = 6_000;
/// A line of progress every five seconds of waiting.
const POLLS_PER_SAY: u32 = 250;
/// 20 seconds for a shutdown with its checkpoint, then as long for one without.
const STOP_POLLS: u32 = 1_000;
/// How much of the log's end an error shows.
const TAIL_LINES: usize = 20;
/// What a unix socket's address holds, less its closing zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The server's settings. They are given on its command line, so no file that an earlier run left can differ.
const SETTINGS: &[(&str, &str)] = &[
    ("listen_addresses", "127.0.0.1"),
    ("unix_socket_permissions", "0700"),
    ("max_connections", "200"),
    // A local mesh's working set is small, and the machine is somebody's laptop.
    ("shared_buffers", "64MB"),
    ("max_wal_size", "512MB"),
    ("fsync", "on"),
    ("logging_collector", "off"),
    ("log_destination", "stderr"),
    ("log_line_prefix", "%m [%p] %q%u@%d "),
    ("log_timezone", "UTC"),
    ("timezone", "UTC"),
    ("cluster_name", "weft"),
];

/// A server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The port asked for is taken.
    #[error(
        "port {port} on 127.0.0.1 is taken by another program; see which with `ss -ltnp 'sport = :{port}'`, stop it, or choose another port"
    )]
    PortBusy {
        /// The port asked for.
        port: u16,
    },
    /// The server ended instead of starting.
    #[error("PostgreSQL ended while starting ({status}); the end of {}:\n{tail}", log.display())]
    Exited {
        /// How it ended.
        status: ExitStatus,
        /// The whole log.
        log: PathBuf,
        /// Its last lines.
        tail: String,
    },
    /// The server did not become ready in time, and was stopped.
    #[error("PostgreSQL did not accept connections within {} s; the end of {}:\n{tail}", (POLL * START_POLLS).as_secs(), log.display())]
    TimedOut {
        /// The whole log.
        log: PathBuf,
        /// Its last lines.
        tail: String,
    },
    /// A server left by an earlier run could not be stopped.
    #[error("a PostgreSQL server left by an earlier run is in the way")]
    Leftover(#[source] StopError),
    /// A process or file operation failed.
    #[error("starting PostgreSQL in {} failed", data.display())]
    Io {
        /// The data directory.
        data: PathBuf,
        /// Which failure.
        source: io::Error,
    },
}

/// A server did not stop.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// It ignored both the request for a fast shutdown and the one for an immediate one.
    #[error("PostgreSQL (process {pid}) did not stop within {} s; end it with `kill -9 {pid}`", (POLL * STOP_POLLS * 2).as_secs())]
    TimedOut {
        /// The server's process.
        pid: i32,
    },
    /// It could not be signalled or waited for.
    #[error("stopping PostgreSQL (process {pid}) failed")]
    Io {
        /// The server's process.
        pid: i32,
        /// Which failure.
        source: io::Error,
    },
}

/// A server that accepts connections. Dropping it stops it, as [`Server::stop`] does, without telling how that went.
#[derive(Debug)]
pub struct Server {
    // Declared, hence dropped, before what it runs on.
    process: Process,
    port: u16,
    socket_dir: PathBuf,
    /// The folder of the socket, where the cluster's own has too long a path.
    _short_dir: Option<TempDir>,
    cluster: Cluster,
}

impl Cluster {
    /// Starts the server and waits until it accepts connections. A server that an earlier run left behind is stopped
    /// first. Blocks for two minutes at most.
    ///
    /// # Errors
    ///
    /// See [`StartError`]; nothing is left running.
    pub fn start(self, say: Say<'_>) -> Result<Server, StartError> {
        let data = self.data_dir();
        let io_error = |source| StartError::Io { data: data.clone(), source };
        let occupant = || Occupant::of(&data, &self.account);
        if let Occupant::Server(pid) = occupant().map_err(io_error)? {
            say(&format!("stopping the PostgreSQL server (process {pid}) that an earlier run left"));
            stop(pid, || Ok(!matches!(occupant()?, Occupant::Server(_)))).map_err(StartError::Leftover)?;
        }
        if occupant().map_err(io_error)? == Occupant::Gone {
            remove_stale_pid_file(&data).map_err(io_error)?;
        }

        let port = match self.config.port {
            Some(port) => check_free(port).map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => StartError::PortBusy { port },
                _ => io_error(error),
            })?,
            None => reserve_loopback_port().map_err(io_error)?,
        };
        let short_dir = short_socket_dir(&self).map_err(io_error)?;
        let socket_dir =
            short_dir.as_ref().map_or_else(|| self.home.join("socket"), |dir| dir.path().to_owned());
        let log = log::open(&self.log_file(), 0o666).map_err(io_error)?;

        let mut scratch: Vec<&Path> = self.scratch.iter().map(TempDir::path).collect();
        scratch.extend(short_dir.iter().map(TempDir::path));
        let mut process = Process::spawn(&self, port, &socket_dir, log, &scratch).map_err(io_error)?;
        wait_until_ready(&mut process, &self, say)?;
        Ok(Server { process, port, socket_dir, _short_dir: short_dir, cluster: self })
    }
}

impl Server {
    /// The loopback port that it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder of its unix socket, entered by its own account and root only.
    pub fn socket_dir(&self) -> &Path {
        &self.socket_dir
    }

    /// A URL for `database` over loopback, as the superuser, with the password in it. `database` is taken as it is, so
    /// keep it to letters, digits and underscores.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://{SUPERUSER}:{}@127.0.0.1:{}/{database}", self.cluster.password, self.port)
    }

    /// The cluster that it runs on.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The process id of the server's first process.
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// How the server ended, if it has ended by itself.
    ///
    /// # Errors
    ///
    /// Fails when the process cannot be asked.
    pub fn exited(&mut self) -> io::Result<Option<ExitStatus>> {
        self.process.child.try_wait()
    }

    /// The last lines of the server's log, for an error message.
    pub fn log_tail(&self) -> String {
        log::tail(&self.cluster.log_file(), TAIL_LINES)
    }

    /// Stops the server: clients are disconnected, a checkpoint is made; if that takes too long, without a checkpoint.
    ///
    /// # Errors
    ///
    /// See [`StopError`].
    pub fn stop(mut self) -> Result<Cluster, StopError> {
        self.process.stop()?;
        Ok(self.cluster)
    }
}

/// The child and its watchdog. Stops the child when dropped.
#[derive(Debug)]
struct Process {
    child: Child,
    data: PathBuf,
    watchdog: Option<Watchdog>,
}

impl Process {
    fn spawn(
        cluster: &Cluster,
        port: u16,
        socket_dir: &Path,
        log: File,
        scratch: &[&Path],
    ) -> io::Result<Self> {
        let data = cluster.data_dir();
        let mut command = cluster.account.command(cluster.binaries.program("postgres"));
        command.arg("-D").arg(&data);
        let socket_dirs = format!("\"{}\"", socket_dir.display());
        let own = [("port", port.to_string()), ("unix_socket_directories", socket_dirs)];
        let own = own.iter().map(|(name, value)| (*name, value.as_str()));
        let given = cluster.config.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        // The last one of a name wins.
        for (name, value) in SETTINGS.iter().copied().chain(given).chain(own) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let child =
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0).spawn()?;
        let mut process = Self { child, data, watchdog: None };
        process.watchdog = Some(Watchdog::spawn(process.child.id(), &process.data, scratch)?);
        Ok(process)
    }

    fn stop(&mut self) -> Result<(), StopError> {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let child = &mut self.child;
        let ended = child.try_wait().map_err(|source| StopError::Io { pid: pid.as_raw(), source })?;
        if ended.is_none() {
            stop(pid, || child.try_wait().map(|status| status.is_some()))?;
        }
        if let Some(watchdog) = self.watchdog.take() {
            watchdog.dismiss();
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A server that does not stop is left to the watchdog, which is not dismissed then.
        let _ = self.stop();
    }
}

/// Asks for a fast shutdown, then for an immediate one.
fn stop(pid: Pid, mut gone: impl FnMut() -> io::Result<bool>) -> Result<(), StopError> {
    let io_error = |source: io::Error| StopError::Io { pid: pid.as_raw(), source };
    for signal in [Signal::SIGINT, Signal::SIGQUIT] {
        match kill(pid, signal) {
            Ok(()) | Err(nix::Error::ESRCH) => {}
            Err(errno) => return Err(io_error(errno.into())),
        }
        for _ in 0..STOP_POLLS {
            if gone().map_err(io_error)? {
                return Ok(());
            }
            thread::sleep(POLL);
        }
    }
    Err(StopError::TimedOut { pid: pid.as_raw() })
}

fn wait_until_ready(process: &mut Process, cluster: &Cluster, say: Say<'_>) -> Result<(), StartError> {
    let log = cluster.log_file();
    for poll in 1..=START_POLLS {
        let ended = process.child.try_wait();
        match ended.map_err(|source| StartError::Io { data: process.data.clone(), source })? {
            Some(status) => {
                return Err(StartError::Exited { status, tail: log::tail(&log, TAIL_LINES), log });
            }
            None if is_ready(&process.data, process.child.id()) => return Ok(()),
            None => {}
        }
        if poll % POLLS_PER_SAY == 0 {
            say(&format!(
                "PostgreSQL is still starting; after a crash it replays its log (see {})",
                log.display()
            ));
        }
        thread::sleep(POLL);
    }
    Err(StartError::TimedOut { tail: log::tail(&log, TAIL_LINES), log })
}

/// Whether the pid file says that the server `pid` accepts connections: its first line is the pid, its eighth the state,
/// which is what `pg_ctl` waits for.
fn is_ready(data: &Path, pid: u32) -> bool {
    let Ok(text) = fs::read_to_string(data.join("postmaster.pid")) else {
        return false;
    };
    let mut lines = text.lines();
    lines.next() == Some(pid.to_string().as_str())
        && lines.nth(6).is_some_and(|state| state.trim() == "ready")
}

/// What the pid file of a data directory stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Occupant {
    /// Nobody: there is no pid file.
    None,
    /// A server that runs on the data.
    Server(Pid),
    /// A server that has ended: its process is gone, or its pid is another process's by now.
    Gone,
    /// It cannot be told. Then nothing is stopped and nothing removed: PostgreSQL, which looks at the shared memory of
    /// the server named there as well, either starts or says what is in its way.
    Unknown,
}

impl Occupant {
    fn of(data: &Path, account: &Account) -> io::Result<Self> {
        let text = match fs::read_to_string(data.join("postmaster.pid")) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::None),
            Err(error) => return Err(error),
        };
        let Some(pid) = text.lines().next().and_then(|line| line.trim().parse().ok()) else {
            return Ok(Self::Unknown);
        };
        let pid = Pid::from_raw(pid);
        if !Path::new("/proc/self/cwd").exists() {
            let gone = kill(pid, None) == Err(nix::Error::ESRCH);
            return Ok(if gone { Self::Gone } else { Self::Server(pid) });
        }
        Self::judge(pid, fs::read_link(format!("/proc/{pid}/cwd")), &data.canonicalize()?, || {
            account.working_dir_of(pid)
        })
    }

    /// A server's working directory is its data directory, and a process that has ended has none. Root may look at
    /// anybody's only with a right that containers lack; `ask_again` then asks as the server's account.
    fn judge(
        pid: Pid,
        working_dir: io::Result<PathBuf>,
        data: &Path,
        ask_again: impl FnOnce() -> io::Result<Option<PathBuf>>,
    ) -> io::Result<Self> {
        let working_dir = match working_dir {
            Ok(dir) => dir,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::Gone),
            Err(_) => match ask_again()? {
                Some(dir) => dir,
                None => return Ok(Self::Unknown),
            },
        };
        Ok(if working_dir == data { Self::Server(pid) } else { Self::Gone })
    }
}

/// Removes the pid file of a server that is gone: its pid may be another process's by now, which PostgreSQL would take for
/// the server. The cluster's lock is held and no server runs here, so it is nobody's.
fn remove_stale_pid_file(data: &Path) -> io::Result<()> {
    match fs::remove_file(data.join("postmaster.pid")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn check_free(port: u16) -> io::Result<u16> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map(|_| port)
}

/// A short folder for the socket, if the one in the cluster's home has a path too long for a socket's address.
fn short_socket_dir(cluster: &Cluster) -> io::Result<Option<TempDir>> {
    let longest = cluster.home.join("socket").join(".s.PGSQL.65535");
    if longest.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
        return Ok(None);
    }
    let dir = tempfile::Builder::new().prefix("weft-pg-").tempdir_in("/tmp")?;
    private_dir(dir.path(), &cluster.account)?;
    Ok(Some(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_that_is_not_there_or_is_elsewhere_counts_as_gone() {
        let (pid, data) = (Pid::from_raw(7), Path::new("/data"));
        let judge = |seen: io::Result<&str>, asked: Option<&str>| {
            let asked = asked.map(PathBuf::from);
            Occupant::judge(pid, seen.map(PathBuf::from), data, || Ok(asked)).unwrap()
        };
        let denied = || Err(io::ErrorKind::PermissionDenied.into());
        assert_eq!(judge(Ok("/data"), None), Occupant::Server(pid));
        assert_eq!(judge(Ok("/elsewhere"), None), Occupant::Gone);
        assert_eq!(judge(Err(io::ErrorKind::NotFound.into()), Some("/data")), Occupant::Gone);
        assert_eq!(judge(denied(), Some("/data")), Occupant::Server(pid));
        assert_eq!(judge(denied(), Some("/elsewhere")), Occupant::Gone);
        assert_eq!(judge(denied(), None), Occupant::Unknown);
    }

    #[test]
    fn a_pid_file_that_names_nobody_is_left_alone() {
        let data = tempfile::tempdir().unwrap();
        let account = Account::choose(None).unwrap().unwrap();
        let occupant = || Occupant::of(data.path(), &account).unwrap();
        assert_eq!(occupant(), Occupant::None);
        fs::write(data.path().join("postmaster.pid"), "").unwrap();
        assert_eq!(occupant(), Occupant::Unknown);
        // Above the largest pid that Linux gives.
        fs::write(data.path().join("postmaster.pid"), "2000000000\n").unwrap();
        assert_eq!(occupant(), Occupant::Gone);
    }
}
