//! Two controllers: one dies, one shuts down, and sidecars are cut off from both, while connections pass all the time.

use std::num::NonZeroU8;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use tokio::task::JoinSet;
use weft_testkit::Passes;
use weft_tests::blob::Blob;
use weft_tests::mesh::{Mesh, local};
use weft_tests::wait::until;
use weft_tests::{http, partition, programs};

/// How long anything may take; reached only by a test that fails.
const LIMIT: Duration = Duration::from_secs(30);
/// What a sidecar's log says when it has lost its controllers, and when one of them sent it to another.
const ALARM: &str = "no controller; serving from the last snapshot";
const MOVED: &str = "the controller asked to go to another one";
/// Changes while sidecars are cut off: more than former manifests are remembered.
const MISSED: u32 = 40;

#[tokio::test]
async fn a_mesh_with_two_controllers_misses_neither() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("weft-story-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let programs = programs::built()?;
    let two = NonZeroU8::new(2).context("two")?;
    let mut mesh = Mesh::open_with(&dir.path().join("home"), &programs, two, None).await?;
    mesh.start().await?;
    let controllers = mesh.local.controller_addresses();
    ensure!(controllers.len() == 2, "{controllers:?}");
    let (lines, through) = partition::lines(&mesh).await?;
    let blob = Arc::new(Blob::join_through(&mesh, &programs.proxy, &through).await?);
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
    Blob::change(&mesh, 1).await?;
    Blob::settled(&mesh, 6).await?;

    // The one that leads is killed: the other takes changes, leads, and lets a newcomer join.
    let killed = leader(&mesh).await?;
    mesh.local.kill(&killed).await?;
    Blob::change(&mesh, 2).await?;
    Blob::settled(&mesh, 6).await?;
    mesh.local.add_instance("api").await?;
    Blob::settled(&mesh, 7).await?;
    let left = leader(&mesh).await?;
    ensure!(left != killed, "{left} leads, and is dead");
    mesh.local.restart(&killed).await?;

    // The other one shuts down, and every sidecar goes to the one that is back. None of them misses anything.
    let before = said(&mesh, &blob, ALARM).await?;
    mesh.local.restart(&left).await?;
    Blob::change(&mesh, 3).await?;
    Blob::settled(&mesh, 7).await?;
    let moved = said(&mesh, &blob, MOVED).await?;
    ensure!(moved == 7, "of 7 sidecars {moved} were sent to the other controller");
    let alarms = said(&mesh, &blob, ALARM).await?;
    ensure!(alarms == before, "{} sidecars raised an alarm", alarms - before);

    // Sidecars are cut off from both, with their connections closed and in silence, and miss a lot. They come back by differences.
    let before = full_pulls(&mesh).await?;
    let mut number = 3;
    for passes in [Passes::NoConnection, Passes::Nothing] {
        let old = blob.server.config().await?.version;
        lines.iter().for_each(|line| line.set(passes));
        for _ in 0..MISSED {
            number += 1;
            Blob::change(&mesh, number).await?;
        }
        lasting.ping().await.context("while sidecars are cut off")?;
        ensure!(blob.server.config().await?.version == old, "something passed a line that is cut");
        lines.iter().for_each(|line| line.set(Passes::Everything));
        until("the sidecars to be back", LIMIT, async || {
            let now = blob.server.config().await?.version;
            ensure!(now > old, "it still runs {now}");
            Ok(())
        })
        .await?;
        Blob::settled(&mesh, 7).await?;
    }
    let after = full_pulls(&mesh).await?;
    ensure!(after == before, "{} pulls brought everything", after - before);

    lasting.ping().await.context("the connection that was open all the time")?;
    over.store(true, Ordering::Relaxed);
    let passed = traffic.join_next().await.context("no traffic")??.context("a connection failed")?;
    ensure!(passed > 10, "only {passed} connections passed");
    let said = mesh.weft.run(["verify"]).await?;
    ensure!(said.status == Some(0), "{said}");
    Arc::into_inner(blob).context("the traffic is over")?.stop().await?;
    mesh.stop().await
}

#[tokio::test]
async fn sidecars_that_are_out_of_touch_fail_no_connection() -> anyhow::Result<()> {
    // As long as it takes to miss a change; `cargo xtask torture partition` does it for half an hour.
    let outcome = partition::run(Duration::ZERO).await?;
    ensure!(outcome.passed > 0 && outcome.missed > 0, "{outcome:?}");
    Ok(())
}

/// The process of the controller that leads.
async fn leader(mesh: &Mesh) -> anyhow::Result<String> {
    until("somebody to lead", LIMIT, async || {
        let status = mesh.weft.json(&["status"]).await?;
        match status["leader"]["holder"].as_str() {
            Some("controller-1") => Ok("controller".to_owned()),
            Some("controller-2") => Ok("controller-2".to_owned()),
            other => anyhow::bail!("{other:?} leads"),
        }
    })
    .await
}

/// How often all sidecars together said something.
async fn said(mesh: &Mesh, blob: &Blob, what: &str) -> anyhow::Result<usize> {
    let mut logs = vec![blob.server.log()?, blob.client.log()?];
    for sidecar in mesh.local.sidecars().await {
        logs.push(std::fs::read_to_string(mesh.local.home().log(&sidecar.instance))?);
    }
    Ok(logs.iter().map(|log| log.matches(what).count()).sum())
}

/// How often the controllers that run have sent everything.
async fn full_pulls(mesh: &Mesh) -> anyhow::Result<u64> {
    let ports: Value = serde_json::from_str(&std::fs::read_to_string(ports(mesh.local.home().dir()))?)?;
    let mut pulls = 0;
    for controller in ["controller", "controller-2"] {
        let port = ports[format!("{controller} admin")].as_u64().context("no admin port")?;
        let metrics = http::body(local(u16::try_from(port)?), "/metrics").await?;
        let full = "weft_api_pulls_total{kind=\"full\"} ";
        let counted = metrics.lines().filter_map(|line| line.strip_prefix(full)?.trim().parse::<u64>().ok());
        pulls += counted.sum::<u64>();
    }
    Ok(pulls)
}

fn ports(home: &Path) -> std::path::PathBuf {
    home.join("mesh.json")
}
