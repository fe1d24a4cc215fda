//! Many connections at once: policies that change under them, and more of them than a sidecar has files for.

use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use weft_tests::app::App;
use weft_tests::crowd::{self, Outcome, Plan};
use weft_tests::mesh::{Mesh, local};
use weft_tests::programs;
use weft_tests::sidecar::{OwnSidecar, Place};
use weft_tests::wait::until;

/// How long anything may take; reached only by a test that fails.
const LIMIT: Duration = Duration::from_secs(30);

/// Files that the caller's sidecar may open: more than it needs for itself and fewer than there are connections.
const FILES: u32 = 400;

/// Attempts to connect while there is no room, so many at a time: what a fleet of clients does that tries again without a pause.
const ATTEMPTS: usize = 20_000;
const AT_A_TIME: usize = 50;

/// A service, one that may call it, and the policy that lets it.
const MESH: &str = "kind: Service
name: default/many
ports: [{ name: any, port: 9000 }]
---
kind: Service
name: default/poor
ports: [{ name: any, port: 9000 }]
---
kind: SecurityPolicy
scope: default/many
default: deny
rules:
  - { name: poor, action: allow, from: { services: [default/poor] }, ports: [9000] }
";

#[tokio::test]
async fn exactly_what_a_policy_denies_is_cut() -> anyhow::Result<()> {
    let Outcome { cut_after, wrong_cuts, survivors } =
        crowd::run(Plan { connections: 200, flips: 4, seed: 1 }).await?;
    ensure!(!cut_after.is_empty(), "nothing was cut");
    ensure!((wrong_cuts, survivors) == (0, 0), "{wrong_cuts} were cut wrongly, {survivors} survived");
    Ok(())
}

#[tokio::test]
async fn a_sidecar_without_files_refuses_the_newest_and_recovers() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("weft-story-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let programs = programs::built()?;
    let mut mesh = Mesh::open(&dir.path().join("home"), &programs, None).await?;
    mesh.start().await?;
    let said = mesh.weft.apply(MESH).await?;
    ensure!(said.status == Some(0), "{said}");
    let app = App::listen().await?;
    let before = Place::Before { port: 9000, app: app.address() };
    let server = OwnSidecar::start(&mesh, &programs.proxy, "default/many/many-1", &before).await?;
    let listen = local(weft_pgserver::reserve_loopback_port()?);
    let towards = Place::Towards { upstream: "default/many:9000".to_owned(), listen };
    let poor =
        OwnSidecar::start_with_files(&mesh, &programs.proxy, "default/poor/poor-1", &towards, FILES).await?;

    let mut open = Vec::new();
    let refused = loop {
        match app.open(listen).await {
            Ok(pair) => open.push(pair),
            Err(refused) => break refused,
        }
        ensure!(open.len() < FILES as usize, "nothing was refused");
    };
    let records = until("the record of what was refused", LIMIT, async || {
        let records = poor.records().after(0)?;
        ensure!(!records.is_empty(), "{refused:#}");
        Ok(records)
    })
    .await?;
    ensure!(records.iter().all(|record| record.text("close_reason") == "overload"), "{records:?}");
    let began = Instant::now();
    let mut storm = JoinSet::new();
    for _ in 0..AT_A_TIME {
        storm.spawn(async move {
            for _ in 0..ATTEMPTS / AT_A_TIME {
                // Refused while connecting, or right after.
                let Ok(mut client) = TcpStream::connect(listen).await else { continue };
                let heard =
                    timeout(LIMIT, client.read(&mut [0])).await.context("an attempt is left waiting")?;
                ensure!(heard.is_err(), "an attempt was not refused: {heard:?}");
            }
            Ok(())
        });
    }
    for pair in &mut open {
        pair.ping().await.context("a connection that was there before")?;
    }
    // It still hears of changes.
    let seen = poor.config().await?.version;
    let said = mesh
        .weft
        .apply(&MESH.replacen("port: 9000 }]", "port: 9000 }, { name: other, port: 9001 }]", 1))
        .await?;
    ensure!(said.status == Some(0), "{said}");
    until("a change to arrive", LIMIT, async || {
        ensure!(poor.config().await?.version > seen);
        Ok(())
    })
    .await?;
    while let Some(attempts) = storm.join_next().await {
        attempts??;
    }
    eprintln!("{ATTEMPTS} attempts refused in {:.1} s", began.elapsed().as_secs_f32());
    for pair in &mut open {
        pair.ping().await.context("a connection that was there before all of them")?;
    }

    open.truncate(1);
    until("a new connection to pass", LIMIT, async || app.open(listen).await?.ping().await).await?;
    drop(open);
    poor.stop().await?;
    server.stop().await?;
    mesh.stop().await
}
