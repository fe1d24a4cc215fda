//! The server that is measured: databases on it, what it says of itself, and the CPU time that it takes.

use std::sync::Mutex;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, NoTls};
use weft_eventlog::{ConnectConfig, EventLog, LogConfig, Reader, migrate};

/// Settings that decide how fast appends are; they go into the report.
const SETTINGS: [&str; 12] = [
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "wal_sync_method",
    "wal_level",
    "wal_compression",
    "commit_delay",
    "shared_buffers",
    "max_wal_size",
    "checkpoint_timeout",
    "max_connections",
    "data_checksums",
];

/// A controller has projected a million events by then.
const PROJECTED_MAX: Duration = Duration::from_secs(300);

/// A server that lets us make databases.
#[derive(Debug)]
pub struct Server {
    bench: &'static str,
    config: ConnectConfig,
    /// The databases that were made and not dropped.
    made: Mutex<Vec<String>>,
}

/// Drives a connection; ends it when dropped.
#[derive(Debug)]
pub struct Session(#[expect(dead_code, reason = "held for its end")] JoinSet<()>);

/// A database that was made for a measurement.
#[derive(Clone, Debug)]
pub struct Database {
    /// Its name.
    pub name: String,
    /// How to connect to it.
    pub config: ConnectConfig,
}

impl Server {
    /// The server at a URL, for this bench.
    ///
    /// # Errors
    /// The URL is malformed.
    pub fn new(bench: &'static str, url: &str) -> anyhow::Result<Self> {
        let config = url.parse().context(
            "the database URL is malformed; its form is postgres://user:password@host:port/database",
        )?;
        Ok(Self { bench, config, made: Mutex::new(Vec::new()) })
    }

    /// Makes an empty database.
    ///
    /// # Errors
    /// The server does not answer, or refuses.
    pub async fn create(&self, what: &str) -> anyhow::Result<Database> {
        let name = format!("weft_{}bench_{}_{what}", self.bench, std::process::id());
        self.drop_by_name(&name).await?;
        self.root().run(&format!("create database {name} template template0")).await?;
        self.made.lock().map_err(|_| anyhow::anyhow!("a measurement ended badly"))?.push(name.clone());
        let mut config = self.config.clone();
        config.dbname(&name);
        Ok(Database { name, config })
    }

    /// Drops a database, whoever is connected to it.
    ///
    /// # Errors
    /// The server does not answer, or refuses.
    pub async fn drop(&self, database: &Database) -> anyhow::Result<()> {
        self.drop_by_name(&database.name).await?;
        self.made
            .lock()
            .map_err(|_| anyhow::anyhow!("a measurement ended badly"))?
            .retain(|made| *made != database.name);
        Ok(())
    }

    /// Drops what is left.
    ///
    /// # Errors
    /// The server does not answer, or refuses.
    pub async fn clean(&self) -> anyhow::Result<()> {
        let made =
            std::mem::take(&mut *self.made.lock().map_err(|_| anyhow::anyhow!("a measurement ended badly"))?);
        for name in made {
            self.drop_by_name(&name).await?;
        }
        Ok(())
    }

    async fn drop_by_name(&self, name: &str) -> anyhow::Result<()> {
        self.root().run(&format!("drop database if exists {name} with (force)")).await
    }

    /// The database that the URL names, where nothing is made.
    fn root(&self) -> Database {
        Database { name: String::new(), config: self.config.clone() }
    }

    /// Its version and settings.
    ///
    /// # Errors
    /// The server does not answer, or refuses.
    pub async fn describe(&self) -> anyhow::Result<Value> {
        const SQL: &str = "select name, current_setting(name) from pg_settings where name = any($1)";
        let (client, _session) = self.root().connect().await?;
        let mut described = Map::new();
        let version = client.query_one("select version()", &[]).await?;
        described.insert("version".into(), json!(version.get::<_, String>(0)));
        for row in client.query(SQL, &[&SETTINGS.as_slice()]).await? {
            described.insert(row.get(0), json!(row.get::<_, String>(1)));
        }
        Ok(Value::Object(described))
    }

    /// The server's first process, if it runs on this machine.
    ///
    /// # Errors
    /// The server does not answer, or refuses.
    pub async fn process(&self) -> anyhow::Result<Option<u32>> {
        let (client, _session) = self.root().connect().await?;
        let backend: i32 = client.query_one("select pg_backend_pid()", &[]).await?.get(0);
        Ok(crate::cpu::parent(backend.cast_unsigned(), "postgres"))
    }
}

impl Database {
    /// A connection.
    ///
    /// # Errors
    /// The server does not answer, or refuses.
    pub async fn connect(&self) -> anyhow::Result<(Client, Session)> {
        let (client, connection) =
            self.config.connect(NoTls).await.context("cannot connect to PostgreSQL")?;
        let mut task = JoinSet::new();
        // Its errors reach the client's calls as well.
        task.spawn(async move { drop(connection.await) });
        Ok((client, Session(task)))
    }

    /// Runs statements.
    ///
    /// # Errors
    /// The server does not answer, or refuses.
    pub async fn run(&self, sql: &str) -> anyhow::Result<()> {
        let (client, _session) = self.connect().await?;
        client.batch_execute(sql).await.with_context(|| format!("PostgreSQL refused: {sql}"))
    }

    /// One number.
    ///
    /// # Errors
    /// The server does not answer, or refuses.
    pub async fn number(&self, sql: &str) -> anyhow::Result<i64> {
        let (client, _session) = self.connect().await?;
        let row = client.query_one(sql, &[]).await.with_context(|| format!("PostgreSQL refused: {sql}"))?;
        Ok(row.get(0))
    }

    /// Waits until a controller has projected all of the log, looking so often.
    ///
    /// # Errors
    /// The server does not answer, or nobody projects.
    pub async fn projected(&self, every: Duration) -> anyhow::Result<()> {
        const SQL: &str = "select (select coalesce(max(last_position), 0) from weft.log_batch) - \
                           (select coalesce(max(position), 0) from weft.projection)";
        let (client, _session) = self.connect().await?;
        let begun = Instant::now();
        while client.query_one(SQL, &[]).await?.get::<_, i64>(0) > 0 {
            anyhow::ensure!(begun.elapsed() < PROJECTED_MAX, "the controller did not project the log");
            sleep(every).await;
        }
        Ok(())
    }

    /// Makes the log's tables.
    ///
    /// # Errors
    /// The server does not answer, or refuses.
    pub async fn migrate(&self) -> anyhow::Result<()> {
        migrate(&self.config).await.context("cannot make the log's tables")
    }

    ///
    /// # Errors
    /// The server does not answer, or refuses.
    pub async fn open_log(&self) -> anyhow::Result<EventLog> {
        EventLog::open(LogConfig::new(self.config.clone())).await.context("cannot open the log")
    }

    /// Reads the log.
    #[must_use]
    pub fn reader(&self) -> Reader {
        Reader::new(self.config.clone())
    }

    /// The database's URL, for a program that is told one. Holds the password.
    ///
    /// # Errors
    /// The server's URL has no scheme.
    pub fn url(&self, of_server: &str) -> anyhow::Result<String> {
        let (scheme, rest) = of_server.split_once("://").context("the database URL has no scheme")?;
        let (address, parameters) =
            rest.split_once('?').map_or((rest, ""), |(address, rest)| (address, rest));
        let authority = address.split('/').next().unwrap_or_default();
        let mark = if parameters.is_empty() { "" } else { "?" };
        Ok(format!("{scheme}://{authority}/{}{mark}{parameters}", self.name))
    }
}
