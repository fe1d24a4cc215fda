//! A database per test.
//!
//! The server is the one that `WEFT_DATABASE_URL` names; `cargo xtask test` starts a private one and sets it. Without it,
//! as under a bare `cargo test`, the process starts a private server for itself, which its watchdog stops when the
//! process ends, however it ends.

use std::thread;
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;
use weft_pgserver::{Binaries, Cluster, Server};

/// Bounds each statement that makes or drops a database, so that a hanging server fails the test.
const LIMIT: Duration = Duration::from_secs(30);

/// The process's own server. Being a static it is never dropped; its watchdog ends it.
static OWN_SERVER: OnceCell<Server> = OnceCell::const_new();

/// An empty database on a real server, whose owner, the role in its URL, may do everything in it.
///
/// Roles belong to the whole server, and tests run at once: code under test that creates a role must bear its being
/// there, or being made at the same moment.
///
/// Dropped with the value, or by [`TestDatabase::close`]; whoever is still connected is disconnected.
#[derive(Debug)]
pub struct TestDatabase {
    name: String,
    url: String,
    /// A URL of the same server, to a database that stays.
    server_url: String,
    closed: bool,
}

impl TestDatabase {
    /// Creates a database with a name of its own.
    ///
    /// # Panics
    ///
    /// When there is no server, or it does not let us create a database.
    pub async fn create() -> Self {
        let server_url = server_url().await;
        let name = format!("weft_test_{}", Uuid::now_v7().simple());
        // From template0, which nobody can be connected to: template1 cannot be copied while somebody is.
        run(&server_url, &format!("CREATE DATABASE {name} TEMPLATE template0")).await;
        Self { url: with_database(&server_url, &name), name, server_url, closed: false }
    }

    /// Where the database is, for tokio-postgres, sqlx and psql alike.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The database's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Opens a connection. It lives until the client is dropped.
    ///
    /// # Panics
    ///
    /// When the server does not let us in.
    pub async fn connect(&self) -> Client {
        connect(&self.url).await.0
    }

    /// Drops the database, and fails the test if that fails, which dropping the value does not.
    ///
    /// # Panics
    ///
    /// When the server refuses.
    pub async fn close(mut self) {
        self.closed = true;
        run(&self.server_url, &self.drop_statement()).await;
    }

    fn drop_statement(&self) -> String {
        format!("DROP DATABASE {} WITH (FORCE)", self.name)
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        let (url, statement) = (self.server_url.clone(), self.drop_statement());
        // On a thread of its own, since a runtime cannot wait inside a runtime.
        let dropping = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime can be made").block_on(run(&url, &statement));
        });
        // Its panic is printed; a second one, in a test that may be panicking already, would abort the whole run.
        let _ = dropping.join();
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place where tests read their configuration")]
fn configured_url() -> Option<String> {
    std::env::var("WEFT_DATABASE_URL").ok().filter(|url| !url.is_empty())
}

async fn server_url() -> String {
    match configured_url() {
        Some(url) => url,
        None => OWN_SERVER.get_or_init(start_own_server).await.url("postgres"),
    }
}

async fn start_own_server() -> Server {
    let start = || {
        let mut say = |line: &str| eprintln!("{line}");
        let binaries =
            Binaries::find().unwrap_or_else(|error| panic!("{error}; `cargo xtask test` installs one"));
        let cluster =
            Cluster::open_scratch(binaries, &mut say).unwrap_or_else(|error| panic!("{error}: {error:?}"));
        cluster.start(&mut say).unwrap_or_else(|error| panic!("{error}: {error:?}"))
    };
    tokio::task::spawn_blocking(start).await.expect("the private PostgreSQL server started")
}

async fn run(url: &str, statement: &str) {
    let work = async {
        let (client, connection) = connect(url).await;
        client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
        drop(client);
        connection.await.expect("the connection's task ends by itself");
    };
    tokio::time::timeout(LIMIT, work)
        .await
        .unwrap_or_else(|_| panic!("{statement}: no answer within {LIMIT:?}"));
}

async fn connect(url: &str) -> (Client, JoinHandle<()>) {
    let connected = tokio_postgres::connect(url, NoTls).await;
    let (client, connection) = connected
        .unwrap_or_else(|error| panic!("connecting to WEFT_DATABASE_URL's server failed: {error:?}"));
    #[expect(clippy::disallowed_methods, reason = "the task ends with its client, which the caller owns")]
    let task = tokio::spawn(async move {
        // Its errors reach the client's calls as well.
        let _ = connection.await;
    });
    (client, task)
}

/// The same URL, with another database.
fn with_database(url: &str, database: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or_else(|| {
        panic!("WEFT_DATABASE_URL must look like postgres://user:password@host:port/database")
    });
    let (address, parameters) =
        rest.split_once('?').map_or((rest, None), |(before, after)| (before, Some(after)));
    let authority = address.split('/').next().unwrap_or_default();
    let parameters = parameters.map(|text| format!("?{text}")).unwrap_or_default();
    format!("{scheme}://{authority}/{database}{parameters}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_database_of_a_url_changes() {
        let cases = [
            ("postgres://a:b@h:1/old", "postgres://a:b@h:1/new"),
            ("postgresql://h", "postgresql://h/new"),
            (
                "postgres://u@%2Frun%2Fpg/old?sslmode=disable&x=/y",
                "postgres://u@%2Frun%2Fpg/new?sslmode=disable&x=/y",
            ),
        ];
        for (given, expected) in cases {
            assert_eq!(with_database(given, "new"), expected);
        }
    }

    #[tokio::test]
    async fn each_database_is_empty_its_own_and_gone_afterwards() {
        let (first, second) = (TestDatabase::create().await, TestDatabase::create().await);
        let client = first.connect().await;
        client.batch_execute("CREATE TABLE only_here (n int); CREATE SCHEMA allowed").await.unwrap();
        let elsewhere = second.connect().await;
        let found = elsewhere.query_one("SELECT to_regclass('only_here') IS NULL", &[]).await.unwrap();
        assert!(found.get::<_, bool>(0));

        // `client` is still connected: both ways of dropping are by force.
        let names = [first.name().to_owned(), second.name().to_owned()];
        first.close().await;
        drop(second);
        let other = TestDatabase::create().await;
        let left = "SELECT count(*) FROM pg_database WHERE datname = ANY($1)";
        let row = other.connect().await.query_one(left, &[&names.as_slice()]).await.unwrap();
        assert_eq!(row.get::<_, i64>(0), 0);
    }
}
