//! A PostgreSQL of a story's own.

use tokio::task::{JoinSet, spawn_blocking};
use tokio_postgres::{Client, NoTls};
use weft_pgserver::{Binaries, Cluster, ClusterConfig, Server};

/// A connection; it ends with the value.
#[derive(Debug)]
pub struct Session {
    /// To ask with.
    pub client: Client,
    _driver: JoinSet<()>,
}

/// Starts the server of a cluster.
///
/// # Errors
///
/// It does not start.
pub async fn start(config: ClusterConfig) -> anyhow::Result<Server> {
    let start = move || {
        let mut say = |line: &str| eprintln!("{line}");
        let binaries = Binaries::find_or_install(&mut say)?;
        anyhow::Ok(Cluster::open(binaries, config, &mut say)?.start(&mut say)?)
    };
    spawn_blocking(start).await?
}

/// Connects to a database as the server's superuser.
///
/// # Errors
///
/// The server does not take it.
pub async fn connect(server: &Server, database: &str) -> anyhow::Result<Session> {
    let (client, connection) = tokio_postgres::connect(&server.url(database), NoTls).await?;
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        // Its errors reach the client's calls as well.
        let _ = connection.await;
    });
    Ok(Session { client, _driver: driver })
}
