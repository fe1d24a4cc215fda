//! Sidecars that are out of touch with their controllers, in silence, while the mesh changes and connections come. The program
//! `weft-partition` does that for as long as wanted, up to half of a leaf's lifetime.

use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::time::{Instant, sleep};
use weft_testkit::{Line, Passes};

use crate::blob::Blob;
use crate::mesh::Mesh;
use crate::programs;
use crate::wait::until;

/// How long coming back may take; reached only if something is broken.
const LIMIT: Duration = Duration::from_secs(30);
/// Pause between two connections.
const CONNECT_EVERY: Duration = Duration::from_millis(50);
/// Changes of the mesh meanwhile.
const CHANGE_EVERY: Duration = Duration::from_secs(15);

/// How it went.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Connections that were made while nobody was in touch; all of them passed.
    pub passed: u32,
    /// Changes that the sidecar missed.
    pub missed: u32,
    /// From the healing of the network until the sidecar ran what it should.
    pub back_after: Duration,
}

/// Lines between a mesh's controllers and whoever connects through them.
///
/// # Errors
///
/// A line cannot be laid.
pub async fn lines(mesh: &Mesh) -> anyhow::Result<(Vec<Line>, Vec<String>)> {
    let mut lines = Vec::new();
    for controller in mesh.local.controller_addresses() {
        lines.push(Line::to(controller.parse()?).await?);
    }
    let through = lines.iter().map(|line| line.address().to_string()).collect();
    Ok((lines, through))
}

/// A mesh of its own, whose sidecars are out of touch for so long.
///
/// # Errors
///
/// A connection failed, or the sidecar does not come back.
pub async fn run(length: Duration) -> anyhow::Result<Outcome> {
    let dir = tempfile::Builder::new().prefix("weft-partition-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let programs = programs::built()?;
    let mut mesh = Mesh::open(&dir.path().join("home"), &programs, None).await?;
    mesh.start().await?;
    let (lines, through) = lines(&mesh).await?;
    let blob = Blob::join_through(&mesh, &programs.proxy, &through).await?;
    let mut lasting = blob.open().await?;

    lines.iter().for_each(|line| line.set(Passes::Nothing));
    let (old, begun) = (blob.server.config().await?.version, Instant::now());
    let (mut missed, mut passed) = (0, 0);
    while begun.elapsed() < length || missed == 0 {
        if begun.elapsed() >= CHANGE_EVERY.saturating_mul(missed) {
            missed += 1;
            Blob::change(&mesh, missed).await?;
        }
        let connected = async { blob.open().await?.ping().await };
        connected.await.with_context(|| format!("a connection after {:?}", begun.elapsed()))?;
        passed += 1;
        sleep(CONNECT_EVERY).await;
    }
    lasting.ping().await.context("the connection that was open all the time")?;
    ensure!(blob.server.config().await?.version == old, "something passed a line that is cut");

    // The sidecar that all these changes concern.
    let wanted = Blob::wanted(&mesh, "default/blob/blob-1").await?;
    lines.iter().for_each(|line| line.set(Passes::Everything));
    let healed = Instant::now();
    until("the sidecar to be back", LIMIT, async || {
        let now = blob.server.config().await?.version;
        ensure!(now.to_string() == wanted, "it still runs {now}, and not {wanted}");
        Ok(())
    })
    .await?;
    let back_after = healed.elapsed();
    Blob::settled(&mesh, 6).await?;
    blob.stop().await?;
    mesh.stop().await?;
    Ok(Outcome { passed, missed, back_after })
}
