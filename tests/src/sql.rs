//! A real PostgreSQL client: `psql` where the machine has it, else the library that is linked in anyway.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};
use weft_pgserver::Binaries;

/// How long a query may take, its connection through the mesh included.
const QUERY_LIMIT: Duration = Duration::from_secs(15);

/// Where the sample database is reached, and as whom.
#[derive(Clone, Debug)]
pub struct Database {
    /// The host, a name or an address.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The role; its database has the same name.
    pub role: String,
    /// A file of passwords as psql reads it.
    pub password_file: PathBuf,
}

/// What a query returned, and who asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The rows, one per line, columns separated by `|`.
    pub rows: String,
    /// Which client it was.
    pub client: &'static str,
}

/// `psql`, from PATH or from beside the server's programs; none if the machine has none.
pub fn psql() -> Option<PathBuf> {
    let on_path = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path).map(|dir| dir.join("psql")).find(|file| file.is_file())
    });
    on_path.or_else(|| {
        let beside = Binaries::find().ok()?.dir().join("psql");
        beside.is_file().then_some(beside)
    })
}

/// Asks once, on a connection of its own.
///
/// # Errors
///
/// The connection or the query fails, or takes too long.
pub async fn query(database: &Database, sql: &str) -> anyhow::Result<Answer> {
    let asking = async {
        match psql() {
            Some(program) => query_by_psql(&program, database, sql).await,
            None => query_by_library(database, sql).await,
        }
    };
    timeout(QUERY_LIMIT, asking)
        .await
        .with_context(|| format!("no answer from {}:{} in time", database.host, database.port))?
}

async fn query_by_psql(program: &Path, database: &Database, sql: &str) -> anyhow::Result<Answer> {
    let output = Command::new(program)
        .args(["--no-psqlrc", "--no-align", "--tuples-only", "--no-password", "--host", &database.host])
        .args(["--port", &database.port.to_string(), "--username", &database.role, "--command", sql])
        .env("PGPASSFILE", &database.password_file)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "psql ended with {}: {}", output.status, said.trim());
    Ok(Answer { rows: String::from_utf8_lossy(&output.stdout).trim().to_owned(), client: "psql" })
}

async fn query_by_library(database: &Database, sql: &str) -> anyhow::Result<Answer> {
    let session = Session::open(database).await?;
    Ok(Answer { rows: session.query(sql).await?, client: "tokio-postgres" })
}

/// A connection that stays open, by the library.
#[derive(Debug)]
pub struct Session {
    client: Client,
    _driver: JoinSet<()>,
}

impl Session {
    /// Connects.
    ///
    /// # Errors
    ///
    /// Nobody answers, or the password is wrong.
    pub async fn open(database: &Database) -> anyhow::Result<Self> {
        let mut config = Config::new();
        config.host(&database.host).port(database.port).user(&database.role).dbname(&database.role);
        config.password(database.password()?).connect_timeout(QUERY_LIMIT);
        let (client, connection) = config.connect(NoTls).await?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // Its errors reach the client's calls as well.
            let _ = connection.await;
        });
        Ok(Self { client, _driver: driver })
    }

    /// The rows, one per line, columns separated by `|`.
    ///
    /// # Errors
    ///
    /// The query fails, or takes too long.
    pub async fn query(&self, sql: &str) -> anyhow::Result<String> {
        let answer =
            timeout(QUERY_LIMIT, self.client.simple_query(sql)).await.context("no answer in time")??;
        let rows = answer.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                let columns: Vec<&str> = (0..row.len()).map(|column| row.get(column).unwrap_or("")).collect();
                Some(columns.join("|"))
            }
            _ => None,
        });
        Ok(rows.collect::<Vec<_>>().join("\n"))
    }
}

impl Database {
    /// The password in a file whose one line is `*:*:database:role:password`.
    fn password(&self) -> anyhow::Result<String> {
        let text = std::fs::read_to_string(&self.password_file)
            .with_context(|| format!("reading {}", self.password_file.display()))?;
        let password = text.trim().rsplit(':').next().filter(|password| !password.is_empty());
        Ok(password.context("the password file is empty")?.to_owned())
    }
}
