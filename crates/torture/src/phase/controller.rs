//! The controller itself is killed, while clients change things through it and its projector writes.

use anyhow::Context;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::process::Child;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use weft_eventlog::Reader;
use weft_projector::Store;

use super::{Findings, PROGRESS_MAX, verify};
use crate::controllers::{Client, Controller, Told, channel};
use crate::journal::skipped;
use crate::proxy::{Fault, Point, Proxy};
use crate::server::Postgres;
use crate::watch::{Poller, read_all};

/// Where it is killed.
const POINTS: [Point; 6] = [
    Point::Projecting,
    Point::BeforeLock,
    Point::AfterInsert,
    Point::BeforeCommit,
    Point::AfterCommit,
    Point::BeforeReply,
];
/// Clients at once, each with a service of its own.
const CLIENTS: u64 = 8;
const FIRED_MAX: Duration = Duration::from_secs(60);

/// So many kills, over all points.
pub(crate) async fn controller(
    server: &Postgres,
    program: &Path,
    count: u64,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    server.make_log("controller", 200).await?;
    let direct = server.url("controller")?;
    let proxy = Proxy::before(server.port()?).await?;
    let state = tempfile::tempdir()?;
    let url = server.url_through(proxy.port(), "controller")?;
    let process = Controller::new(program, "controller-1", state.path(), url)?;
    let poller = Poller::start(direct.clone());
    let mut running = start(&process, &proxy).await?;
    let (told, ending) = (Arc::new(Told::default()), Arc::new(AtomicBool::new(false)));
    let channel = channel(&[process.address()?], &process.admin().await?);
    let mut clients = JoinSet::new();
    for n in 0..CLIENTS {
        let client = Client {
            channels: vec![channel.clone()],
            service: format!("default/torture-{n}"),
            told: Arc::clone(&told),
            pause: Duration::ZERO,
        };
        clients.spawn(client.run(Arc::clone(&ending)));
    }
    for n in 0..count {
        let point = POINTS[usize::try_from(n).unwrap_or_default() % POINTS.len()];
        proxy.arm(point, Fault::Kill, 1);
        if proxy.fired(FIRED_MAX).await {
            findings.count(&format!("controller {}", point.name()));
        } else {
            findings.complain(format!("the controller did not come to {}", point.name()));
        }
        timeout(PROGRESS_MAX, running.wait()).await.context("a killed controller does not die")??;
        running = start(&process, &proxy).await?;
    }
    ending.store(true, Ordering::SeqCst);
    timeout(PROGRESS_MAX, async { while clients.join_next().await.is_some() {} }).await?;

    let log = read_all(&direct).await?;
    findings.verdict += told.judge(&log);
    projected(&direct, findings).await?;
    let _ = running.kill().await;
    let polled = poller.end().await;
    findings.verdict.skipped += skipped(&log, &polled);
    findings.acknowledged += told.acknowledged();
    findings.events += log.len() as u64;
    verify(&direct, findings).await
}

/// Waits until the rows cover the log, and compares them with a fold of it.
pub(crate) async fn projected(url: &str, findings: &mut Findings) -> anyhow::Result<()> {
    let (reader, store) = (Reader::new(url.parse()?), Store::new(url)?);
    let covered = async {
        while store.checkpoint().await?.position < reader.head().await?.position {
            sleep(Duration::from_millis(20)).await;
        }
        anyhow::Ok(())
    };
    timeout(PROGRESS_MAX, covered).await.context("the projection does not reach the log's end")??;
    let report = weft_projector::verify_rows(&reader, &store, |_| ()).await?;
    findings.complaints.extend(report.differences.iter().map(ToString::to_string));
    store.close().await;
    Ok(())
}

/// Starts the controller behind the proxy and waits until it listens.
async fn start(process: &Controller, proxy: &Proxy) -> anyhow::Result<Child> {
    proxy.expect_process();
    let mut child = process.spawn()?;
    proxy.guard(child.id().and_then(|id| i32::try_from(id).ok()).unwrap_or_default());
    process.listens(&mut child).await?;
    Ok(child)
}
