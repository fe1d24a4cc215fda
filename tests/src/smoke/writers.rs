//! Writers that compete, and the proof that what is stored follows from the log.

use anyhow::{Context, ensure};

use crate::smoke::Bench;

/// A policy that exists in the sample mesh, with a version to expect and something to change.
fn policy(expected: u64, timeout_ms: u32) -> String {
    format!(
        "kind: TrafficPolicy\nscope: default/api\nversion: {expected}\nbalance: least_connections\nconnect: {{ timeout: {timeout_ms}ms, retries: 2 }}\n"
    )
}

/// Two writers expect the same version: one of them wins, and the other is told where the scope is now.
pub(super) async fn race(bench: &mut Bench) -> anyhow::Result<String> {
    let weft = &bench.mesh.weft;
    let before = version(bench).await?;
    let (first, second) = (policy(before, 501), policy(before, 502));
    let (first, second) = tokio::try_join!(weft.apply(&first), weft.apply(&second))?;
    let (winner, loser) = if first.status == Some(0) { (first, second) } else { (second, first) };
    ensure!(winner.status == Some(0), "nobody won: {winner}; {loser}");
    ensure!(loser.status == Some(3), "the loser's exit status is 3: {loser}");
    let after = version(bench).await?;
    ensure!(after == before + 1, "the scope was at version {before}, and is at {after}");
    let current = format!("at version {after}");
    ensure!(loser.stderr.contains(&current), "the loser is not told that it is {current}: {loser}");
    let said = loser.stderr.lines().next().unwrap_or_default();
    Ok(format!("exit 0 and exit 3, which said {said:?}"))
}

async fn version(bench: &Bench) -> anyhow::Result<u64> {
    let found = bench.mesh.weft.json(&["get", "traffic", "default/api"]).await?;
    found[0]["version"].as_u64().with_context(|| format!("no version in {found}"))
}

/// The log is whole, and folding it anew gives what is stored.
pub(super) async fn verify(bench: &mut Bench) -> anyhow::Result<String> {
    let said = bench.mesh.weft.run(["verify"]).await?;
    ensure!(said.status == Some(0), "{said}");
    let figures: Vec<&str> = said.stdout.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    ensure!(!figures.is_empty(), "it says nothing");
    Ok(figures.join("; "))
}
