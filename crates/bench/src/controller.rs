//! A controller as a process of its own, as users run it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};
use weft_pgserver::reserve_loopback_port;

/// Pause between two questions whether it is ready: the error of how long a start takes.
const POLL: Duration = Duration::from_millis(2);
/// A controller that folds ten million events without a checkpoint is ready by then.
const READY_MAX: Duration = Duration::from_secs(300);
/// It ends within its own limits, which are shorter.
const END_MAX: Duration = Duration::from_secs(30);
/// Longest answer of the admin port that is read: its metrics.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// A controller that runs; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    state: PathBuf,
    listen: u16,
    admin: u16,
    /// From its start until it was ready.
    pub took: Duration,
}

impl Process {
    /// Starts a controller and waits until it is ready. `state` is kept between starts, and shared by the controllers of a
    /// mesh.
    ///
    /// # Errors
    /// It ends, or does not become ready; then with what it said.
    pub async fn start(program: &Path, name: &str, state: &Path, url: &str) -> anyhow::Result<Self> {
        anyhow::ensure!(
            program.is_file(),
            "there is no controller at {}; build it beside this program, or say where it is with --controller",
            program.display()
        );
        let (listen, admin) = (reserve_loopback_port()?, reserve_loopback_port()?);
        let log = state.join(format!("{name}.log"));
        let begun = Instant::now();
        let child = Command::new(program)
            .env("WEFT_DATABASE_URL", url)
            .env("WEFT_LISTEN", format!("127.0.0.1:{listen}"))
            .env("WEFT_ADMIN_LISTEN", format!("127.0.0.1:{admin}"))
            .env("WEFT_STATE_DIR", state)
            .env("WEFT_NAME", name)
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{} could not be run", program.display()))?;
        let mut process = Self {
            child,
            name: name.to_owned(),
            state: state.to_owned(),
            listen,
            admin,
            took: Duration::ZERO,
        };
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        while process.ask("/ready").await.is_none() {
            if let Some(status) = process.child.try_wait()? {
                anyhow::bail!("the controller ended ({status}); it said:\n{}", said());
            }
            anyhow::ensure!(
                begun.elapsed() < READY_MAX,
                "the controller did not become ready; it said:\n{}",
                said()
            );
            sleep(POLL).await;
        }
        process.took = begun.elapsed();
        Ok(process)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it serves.
    #[must_use]
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.listen)
    }

    /// The directory of the admin credential.
    #[must_use]
    pub fn admin_credential(&self) -> PathBuf {
        self.state.join("operator/admin")
    }

    /// Its number.
    ///
    /// # Errors
    /// It ended by itself.
    pub fn id(&self) -> anyhow::Result<u32> {
        self.child.id().context("the controller ended by itself")
    }

    /// What its admin port answers, if that is a success.
    pub async fn ask(&self, path: &str) -> Option<String> {
        let asked = async {
            let mut stream = TcpStream::connect(("127.0.0.1", self.admin)).await?;
            stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
            let mut answer = String::new();
            stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer).await?;
            std::io::Result::Ok(answer)
        };
        let answer = timeout(Duration::from_secs(1), asked).await.ok()?.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        (head.split(' ').nth(1) == Some("200")).then(|| body.to_owned())
    }

    /// The sum of a counter over its labels; 0 if it was never counted.
    ///
    /// # Errors
    /// The metrics cannot be read.
    pub async fn counter(&self, name: &str) -> anyhow::Result<f64> {
        let metrics = self.ask("/metrics").await.context("the controller has no metrics")?;
        let values = metrics.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let value = rest
                .strip_prefix(' ')
                .or_else(|| rest.strip_prefix('{')?.split_once("} ").map(|(_, value)| value));
            value?.trim().parse::<f64>().ok()
        });
        Ok(values.sum())
    }

    /// Ends it as an operator does.
    ///
    /// # Errors
    /// It does not end, or fails as it does.
    pub async fn end(self) -> anyhow::Result<()> {
        self.finish(Signal::SIGTERM).await.and_then(|status| {
            anyhow::ensure!(status.success(), "the controller failed as it ended");
            Ok(())
        })
    }

    /// Kills it, as a machine that fails does.
    ///
    /// # Errors
    /// It ended before.
    pub async fn kill(self) -> anyhow::Result<()> {
        self.finish(Signal::SIGKILL).await.map(drop)
    }

    async fn finish(mut self, signal: Signal) -> anyhow::Result<std::process::ExitStatus> {
        kill(Pid::from_raw(self.id()?.cast_signed()), signal)?;
        let ended = timeout(END_MAX, self.child.wait()).await.context("the controller did not end")?;
        Ok(ended?)
    }
}
