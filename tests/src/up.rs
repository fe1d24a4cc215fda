//! `weft up` as a person runs it: in a folder, in the foreground of its own, until somebody ends it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::timeout;
use weft_localmesh::home::{HOME_DIR, Home};

use crate::footprint::Footprint;
use crate::programs;
use crate::wait::until;
use crate::weft::{Weft, program};

/// How long a start may take on a loaded machine.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a stop may take: every process has ten seconds.
const STOP_LIMIT: Duration = Duration::from_secs(40);
/// The end of what is printed when everything is up.
const LAST_LINE: &str = "goes on with the same log.";

/// Ports that a mesh may need, from its first one on.
const PORTS: u16 = 40;
/// Where free ports are looked for: below those that the kernel gives to connections.
const PORTS_FROM: u16 = 10_000;
const PORT_RANGES: u32 = 500;

/// A folder to run `weft` in.
#[derive(Debug)]
pub struct Folder {
    dir: TempDir,
    weft: PathBuf,
    base_port: u16,
}

/// A running `weft up`.
#[derive(Debug)]
pub struct Up {
    process: Child,
    /// What it printed on standard output.
    pub introduction: String,
    /// Processes and sockets as they were when it was up.
    pub footprint: Footprint,
}

impl Folder {
    /// An empty one, and a range of ports that nobody uses.
    ///
    /// # Errors
    ///
    /// The programs are not built, or there are no ports.
    pub fn new() -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("weft-story-").tempdir()?;
        // The database server may run as another user, who has to get to its own folder below this one.
        fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711))?;
        Ok(Self { dir, weft: programs::built()?.weft, base_port: free_ports()? })
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where the mesh lives.
    pub fn home(&self) -> Home {
        Home::at(self.dir.path().join(HOME_DIR))
    }

    /// The first of the mesh's ports.
    pub fn base_port(&self) -> u16 {
        self.base_port
    }

    /// `weft`, for the mesh of this folder.
    pub fn weft(&self) -> Weft {
        Weft::new(&self.weft, self.home().context())
    }

    /// `weft up` in this folder, to be run.
    pub fn up_command(&self) -> Command {
        let mut command = program(&self.weft);
        command.args(["up", "--base-port", &self.base_port.to_string()]).current_dir(self.path());
        command
    }

    /// Runs `weft up` until everything is up.
    ///
    /// # Errors
    ///
    /// It does not come up.
    pub async fn up(&self) -> anyhow::Result<Up> {
        let (out, err) = (self.path().join("up.out"), self.path().join("up.err"));
        let mut command = self.up_command();
        command.stdin(Stdio::null()).stdout(fs::File::create(&out)?).stderr(fs::File::create(&err)?);
        let mut process = command.kill_on_drop(true).spawn()?;
        let said = || fs::read_to_string(&err).unwrap_or_default();
        let introduction = until("`weft up` to be up", START_LIMIT, async || {
            let text = fs::read_to_string(&out)?;
            if text.contains(LAST_LINE) {
                return Ok(Some(text));
            }
            // It will not come any more.
            if process.try_wait()?.is_some() {
                return Ok(None);
            }
            bail!("it printed {}", said())
        })
        .await?;
        let introduction = introduction.with_context(|| format!("`weft up` ended: {}", said()))?;
        let mut footprint = Footprint::of(self.path());
        footprint.look()?;
        Ok(Up { process, introduction, footprint })
    }

    /// The last position of the log, read from the database without a controller.
    ///
    /// # Errors
    ///
    /// The database does not answer.
    pub async fn log_head(&self) -> anyhow::Result<u64> {
        let rows: Value = self.weft().json(&["sql", "select head from status.log"]).await?;
        rows[0]["head"].as_u64().with_context(|| format!("no head in {rows}"))
    }
}

impl Up {
    /// Sends a signal to `weft up` itself, and waits for its end.
    ///
    /// # Errors
    ///
    /// It does not end in time.
    pub async fn end(&mut self, signal: Signal) -> anyhow::Result<ExitStatus> {
        if let Some(pid) = self.process.id() {
            kill(Pid::from_raw(pid.cast_signed()), signal)?;
        }
        self.ended().await
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// It does not end in time.
    pub async fn ended(&mut self) -> anyhow::Result<ExitStatus> {
        let ended = timeout(STOP_LIMIT, self.process.wait()).await;
        Ok(ended.with_context(|| format!("`weft up` did not end within {} s", STOP_LIMIT.as_secs()))??)
    }

    /// Waits until nothing is left of the mesh.
    ///
    /// # Errors
    ///
    /// Something stays.
    pub async fn gone(&self) -> anyhow::Result<()> {
        until("the mesh to be gone", STOP_LIMIT, async || {
            let left = self.footprint.left()?;
            anyhow::ensure!(left.is_empty(), "still there: {}", left.join(", "));
            Ok(())
        })
        .await
    }
}

/// The first of a range of ports that are free now. Which one depends on our process, so that two that look at once find
/// different ones.
fn free_ports() -> anyhow::Result<u16> {
    let free = |port: u16| std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, port)).is_ok();
    let first = std::process::id() % PORT_RANGES;
    let ranges = (0..PORT_RANGES).map(|step| (first + step) % PORT_RANGES);
    let mut bases = ranges.filter_map(|range| Some(PORTS_FROM + u16::try_from(range).ok()? * PORTS));
    bases.find(|base| (*base..base + PORTS).all(free)).context("no range of ports is free")
}
