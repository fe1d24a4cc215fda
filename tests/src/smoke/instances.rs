//! Instances that come and go while requests are made.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tokio::task::JoinSet;

use crate::http;
use crate::smoke::Bench;
use crate::wait::until;

/// How many requests are made while an instance is away.
const REQUESTS: usize = 250;
/// How many at once.
const AT_ONCE: usize = 8;
/// How long it may take until an instance that is there gets requests.
const TRAFFIC_LIMIT: Duration = Duration::from_secs(20);

/// How often each instance answered.
type Answers = BTreeMap<String, usize>;

/// The app of one instance is killed. Its sidecar is there and refuses, so requests go elsewhere; when the app is back, so
/// are requests.
pub(super) async fn app_dies(bench: &mut Bench) -> anyhow::Result<String> {
    let api = bench.mesh.outbound("web-1").await?;
    until_answered_by(api, &["api-1", "api-2"]).await?;
    bench.mesh.local.kill("api-1-app").await?;
    let seen = only_api_2(bench, api).await?;
    bench.mesh.local.restart("api-1-app").await?;
    until_answered_by(api, &["api-1", "api-2"]).await?;
    Ok(format!("{seen}; app restarted: both answer"))
}

/// One instance is killed, app and sidecar: nobody says goodbye, and connections to it are refused.
pub(super) async fn instance_dies(bench: &mut Bench) -> anyhow::Result<String> {
    let api = bench.mesh.outbound("web-1").await?;
    until_answered_by(api, &["api-1", "api-2"]).await?;
    bench.mesh.local.kill("api-1").await?;
    bench.mesh.local.kill("api-1-app").await?;
    let seen = only_api_2(bench, api).await?;
    bench.mesh.local.restart("api-1-app").await?;
    bench.mesh.local.restart("api-1").await?;
    until_answered_by(api, &["api-1", "api-2"]).await?;
    Ok(format!("{seen}; instance restarted: both answer"))
}

/// A new instance joins, registers, is probed, and is chosen.
pub(super) async fn joins(bench: &mut Bench) -> anyhow::Result<String> {
    let api = bench.mesh.outbound("web-1").await?;
    let name = bench.mesh.local.add_instance("api").await?;
    until_answered_by(api, &[&name]).await?;
    let identity = bench.mesh.sidecar(&name).await?.identity.context("it has no identity")?;
    let answers = requests(api, 60).await?;
    ensure!(answers.contains_key(&name), "answers came from {}", told(&answers));
    Ok(format!("{identity}; of 60 requests: {}", told(&answers)))
}

/// Makes requests at once, before anybody can have told that `api-1` is gone: all are answered, by `api-2`.
async fn only_api_2(bench: &Bench, api: SocketAddr) -> anyhow::Result<String> {
    let records = bench.mesh.records("web-1");
    let mark = records.mark()?;
    let answers = requests(api, REQUESTS).await?;
    ensure!(answers.keys().eq(["api-2"]), "answers came from {}", told(&answers));
    let retried = records.after(mark)?.iter().filter(|record| record.number("attempts") > Some(1)).count();
    Ok(format!(
        "{REQUESTS} requests right after the kill: {}, {retried} of them at a second attempt",
        told(&answers)
    ))
}

/// Makes requests until each of these instances has answered one.
async fn until_answered_by(api: SocketAddr, wanted: &[&str]) -> anyhow::Result<()> {
    let mut seen = Answers::new();
    until(&format!("answers from {}", wanted.join(" and ")), TRAFFIC_LIMIT, async || {
        *seen.entry(request(api).await?).or_default() += 1;
        if wanted.iter().all(|name| seen.contains_key(*name)) {
            return Ok(());
        }
        bail!("answers came from {}", told(&seen))
    })
    .await
}

/// Makes requests, several at once, each on a connection of its own. One that fails is an error.
pub(super) async fn requests(api: SocketAddr, count: usize) -> anyhow::Result<Answers> {
    let started = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..AT_ONCE {
        let started = Arc::clone(&started);
        clients.spawn(async move {
            let (mut answers, mut failures) = (Answers::new(), Vec::new());
            while started.fetch_add(1, Ordering::Relaxed) < count {
                match request(api).await {
                    Ok(name) => *answers.entry(name).or_default() += 1,
                    Err(error) => failures.push(format!("{error:#}")),
                }
            }
            (answers, failures)
        });
    }
    let (mut answers, mut failures) = (Answers::new(), Vec::new());
    for (some, failed) in clients.join_all().await {
        for (name, times) in some {
            *answers.entry(name).or_default() += times;
        }
        failures.extend(failed);
    }
    let first = failures.first().map(String::as_str).unwrap_or_default();
    ensure!(failures.is_empty(), "{} of {count} requests failed, such as: {first}", failures.len());
    Ok(answers)
}

/// One request, and which instance of `api` answered it.
async fn request(api: SocketAddr) -> anyhow::Result<String> {
    let answer: Value = serde_json::from_str(&http::body(api, "/").await?)?;
    let name =
        answer["instance"].as_str().with_context(|| format!("the answer names no instance: {answer}"))?;
    Ok(name.to_owned())
}

fn told(answers: &Answers) -> String {
    answers.iter().map(|(name, times)| format!("{name} {times}×")).collect::<Vec<_>>().join(", ")
}
