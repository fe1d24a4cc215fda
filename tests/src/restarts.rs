//! Sidecars are restarted, drained and upgraded in place while connections are opened at a steady rate: none of them fails, and those that
//! are there already get the whole drain. The program `weft-restarts` does that as often as wanted.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use weft_pgserver::reserve_loopback_port;

use crate::mesh::{Mesh, local};
use crate::programs;
use crate::sidecar::{DRAIN_DEADLINE, OwnSidecar, Place};
use crate::wait::until;

const PORT: u16 = 9000;
/// The service's instances: whenever one is away there is another one.
const INSTANCES: usize = 2;
/// Connections that live long, through each of the service's instances on average.
const LONG: usize = 4;
/// How long a new connection may take until its answer is there.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// New connections under way at most; more means that the mesh does not keep up, and they count as failed.
const UNDER_WAY_MAX: usize = 2_000;
/// How long anything else may take; reached only by a run that fails.
const LIMIT: Duration = Duration::from_secs(30);
/// How much earlier than the deadline a cut may seem to come, because clocks are read at different moments.
const ROUNDING: Duration = Duration::from_millis(50);

const MESH: &str = "kind: Service
name: default/steady
ports: [{ name: any, port: 9000 }]
---
kind: Service
name: default/caller
ports: [{ name: any, port: 9000 }]
---
kind: SecurityPolicy
scope: default/steady
default: deny
rules:
  - { name: caller, action: allow, from: { services: [default/caller] }, ports: [9000] }
";

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Instances that are stopped and started again, with nothing left on them to wait for.
    pub restarts: usize,
    /// Instances that are stopped with connections on them that do not end, and started again.
    pub drains: usize,
    /// Sidecars of either side that another process takes the place of.
    pub upgrades: usize,
    /// New connections each second.
    pub rate: u32,
    /// In which order, and which instances.
    pub seed: u64,
}

/// How it went.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// New connections that were opened, asked and answered.
    pub passed: u64,
    /// Those that were not.
    pub failed: u64,
    /// Why, the first few.
    pub failures: Vec<String>,
    /// Connections that lived long and were cut at the end of a drain.
    pub drained: usize,
    /// Those that were cut before.
    pub cut_early: usize,
    /// How long it took.
    pub took: Duration,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Restart,
    Drain,
    Upgrade,
}

/// What opens new connections.
struct Load {
    counts: Arc<Counts>,
    task: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct Counts {
    stop: AtomicBool,
    passed: AtomicU64,
    failed: AtomicU64,
    failures: std::sync::Mutex<Vec<String>>,
}

impl Counts {
    fn count(&self, result: anyhow::Result<()>) {
        match result {
            Ok(()) => {
                self.passed.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                let mut failures = self.failures.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if failures.len() < 10 {
                    eprintln!("failed: {error:#}");
                    failures.push(format!("{error:#}"));
                }
            }
        }
    }
}

impl Load {
    fn start(address: SocketAddr, rate: u32) -> Self {
        let counts = Arc::new(Counts::default());
        let counted = Arc::clone(&counts);
        let task = TaskTracker::new().spawn(async move {
            let mut ticks = interval(Duration::from_secs(1) / rate.max(1));
            let mut under_way = JoinSet::new();
            while !counted.stop.load(Ordering::Relaxed) {
                ticks.tick().await;
                while under_way.try_join_next().is_some() {}
                if under_way.len() >= UNDER_WAY_MAX {
                    counted.count(Err(anyhow::anyhow!("too many connections are under way")));
                    continue;
                }
                let counted = Arc::clone(&counted);
                under_way.spawn(async move {
                    let opened = timeout(CONNECTION_LIMIT, once(address)).await;
                    counted.count(opened.context("no answer in time").and_then(|opened| opened));
                });
            }
            while under_way.join_next().await.is_some() {}
        });
        Self { counts, task: AbortOnDropHandle::new(task) }
    }

    async fn end(self) -> anyhow::Result<Arc<Counts>> {
        self.counts.stop.store(true, Ordering::Relaxed);
        self.task.await?;
        Ok(self.counts)
    }
}

/// A connection of its own: a byte there, the same byte back, the end.
async fn once(address: SocketAddr) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address).await.context("connect")?;
    stream.write_all(b"?").await.context("write")?;
    let mut byte = [0];
    stream.read_exact(&mut byte).await.context("read")?;
    ensure!(&byte == b"?", "another byte came back");
    Ok(())
}

/// A connection that stays.
struct Long {
    stream: TcpStream,
}

