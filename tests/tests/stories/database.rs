//! A database that throws everybody out, one that crashes, and one that is away for a while, under a running mesh.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::task::JoinSet;
use weft_pgserver::{ClusterConfig, Server};
use weft_tests::blob::{self, Blob};
use weft_tests::mesh::Mesh;
use weft_tests::{postgres, programs};

#[tokio::test]
async fn the_mesh_outlives_lost_connections_a_crash_and_an_absence_of_its_database() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("weft-story-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let port = weft_pgserver::reserve_loopback_port()?;
    let server = start_server(dir.path(), port).await?;
    let programs = programs::built()?;
    let mut mesh = Mesh::open(&dir.path().join("home"), &programs, Some(server.url("postgres"))).await?;
    mesh.start().await?;

    // Connections through the mesh go on all the while, between sidecars of our own.
    let blob = Arc::new(Blob::join(&mesh, &programs.proxy).await?);
    let mut lasting = blob.open().await?;
    let over = Arc::new(AtomicBool::new(false));
    let mut traffic = JoinSet::new();
    traffic.spawn({
        let (over, blob) = (Arc::clone(&over), Arc::clone(&blob));
        async move {
            let mut passed = 0_u32;
            while !over.load(Ordering::Relaxed) {
                blob.open().await?.ping().await?;
                passed += 1;
            }
            anyhow::Ok(passed)
        }
    });

    let before = change_and_settle(&mesh, 1).await?;
    let thrown_out = ask(&server, "count(*) filter (where pg_terminate_backend(pid))").await?;
    ensure!(thrown_out > 0, "the controller had no connection to lose");
    let after = change_and_settle(&mesh, 2).await?;
    ensure!(after > before, "the log was at {before}, and is at {after}");

    // One process of the server dies hard; the server throws everybody out and recovers from its own log.
    let backend = ask(&server, "min(pid)::bigint").await?;
    kill(Pid::from_raw(i32::try_from(backend)?), Signal::SIGKILL)?;
    let recovered = change_and_settle(&mesh, 3).await?;
    ensure!(recovered > after, "the log was at {after}, and is at {recovered}");

    tokio::task::spawn_blocking(move || server.stop().map(drop)).await??;
    lasting.ping().await.context("while the database is away")?;
    let refused = mesh.weft.apply(blob::DENY).await?;
    ensure!(
        refused.status == Some(1) && refused.stderr.contains("PostgreSQL"),
        "without a database: {refused}"
    );
    lasting.ping().await.context("what could not be recorded came into force")?;
    let server = start_server(dir.path(), port).await?;
    let last = change_and_settle(&mesh, 4).await?;
    ensure!(last > recovered, "the log was at {recovered}, and is at {last}");

    lasting.ping().await.context("the connection that was open all the time")?;
    over.store(true, Ordering::Relaxed);
    let passed = traffic.join_next().await.context("no traffic")??;
    let passed = passed.context("traffic while the database was away")?;
    ensure!(passed > 10, "only {passed} connections passed");

    let said = mesh.weft.run(["verify"]).await?;
    ensure!(said.status == Some(0), "{said}");
    Arc::into_inner(blob).context("the traffic is over")?.stop().await?;
    mesh.stop().await?;
    tokio::task::spawn_blocking(move || server.stop().map(drop)).await??;
    Ok(())
}

/// Changes a policy, and waits until every sidecar runs it; returns the log's head.
async fn change_and_settle(mesh: &Mesh, number: u32) -> anyhow::Result<u64> {
    Blob::change(mesh, number).await?;
    Blob::settled(mesh, 6).await
}

/// What an expression over the controller's connections says.
async fn ask(server: &Server, expression: &str) -> anyhow::Result<i64> {
    let session = postgres::connect(server, "postgres").await?;
    let own = "from pg_stat_activity where datname = 'weft' and usename = 'weft_controller'";
    Ok(session.client.query_one(&format!("select {expression} {own}"), &[]).await?.get(0))
}

/// A server of our own, on a port that stays the same.
async fn start_server(dir: &Path, port: u16) -> anyhow::Result<Server> {
    let config = ClusterConfig { port: Some(port), ..ClusterConfig::new(dir.join("pg")) };
    postgres::start(config).await
}
