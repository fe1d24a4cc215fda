//! Bytes through two sidecars whose line is rough: much on one connection, both ways at once, and little on many, which go through few
//! tunnels one after the other. Both ends of each connection are ours, and each takes a digest of what passes it: no byte is lost, doubled or
//! in another's stream. The program `weft-bytes` does that with as many as wanted.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinSet;
use tokio::time::Instant;
use weft_pgserver::reserve_loopback_port;
use weft_testkit::RoughLine;

use crate::app::{App, Pair};
use crate::mesh::{Mesh, local};
use crate::payload::{Passed, receive, send};
use crate::programs;
use crate::records::Record;
use crate::sidecar::{OwnSidecar, Place};
use crate::wait::until;

const PORT: u16 = 9000;

/// Streams that are open at once.
const CLIENTS: u32 = 8;

/// One of so many pieces is followed by a pause: often enough that there are thousands in a run, and rarely enough that a run is not
/// made of them.
const PAUSE_ONE_OF: u32 = 64;

/// How long the first connection, and the last record, may take.
const LIMIT: Duration = Duration::from_secs(20);

const RESOURCES: &str = "kind: Service
name: default/vault
ports: [{ name: any, port: 9000 }]
---
kind: Service
name: default/clerk
ports: [{ name: any, port: 9000 }]
---
kind: SecurityPolicy
scope: default/vault
default: deny
rules:
  - { name: clerk, action: allow, from: { services: [default/clerk] }, ports: [9000] }
";

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Bytes each way on one connection.
    pub bytes: u64,
    /// Streams afterwards.
    pub streams: u32,
    /// Which pieces the line cuts, and how long the streams are.
    pub seed: u64,
}

/// How it went, if every byte arrived.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// How long the bytes of one connection took.
    pub took: Duration,
    /// Tunnels that the streams needed.
    pub tunnels: usize,
}

/// A mesh of its own, and everything through it.
///
/// # Errors
///
/// The mesh does not start, or what arrives is not what was sent.
pub async fn run(plan: Plan) -> anyhow::Result<Outcome> {
    let dir = tempfile::Builder::new().prefix("weft-bytes-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let programs = programs::built()?;
    let mut mesh = Mesh::open(&dir.path().join("home"), &programs, None).await?;
    mesh.start().await?;
    let said = mesh.weft.apply(RESOURCES).await?;
    ensure!(said.status == Some(0), "{said}");

    let app = Arc::new(App::listen().await?);
    let line = RoughLine::listen(plan.seed, PAUSE_ONE_OF).await;
    let told = ["--app", &format!("{PORT}={}", app.address()), "--advertise", &line.address().to_string()];
    let before = Place::Told(told.map(str::to_owned).to_vec());
    let server = OwnSidecar::start(&mesh, &programs.proxy, "default/vault/vault-1", &before).await?;
    line.leads_to(server.inbound());
    let listen = local(reserve_loopback_port()?);
    let towards = Place::Towards { upstream: format!("default/vault:{PORT}"), listen };
    let client = OwnSidecar::start(&mesh, &programs.proxy, "default/clerk/clerk-1", &towards).await?;

    let pair = until("the first connection", LIMIT, async || app.open(listen).await).await?;
    let began = Instant::now();
    exchange(pair, plan.seed, plan.bytes, plan.bytes).await.context("much on one connection")?;
    let took = began.elapsed();
    eprintln!("{} bytes each way, {:.1} s", plan.bytes, took.as_secs_f32());

    let mark = client.records().mark()?;
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let (app, streams) = (Arc::clone(&app), plan.streams.div_ceil(CLIENTS));
        let mut rng = SmallRng::seed_from_u64(plan.seed.wrapping_add(number.into()));
        clients.spawn(async move {
            for stream in 0..streams {
                let pair = app.open(listen).await?;
                let (seed, up, down) = (rng.random(), length(&mut rng), length(&mut rng));
                exchange(pair, seed, up, down)
                    .await
                    .with_context(|| format!("stream {stream} of client {number}"))?;
            }
            anyhow::Ok(usize::try_from(streams)?)
        });
    }
    let mut streams = 0;
    while let Some(done) = clients.join_next().await {
        streams += done??;
    }
    let records = until("the records of all streams", LIMIT, async || {
        // The one of the connection before may come late.
        let records = client.records().after(mark)?;
        ensure!(records.len() >= streams, "{} of {streams}", records.len());
        Ok(records)
    })
    .await?;
    let unclean = |record: &&Record| !["client_fin", "server_fin"].contains(&record.text("close_reason"));
    let broken = records.iter().find(unclean);
    ensure!(broken.is_none(), "a stream broke: {broken:?}");
    let tunnels = records.iter().filter(|record| !record.flag("tunnel_reused")).count();
    eprintln!("{streams} streams on {tunnels} tunnels");

    client.stop().await?;
    server.stop().await?;
    mesh.stop().await?;
    Ok(Outcome { took, tunnels })
}

/// Mostly short, sometimes of many records.
fn length(rng: &mut SmallRng) -> u64 {
    if rng.random_ratio(1, 8) { rng.random_range(0..400_000) } else { rng.random_range(0..600) }
}

/// Sends both ways at once, ends both, and compares what each end has seen.
async fn exchange(pair: Pair, seed: u64, up: u64, down: u64) -> anyhow::Result<()> {
    let (client_read, client_write) = pair.client.into_split();
    let (server_read, server_write) = pair.server.into_split();
    // On tasks of their own, since a digest is work.
    let mut ends = JoinSet::new();
    ends.spawn(async move { anyhow::Ok((true, one_way(client_write, server_read, seed, up).await?)) });
    ends.spawn(async move { anyhow::Ok((false, one_way(server_write, client_read, !seed, down).await?)) });
    while let Some(end) = ends.join_next().await {
        let (is_up, (sent, came)) = end??;
        ensure!(sent == came, "{}: {sent:?} were sent, {came:?} came", if is_up { "up" } else { "down" });
    }
    Ok(())
}

async fn one_way(
    mut write: OwnedWriteHalf,
    mut read: OwnedReadHalf,
    seed: u64,
    bytes: u64,
) -> anyhow::Result<(Passed, Passed)> {
    let sending = async {
        let sent = send(&mut write, seed, bytes).await.context("sending")?;
        write.shutdown().await?;
        anyhow::Ok((sent, write))
    };
    let receiving = async { receive(&mut read).await.context("receiving") };
    let ((sent, _write), came) = tokio::try_join!(sending, receiving)?;
    Ok((sent, came))
}
