//! The PostgreSQL that is tortured: a private one, which can be killed and started again.

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::PathBuf;
use std::time::Duration;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, NoTls};
use weft_pgserver::{Binaries, Cluster, Server};

/// How long anything may take that a healthy server does at once, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Postgres {
    server: Option<Server>,
}

/// A connection and the task that drives it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) client: Client,
    _driver: JoinSet<()>,
}

impl Session {
    pub(crate) async fn open(url: &str) -> anyhow::Result<Self> {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // Its errors reach the client's calls as well.
            let _ = connection.await;
        });
        Ok(Self { client, _driver: driver })
    }
}

impl Postgres {
    /// A new cluster. `wal` puts its write-ahead log into that folder.
    pub(crate) async fn start(wal: Option<PathBuf>) -> anyhow::Result<Self> {
        let server = spawn_blocking(move || {
            let mut say = |_: &str| ();
            let cluster = Cluster::open_scratch(Binaries::find()?, &mut say)?;
            if let Some(wal) = wal {
                move_wal(&cluster, &wal)?;
            }
            anyhow::Ok(cluster.start(&mut say)?)
        });
        let server = server.await?.context("a private PostgreSQL cannot be started")?;
        Ok(Self { server: Some(server) })
    }

    fn server(&self) -> anyhow::Result<&Server> {
        self.server.as_ref().context("the server is not running")
    }

    pub(crate) fn port(&self) -> anyhow::Result<u16> {
        Ok(self.server()?.port())
    }

    /// A URL for a database, directly.
    pub(crate) fn url(&self, database: &str) -> anyhow::Result<String> {
        Ok(self.server()?.url(database))
    }

    /// The same, through a proxy.
    pub(crate) fn url_through(&self, port: u16, database: &str) -> anyhow::Result<String> {
        Ok(self.url(database)?.replacen(&format!(":{}/", self.port()?), &format!(":{port}/"), 1))
    }

    /// A URL for a database in the name of a new login, which may do everything.
    pub(crate) async fn url_of_new_login(&self, login: &str, database: &str) -> anyhow::Result<String> {
        let url = self.url(database)?;
        let (user, password) = url
            .strip_prefix("postgres://")
            .and_then(|rest| rest.split_once('@')?.0.split_once(':'))
            .context("the server's URL names a login with a password")?;
        let session = Session::open(&url).await?;
        session
            .client
            .batch_execute(&format!("create role {login} superuser login password '{password}'"))
            .await?;
        Ok(url.replacen(user, login, 1))
    }

    /// Makes a database with an empty event log in ranges of so many positions: few, so that what is done to the log is done
    /// while ranges are made, filled and closed.
    pub(crate) async fn make_log(&self, database: &str, range: u32) -> anyhow::Result<()> {
        let session = Session::open(&self.url("postgres")?).await?;
        session.client.batch_execute(&format!("create database {database} template template0")).await?;
        let connect = self.url(database)?.parse()?;
        weft_eventlog::migrate(&connect).await?;
        Ok(weft_eventlog::lay_out(&connect, range).await?)
    }

    /// Sends a signal to the first process.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = i32::try_from(self.server()?.pid())?;
        Ok(kill(Pid::from_raw(pid), signal)?)
    }

    /// SIGKILL for a process that serves the event log; the server then restarts all of its processes.
    pub(crate) async fn kill_backend(&self, database: &str) -> anyhow::Result<bool> {
        const SQL: &str = "select pid from pg_stat_activity where application_name = 'weft-eventlog' \
                           and datname = current_database() order by random() limit 1";
        let session = Session::open(&self.url(database)?).await?;
        let Some(row) = session.client.query_opt(SQL, &[]).await? else { return Ok(false) };
        Ok(kill(Pid::from_raw(row.get(0)), Signal::SIGKILL).is_ok())
    }

    /// Whether the first process has ended.
    pub(crate) fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.server.as_mut().context("the server is not running")?.exited()?.is_some())
    }

    /// Waits until the first process has ended, and starts the server again, on another port.
    pub(crate) async fn start_again(&mut self) -> anyhow::Result<()> {
        let ended = async {
            while !self.has_ended()? {
                sleep(Duration::from_millis(5)).await;
            }
            anyhow::Ok(())
        };
        timeout(PATIENCE, ended).await.context("the server does not end")??;
        let data = self.server()?.cluster().data_dir();
        let orphans = async {
            while has_processes(&data) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, orphans).await.context("processes of a killed server do not end")?;
        let server = self.server.take().context("the server is not running")?;
        let started = spawn_blocking(move || {
            let mut say = |_: &str| ();
            let cluster = server.stop().or_else(|error| bail(&error))?;
            anyhow::Ok(cluster.start(&mut say)?)
        });
        self.server = Some(started.await?.context("the server does not start again")?);
        Ok(())
    }

    /// Waits until it answers again, as after one of its processes was killed.
    pub(crate) async fn answers(&self) -> anyhow::Result<()> {
        let url = self.url("postgres")?;
        let answer = async {
            while Session::open(&url).await.is_err() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, answer).await.context("the server does not answer any more")
    }
}

/// Whether any process works in the data directory. Those of a server whose first process was killed notice it one by one,
/// and as long as they share its memory no other server starts.
fn has_processes(data: &std::path::Path) -> bool {
    let Ok(data) = data.canonicalize() else { return false };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .map(|process| process.path().join("cwd"))
        .any(|cwd| std::fs::read_link(cwd).is_ok_and(|cwd| cwd == data))
}

fn bail(error: &weft_pgserver::StopError) -> anyhow::Result<Cluster> {
    anyhow::bail!("the server cannot be taken down: {error}")
}

/// Before the first start: the write-ahead log goes where it can run out of space.
fn move_wal(cluster: &Cluster, wal: &std::path::Path) -> anyhow::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let (inside, outside) = (cluster.data_dir().join("pg_wal"), wal.join("pg_wal"));
    let owner = std::fs::metadata(&inside)?;
    let copied = std::process::Command::new("cp").arg("-a").arg(&inside).arg(&outside).status()?;
    anyhow::ensure!(copied.success(), "the write-ahead log cannot be moved to {}", wal.display());
    std::fs::remove_dir_all(&inside)?;
    std::os::unix::fs::symlink(&outside, &inside)?;
    std::os::unix::fs::lchown(&inside, Some(owner.uid()), Some(owner.gid()))?;
    std::os::unix::fs::chown(wal, Some(owner.uid()), Some(owner.gid()))?;
    Ok(())
}
