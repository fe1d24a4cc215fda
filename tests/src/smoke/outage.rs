//! Without a controller: what runs goes on, what restarts comes back, and afterwards everyone is where they should be.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use tokio::time::Instant;

use crate::smoke::Bench;
use crate::smoke::instances::requests;
use crate::smoke::policy;
use crate::wait::until;
use crate::{blob, http, sql};

/// How long sidecars may take to find the controller again: the longest pause between two attempts, and room.
const BACK_LIMIT: Duration = Duration::from_secs(30);
/// Requests made without a controller.
const REQUESTS: usize = 60;

/// The controller is killed; a connection that was open stays, and new ones are made.
pub(super) async fn controller_dies(bench: &mut Bench) -> anyhow::Result<String> {
    let mut pair = bench.blob.open().await?;
    pair.ping().await?;
    bench.mesh.local.kill("controller").await?;
    pair.ping().await.context("the open connection")?;
    let answers = requests(bench.mesh.outbound("web-1").await?, REQUESTS).await.context("new connections")?;
    let rows = sql::query(&bench.mesh.database_through("api-2").await?, "select 1 + 1").await?.rows;
    ensure!(rows == "2", "1 + 1 is {rows}");
    pair.ping().await.context("the open connection")?;
    Ok(format!(
        "the open connection stays; {REQUESTS} new requests answered by {} instances; SELECT too",
        answers.len()
    ))
}

/// A sidecar is killed and started again while there is no controller: it serves what it had.
pub(super) async fn sidecar_restarts(bench: &mut Bench) -> anyhow::Result<String> {
    let mut told = Vec::new();
    // One that clients connect through, and one before an app: leaf, routes and policy all come from the disk.
    for instance in ["web-1", "db-1"] {
        let before = bench.mesh.config(instance).await?.version;
        bench.mesh.local.kill(instance).await?;
        let killed = Instant::now();
        bench.mesh.local.restart(instance).await?;
        let after = bench.mesh.config(instance).await?.version;
        ensure!(after == before, "{instance} ran {before}, and now {after}");
        told.push(format!("{instance} at {after} again {} ms after the kill", killed.elapsed().as_millis()));
    }
    let answer = http::body(bench.mesh.app("web-1").await?, "/").await.context("web → api → db")?;
    ensure!(answer.contains("api-"), "web answers {answer}");
    policy::refused_connection(bench).await.context("web may still not query db")?;
    Ok(format!("{}; web → api → db works, and refusals are refused", told.join(", ")))
}

/// The controller comes back: every sidecar is connected and runs what it should, also what is decided from then on.
pub(super) async fn controller_returns(bench: &mut Bench) -> anyhow::Result<String> {
    let returning = Instant::now();
    bench.mesh.local.restart("controller").await?;
    let serving = returning.elapsed();
    let (sidecars, head) = everyone_at_head(bench).await?;
    let settled = returning.elapsed();
    // And news reach them: our service's policy as it is, at a new version, because a rule has another name.
    let said =
        bench.mesh.weft.apply(&blob::ALLOW.replace("caller-may-connect", "caller-may-still-connect")).await?;
    ensure!(said.status == Some(0), "{said}");
    let (_, later) = everyone_at_head(bench).await?;
    ensure!(later > head, "the log did not grow: {head}, then {later}");
    Ok(format!(
        "serving after {} ms; all {sidecars} sidecars at head {head} after {} ms, and at {later} after an apply",
        serving.as_millis(),
        settled.as_millis()
    ))
}

/// Waits until the projector is at the log's head and every sidecar is connected and runs what it should.
pub(super) async fn everyone_at_head(bench: &Bench) -> anyhow::Result<(usize, u64)> {
    let sidecars = "select instance, wanted, applied, connected from status.sidecars order by instance";
    until("everyone to be at head", BACK_LIMIT, async || {
        let log = bench.mesh.weft.json(&["sql", "select head, projected from status.log"]).await?;
        let number = |field: &str| number(&log[0][field]).with_context(|| format!("no {field} in {log}"));
        let head = number("head")?;
        ensure!(number("projected")? == head, "the projector is behind: {log}");
        let rows = bench.mesh.weft.json(&["sql", sidecars]).await?;
        let rows = rows.as_array().context("no rows")?;
        for row in rows {
            // An instance that was added and is gone wants something, too; here there is none yet.
            ensure!(truth(&row["connected"]), "not connected: {row}");
            ensure!(row["wanted"].is_string() && row["wanted"] == row["applied"], "behind: {row}");
        }
        let expected = bench.mesh.local.sidecars().await.len() + 2;
        ensure!(rows.len() == expected, "{} sidecars in status.sidecars, not {expected}", rows.len());
        Ok((rows.len(), head))
    })
    .await
}

/// Numbers and truth values may come as text, since SQL has more of them than JSON.
fn number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

fn truth(value: &Value) -> bool {
    value == true || value == "t" || value == "true"
}
