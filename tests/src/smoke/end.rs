//! The beginning and the end of the mesh.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::app::App;
use crate::http;
use crate::mesh::Mesh;
use crate::sidecar::OwnSidecar;
use crate::smoke::{BLOB_INSTANCE, BLOB_PORT, Bench, Smoke, policy};
use crate::wait::until;

/// How long the first connection to our own service may take to pass.
const REACH_LIMIT: Duration = Duration::from_secs(20);
/// How far our service's address is from that of `web`: the local mesh uses the first four of each sixteen.
const ADDRESS_OFFSET: u8 = 8;

impl Smoke {
    /// Everything, from nothing.
    pub(super) async fn start(&mut self) -> anyhow::Result<String> {
        let mesh = Mesh::start(self.home().dir(), &self.programs, self.database_url.clone()).await?;
        let blob = App::listen().await?;
        let answer = http::body(mesh.app("web-1").await?, "/").await?;
        match add_blob(&mesh, &self.programs.proxy, &blob).await {
            Ok((blob_sidecar, blob_address)) => {
                self.bench = Some(Bench { mesh, blob, blob_sidecar, blob_address });
            }
            Err(why) => {
                mesh.stop().await?;
                return Err(why.context("adding a service of our own"));
            }
        }
        self.footprint.look()?;
        Ok(format!(
            "{} processes, {} listening sockets; web says: {}",
            self.footprint.processes(),
            self.footprint.listeners(),
            answer.trim().replace('\n', " ")
        ))
    }

    /// Stops the mesh and starts it again: the log goes on where it ended.
    pub(super) async fn resume(&mut self) -> anyhow::Result<String> {
        let Some(bench) = self.bench.take() else { anyhow::bail!("there is no mesh") };
        self.footprint.look()?;
        let before = log_state(&bench.mesh).await?;
        let Bench { mesh, blob, blob_sidecar, blob_address } = bench;
        let stopped = blob_sidecar.stop().await;
        mesh.stop().await?;
        stopped?;

        let mesh = Mesh::start(self.home().dir(), &self.programs, self.database_url.clone()).await?;
        let blob_sidecar =
            match OwnSidecar::start(&mesh, &self.programs.proxy, BLOB_INSTANCE, BLOB_PORT, blob.address())
                .await
            {
                Ok(sidecar) => sidecar,
                Err(why) => {
                    mesh.stop().await?;
                    return Err(why.context("starting our own sidecar again"));
                }
            };
        let bench = self.bench.insert(Bench { mesh, blob, blob_sidecar, blob_address });
        self.footprint.look()?;
        let mut pair = until("web to reach blob", REACH_LIMIT, async || bench.open().await).await?;
        pair.ping().await?;
        let after = log_state(&bench.mesh).await?;
        ensure!(after.first == before.first, "the log begins otherwise than before");
        ensure!(after.head >= before.head, "the log was at {}, and is at {}", before.head, after.head);
        ensure!(after.epoch >= before.epoch, "the epoch was {}, and is {}", before.epoch, after.epoch);
        let rows = bench
            .mesh
            .weft
            .json(&["sql", "select count(*) as events, max(position) as head from audit.events"]);
        let rows = rows.await?;
        ensure!(rows[0]["events"] == rows[0]["head"], "positions have gaps: {rows}");
        Ok(format!(
            "head {}.{} → {}.{}, first event {}… as before, no gap; traffic passes",
            before.epoch,
            before.head,
            after.epoch,
            after.head,
            after.first.get(..12).unwrap_or(&after.first)
        ))
    }

    /// Stops everything and looks for what is left.
    pub(super) async fn stop(&mut self) -> anyhow::Result<String> {
        self.footprint.look()?;
        let stopped = match self.bench.take() {
            Some(bench) => bench.stop().await,
            None => Ok(()),
        };
        // What was killed may take a moment to vanish.
        until("everything to be gone", Duration::from_secs(5), async || {
            let left = self.footprint.left()?;
            ensure!(left.is_empty(), "still there: {}", left.join(", "));
            Ok(())
        })
        .await?;
        stopped?;
        Ok(format!(
            "{} processes and {} listening sockets were seen in all, none is left",
            self.footprint.processes(),
            self.footprint.listeners()
        ))
    }
}

/// Declares our service, starts its sidecar, and waits until `web` reaches it.
async fn add_blob(
    mesh: &Mesh,
    weft_proxy: &std::path::Path,
    blob: &App,
) -> anyhow::Result<(OwnSidecar, SocketAddr)> {
    let [a, b, c, last] = mesh.service_address("default/web").await?.octets();
    // Beside those of the same mesh, so that two meshes on one machine do not want the same.
    let address = Ipv4Addr::new(a, b, c, last.wrapping_add(ADDRESS_OFFSET));
    let said = mesh.weft.apply(&policy::blob_service(address)).await?;
    ensure!(said.status == Some(0), "{said}");
    let sidecar = OwnSidecar::start(mesh, weft_proxy, BLOB_INSTANCE, BLOB_PORT, blob.address()).await?;
    let address = SocketAddr::from((address, BLOB_PORT));
    let reached = until("web to reach blob", REACH_LIMIT, async || blob.open(address).await?.ping().await);
    reached.await?;
    Ok((sidecar, address))
}

/// Where the log is, and how it begins.
struct LogState {
    epoch: u64,
    head: u64,
    first: String,
}

async fn log_state(mesh: &Mesh) -> anyhow::Result<LogState> {
    let event = |events: Vec<Value>| events.into_iter().next().context("the log is empty");
    let last = event(mesh.weft.json_lines(&["log", "-n", "1"]).await?)?;
    let first = event(mesh.weft.json_lines(&["log", "1"]).await?)?;
    let number = |field: &str| last[field].as_u64().with_context(|| format!("no {field} in {last}"));
    let first = first["hash"].as_str().context("the first event has no hash")?.to_owned();
    Ok(LogState { epoch: number("epoch")?, head: number("position")?, first })
}