impl Long {
    async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"?").await?;
        stream.read_exact(&mut [0]).await?;
        Ok(Self { stream })
    }

    /// When it ended; it says something all the time.
    async fn ended(mut self) -> Instant {
        loop {
            let said = async {
                self.stream.write_all(b"!").await?;
                self.stream.read_exact(&mut [0]).await
            };
            if said.await.is_err() {
                return Instant::now();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A mesh of its own, and everything that is to be done to it.
///
/// # Errors
///
/// The mesh does not start, or a sidecar does not do what it is told.
pub async fn run(plan: Plan) -> anyhow::Result<Outcome> {
    let dir = tempfile::Builder::new().prefix("weft-restarts-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let programs = programs::built()?;
    let mut mesh = Mesh::open(&dir.path().join("home"), &programs, None).await?;
    mesh.start().await?;
    let said = mesh.weft.apply(MESH).await?;
    ensure!(said.status == Some(0), "{said}");
    let app = TcpListener::bind(local(0)).await?;
    let address = app.local_addr()?;
    let serving = AbortOnDropHandle::new(TaskTracker::new().spawn(serve(app)));
    let outcome = torment(&mesh, &programs.proxy, address, plan).await;
    drop(serving);
    mesh.stop().await?;
    outcome
}

/// The application: says back what it hears.
async fn serve(listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // Without files it cannot be served, and counts as failed.
                let Ok((mut stream, _)) = accepted else { continue };
                connections.spawn(async move {
                    let (mut read, mut write) = stream.split();
                    // However it ends, it is over.
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn torment(mesh: &Mesh, weft_proxy: &Path, app: SocketAddr, plan: Plan) -> anyhow::Result<Outcome> {
    let before = Place::Before { port: PORT, app };
    let name = |index: usize| format!("default/steady/steady-{}", index + 1);
    let mut servers = Vec::new();
    for index in 0..INSTANCES {
        servers.push(Some(OwnSidecar::start(mesh, weft_proxy, &name(index), &before).await?));
    }
    let listen = local(reserve_loopback_port()?);
    let towards = Place::Towards { upstream: format!("default/steady:{PORT}"), listen };
    let mut caller = OwnSidecar::start(mesh, weft_proxy, "default/caller/caller-1", &towards).await?;
    everybody_is_back(&caller).await?;

    let mut rng = SmallRng::seed_from_u64(plan.seed);
    let steps = [(Step::Restart, plan.restarts), (Step::Drain, plan.drains), (Step::Upgrade, plan.upgrades)];
    let mut steps: Vec<Step> =
        steps.into_iter().flat_map(|(step, count)| std::iter::repeat_n(step, count)).collect();
    steps.shuffle(&mut rng);
    let mut outcome = Outcome::default();
    let begun = Instant::now();
    let load = Load::start(listen, plan.rate);
    for (number, step) in steps.iter().enumerate() {
        let mut long = JoinSet::new();
        if !matches!(step, Step::Restart) {
            for _ in 0..LONG * INSTANCES {
                long.spawn(Long::open(listen).await.context("a connection that stays")?.ended());
            }
        }
        let index = rng.random_range(0..INSTANCES);
        let began = Instant::now();
        let deadline = began + DRAIN_DEADLINE;
        let server = servers[index].take().context("the instance is away")?;
        servers[index] = Some(match step {
            Step::Restart | Step::Drain => {
                server.stop().await?;
                OwnSidecar::start(mesh, weft_proxy, &name(index), &before).await?
            }
            // Every other one is the caller's, which all connections go through.
            Step::Upgrade if number % 2 == 0 => {
                caller = caller.upgraded().await?;
                server
            }
            Step::Upgrade => server.upgraded().await?,
        });
        // Those on the other instance live on until the set is dropped.
        while let Some(ended) = long.try_join_next() {
            outcome.drained += 1;
            outcome.cut_early += usize::from(ended? + ROUNDING < deadline);
        }
        everybody_is_back(&caller).await?;
        let failed = load.counts.failed.load(Ordering::Relaxed);
        eprintln!("step {}: {step:?} took {:?}; {failed} failed so far", number + 1, began.elapsed());
    }
    outcome.took = begun.elapsed();
    let counts = load.end().await?;
    outcome.passed = counts.passed.load(Ordering::Relaxed);
    outcome.failed = counts.failed.load(Ordering::Relaxed);
    outcome.failures = counts.failures.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    caller.stop().await?;
    for server in servers.into_iter().flatten() {
        server.stop().await?;
    }
    Ok(outcome)
}

/// Waits until the caller sees every instance again: one may go only if there is another.
async fn everybody_is_back(caller: &OwnSidecar) -> anyhow::Result<()> {
    until("every instance to be there", LIMIT, async || {
        let all = caller.config().await?.all;
        let endpoints = all["endpoints"][0]["endpoints"].as_array().context("no endpoints")?;
        let able = endpoints.iter().filter(|it| it["health"] == "healthy" && it["draining"] == false).count();
        ensure!(able == INSTANCES, "{able} of {INSTANCES}");
        Ok(())
    })
    .await
}
