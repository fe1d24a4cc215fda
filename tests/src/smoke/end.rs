//! The beginning and the end of the mesh.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::blob::Blob;
use crate::http;
use crate::mesh::Mesh;
use crate::smoke::{Bench, Smoke};
use crate::wait::until;

impl Smoke {
    /// Everything, from nothing.
    pub(super) async fn start(&mut self) -> anyhow::Result<String> {
        let bench = self.start_bench().await?;
        let answer = http::body(bench.mesh.app("web-1").await?, "/").await?;
        self.footprint.look()?;
        Ok(format!(
            "{} processes, {} listening sockets; web says: {}",
            self.footprint.processes(),
            self.footprint.listeners(),
            answer.trim().replace('\n', " ")
        ))
    }

    /// The mesh and our own service in it. Until all is there the mesh is kept aside, to be stopped if the rest fails or is
    /// interrupted.
    async fn start_bench(&mut self) -> anyhow::Result<&Bench> {
        let opened = Mesh::open(self.home().dir(), &self.programs, self.database_url.clone()).await?;
        let mesh = self.starting.insert(opened);
        mesh.start().await?;
        let db_from_web = (mesh.service_address("default/db").await?, 5432).into();
        let blob = Blob::join(mesh, &self.programs.proxy).await?;
        let mesh = self.starting.take().context("the mesh is being started")?;
        Ok(self.bench.insert(Bench { mesh, blob, db_from_web }))
    }

    /// Stops the mesh and starts it again: the log goes on where it ended.
    pub(super) async fn resume(&mut self) -> anyhow::Result<String> {
        let Some(bench) = self.bench.take() else { anyhow::bail!("there is no mesh") };
        self.footprint.look()?;
        let before = log_state(&bench.mesh).await?;
        bench.stop().await?;

        let bench = self.start_bench().await?;
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
        let said = bench.mesh.weft.run(["verify"]).await?;
        ensure!(said.status == Some(0), "{said}");
        self.footprint.look()?;
        Ok(format!(
            "head {}.{} → {}.{}, first event {}… as before, no gap, verified; traffic passes",
            before.epoch,
            before.head,
            after.epoch,
            after.head,
            after.first.get(..12).unwrap_or(&after.first)
        ))
    }

    /// Stops the mesh, as far as it runs.
    pub(super) async fn stop_mesh(&mut self) -> anyhow::Result<()> {
        if let Some(mesh) = self.starting.take() {
            mesh.stop().await?;
        }
        match self.bench.take() {
            Some(bench) => bench.stop().await,
            None => Ok(()),
        }
    }

    /// Stops everything and looks for what is left.
    pub(super) async fn stop(&mut self) -> anyhow::Result<String> {
        self.footprint.look()?;
        let stopped = self.stop_mesh().await;
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
