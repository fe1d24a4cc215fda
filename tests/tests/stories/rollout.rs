//! A policy that one sidecar tries first: a bad one is taken back by itself, a good one is given to everybody.

use anyhow::{Context as _, ensure};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;
use weft_tests::blob::{ALLOW, Blob, DENY};
use weft_tests::mesh::Mesh;
use weft_tests::programs;
use weft_tests::wait::until;

/// How long anything may take; reached only by a test that fails.
const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_canary_keeps_a_bad_policy_from_everybody() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("weft-story-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let programs = programs::built()?;
    let mut mesh = Mesh::open(&dir.path().join("home"), &programs, None).await?;
    mesh.start().await?;
    let blob = Arc::new(Blob::join(&mesh, &programs.proxy).await?);
    let over = Arc::new(AtomicBool::new(false));
    let mut traffic = JoinSet::new();
    traffic.spawn({
        let (over, blob) = (Arc::clone(&over), Arc::clone(&blob));
        async move {
            let (mut passed, mut refused) = (0_u32, 0_u32);
            while !over.load(Ordering::Relaxed) {
                // One that lives when the policy comes is cut.
                let done = async { blob.open().await?.ping().await };
                *(if done.await.is_ok() { &mut passed } else { &mut refused }) += 1;
            }
            anyhow::Ok((passed, refused))
        }
    });

    // What refuses those who connected so far does not get beyond the canary, and says why.
    let policy = dir.path().join("policy.yaml");
    std::fs::write(&policy, DENY)?;
    let file = policy.to_str().context("a path")?;
    let canary = ["apply", "-f", file, "--canary", "50%", "--watch", "5s", "--wait"];
    let said = mesh.weft.run(canary).await?;
    ensure!(said.status == Some(2), "{said}");
    let ended = mesh.weft.json(&["rollout"]).await?;
    ensure!(ended["state"] == "aborted", "{ended}");
    ensure!(ended["summary"].as_str().is_some_and(|summary| summary.contains("were refused")), "{ended}");
    until("the canary to let them pass again", LIMIT, async || blob.open().await?.ping().await).await?;

    // What harms nobody is everybody's in the end, by one append of a controller.
    std::fs::write(&policy, ALLOW.replace("caller-may-connect", "caller-still-may"))?;
    let said = mesh.weft.run(canary).await?;
    ensure!(said.status == Some(0), "{said}");
    over.store(true, Ordering::Relaxed);
    let (passed, refused) = traffic.join_next().await.context("no traffic")???;
    ensure!(passed > 0 && refused > 0, "{passed} passed, {refused} were refused");
    let ended = mesh.weft.json(&["rollout"]).await?;
    ensure!(ended["state"] == "advanced", "{ended}");
    let policy = mesh.weft.json(&["get", "security", "default/blob"]).await?;
    ensure!(policy.to_string().contains("caller-still-may"), "{policy}");
    let sql = "select type, actor from weft.event where scope = 'rollout' order by position";
    let events = mesh.weft.json(&["sql", sql]).await?;
    let types: Vec<_> = events.as_array().into_iter().flatten().map(|event| event["type"].as_str()).collect();
    let expected = ["RolloutBegun", "RolloutAborted", "RolloutBegun", "RolloutAdvanced"].map(Some);
    ensure!(types == expected, "{events}");
    let state = mesh.weft.json(&["sql", "select state from status.rollout"]).await?;
    ensure!(state[0]["state"] == "advanced", "{state}");

    let said = mesh.weft.run(["verify"]).await?;
    ensure!(said.status == Some(0), "{said}");
    let blob = Arc::into_inner(blob).context("traffic still runs")?;
    blob.stop().await?;
    mesh.stop().await
}
