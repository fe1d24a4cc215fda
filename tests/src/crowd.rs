//! Thousands of live connections, whose policy changes at random: what is denied is cut, and nothing else is. The program `weft-crowd`
//! does that with as many as wanted.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use weft_pgserver::reserve_loopback_port;

use crate::mesh::{Mesh, local};
use crate::programs;
use crate::sidecar::{OwnSidecar, Place};

/// Who connects: services of their own, so that a policy is about some of the connections.
const GUESTS: [&str; 4] = ["ada", "ben", "cleo", "dan"];
const PORT: u16 = 9000;
/// Connections that are opened at once.
const OPENING: usize = 64;
/// How long after a change it is given up on a connection that ought to be cut.
const SURVIVED: Duration = Duration::from_secs(10);
/// How long nothing else may be cut after a change, once everything is that ought to be.
const QUIET: Duration = Duration::from_millis(200);
/// Instances of the service, so that each holds a part of the connections.
const INSTANCES: [&str; 2] = ["crowd-1", "crowd-2"];
/// How long a connection may take to be opened.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Live connections.
    pub connections: usize,
    /// Changes of the policy.
    pub flips: u32,
    /// Which changes.
    pub seed: u64,
}

/// How it went.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// From the acknowledgement of a change until a connection that it denies was cut, of all cuts, in order.
    pub cut_after: Vec<Duration>,
    /// Connections that were cut though nothing denied them.
    pub wrong_cuts: usize,
    /// Connections that were denied and not cut.
    pub survivors: usize,
}

impl Outcome {
    /// What so many of a hundred cuts took at most; none if there was none.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Option<Duration> {
        let last = self.cut_after.len().checked_sub(1)?;
        self.cut_after.get(last * percent / 100).copied()
    }
}

/// A connection of a guest ended.
struct Ended {
    guest: usize,
    at: Instant,
}

/// The service, and who may connect.
struct Crowd {
    outbound: Vec<SocketAddr>,
    ended: mpsc::UnboundedSender<Ended>,
    watching: JoinSet<()>,
    live: [usize; GUESTS.len()],
}

impl Crowd {
    /// Brings a guest's connections to so many.
    async fn fill(&mut self, guest: usize, connections: usize) -> anyhow::Result<()> {
        let mut opening = JoinSet::new();
        let places = Arc::new(Semaphore::new(OPENING));
        for _ in self.live[guest]..connections {
            let (outbound, places) = (self.outbound[guest], Arc::clone(&places));
            opening.spawn(async move {
                let _place = places.acquire_owned().await?;
                open(outbound).await
            });
        }
        while let Some(opened) = opening.join_next().await {
            let mut client = opened??;
            self.live[guest] += 1;
            let ended = self.ended.clone();
            self.watching.spawn(async move {
                // Nobody says anything: what comes is the end.
                let _ = client.read(&mut [0]).await;
                // Who waits may have given up.
                let _ = ended.send(Ended { guest, at: Instant::now() });
            });
        }
        Ok(())
    }
}

/// Opens a connection, and hears from the application at its other end.
async fn open(outbound: SocketAddr) -> anyhow::Result<TcpStream> {
    let opening = async {
        let mut client = TcpStream::connect(outbound).await?;
        client.write_all(b"!").await?;
        client.read_exact(&mut [0]).await?;
        Ok::<_, std::io::Error>(client)
    };
    Ok(timeout(OPEN_LIMIT, opening).await.context("a connection is not opened")??)
}

/// The application: says back what it hears, until its own input ends. Tells first where it listens.
///
/// # Errors
///
/// No port is free, or nobody reads what it tells.
pub async fn serve() -> anyhow::Result<()> {
    let listener = TcpListener::bind(local(0)).await?;
    println!("{}", listener.local_addr()?);
    let mut connections = JoinSet::new();
    let mut input = tokio::io::stdin();
    let mut byte = [0];
    let mut over = std::pin::pin!(input.read(&mut byte));
    loop {
        tokio::select! {
            _ = &mut over => return Ok(()),
            accepted = listener.accept() => {
                let (mut stream, _) = accepted?;
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

/// The application as a process of its own, which ends with this one: a process may open only so many files.
async fn start_app() -> anyhow::Result<(SocketAddr, Child)> {
    let program = programs::built_one("weft-crowd")?;
    let mut command = Command::new(program);
    command.arg("--serve").stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut app = command.spawn().context("the application does not start")?;
    let output = app.stdout.take().context("the application has no output")?;
    let mut line = String::new();
    timeout(OPEN_LIMIT, BufReader::new(output).read_line(&mut line))
        .await
        .context("the application says nothing")??;
    Ok((line.trim().parse()?, app))
}

/// The policy that lets these guests connect.
fn policy(allowed: [bool; GUESTS.len()]) -> String {
    let rules = GUESTS.iter().zip(allowed).filter(|(_, allowed)| *allowed).map(|(guest, _)| {
        format!("\n  - {{ name: {guest}, action: allow, from: {{ services: [default/{guest}] }}, ports: [{PORT}] }}")
    });
    let rules: String = rules.collect();
    let rules = if rules.is_empty() { " []".to_owned() } else { rules };
    format!("kind: SecurityPolicy\nscope: default/crowd\ndefault: deny\nrules:{rules}\n")
}

/// A mesh of its own, with so many connections and so many changes.
///
/// # Errors
///
/// The mesh does not start, or a connection that is allowed is not opened.
pub async fn run(plan: Plan) -> anyhow::Result<Outcome> {
    raise_open_files()?;
    let dir = tempfile::Builder::new().prefix("weft-crowd-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let programs = programs::built()?;
    let mut mesh = Mesh::open(&dir.path().join("home"), &programs, None).await?;
    mesh.start().await?;
    let (address, app) = start_app().await?;
    let (mut crowd, sidecars, ended) = join(&mesh, &programs.proxy, address).await?;
    let outcome = flip(&mesh, &mut crowd, ended, plan).await;
    drop(crowd);
    drop(app);
    for sidecar in sidecars {
        sidecar.stop().await?;
    }
    mesh.stop().await?;
    outcome
}

async fn join(
    mesh: &Mesh,
    weft_proxy: &Path,
    app: SocketAddr,
) -> anyhow::Result<(Crowd, Vec<OwnSidecar>, mpsc::UnboundedReceiver<Ended>)> {
    let service = |name: &str| {
        format!("kind: Service\nname: default/{name}\nports: [{{ name: any, port: {PORT} }}]\n---\n")
    };
    let services: String = GUESTS.iter().chain(&["crowd"]).map(|name| service(name)).collect();
    let said = mesh.weft.apply(&(services + &policy([true; GUESTS.len()]))).await?;
    ensure!(said.status == Some(0), "{said}");
    let before = Place::Before { port: PORT, app };
    let mut sidecars = Vec::new();
    for instance in INSTANCES {
        let instance = format!("default/crowd/{instance}");
        sidecars.push(OwnSidecar::start(mesh, weft_proxy, &instance, &before).await?);
    }
    let mut outbound = Vec::new();
    for guest in GUESTS {
        let listen = local(reserve_loopback_port()?);
        let towards = Place::Towards { upstream: format!("default/crowd:{PORT}"), listen };
        let instance = format!("default/{guest}/{guest}-1");
        sidecars.push(OwnSidecar::start(mesh, weft_proxy, &instance, &towards).await?);
        outbound.push(listen);
    }
    let (tell, ended) = mpsc::unbounded_channel();
    let crowd = Crowd { outbound, ended: tell, watching: JoinSet::new(), live: [0; GUESTS.len()] };
    Ok((crowd, sidecars, ended))
}

async fn flip(
    mesh: &Mesh,
    crowd: &mut Crowd,
    mut ended: mpsc::UnboundedReceiver<Ended>,
    plan: Plan,
) -> anyhow::Result<Outcome> {
    let each = plan.connections.div_ceil(GUESTS.len());
    let mut rng = SmallRng::seed_from_u64(plan.seed);
    let mut outcome = Outcome::default();
    let mut allowed = [true; GUESTS.len()];
    for guest in 0..GUESTS.len() {
        crate::wait::until("the first connection", SURVIVED, async || open(crowd.outbound[guest]).await)
            .await?;
    }
    for flip in 0..plan.flips {
        for (guest, _) in allowed.iter().enumerate().filter(|(_, allowed)| **allowed) {
            crowd.fill(guest, each).await.with_context(|| format!("connections before change {flip}"))?;
        }
        eprintln!("change {flip}: {} live", crowd.live.iter().sum::<usize>());
        let before = allowed;
        while allowed == before {
            allowed = rng.random();
        }
        let said = mesh.weft.apply(&policy(allowed)).await?;
        ensure!(said.status == Some(0), "{said}");
        let acknowledged = Instant::now();
        let mut left: usize =
            (0..GUESTS.len()).filter(|guest| !allowed[*guest]).map(|guest| crowd.live[guest]).sum();
        let mut until = acknowledged + if left == 0 { QUIET } else { SURVIVED };
        while let Ok(Some(Ended { guest, at })) = timeout_at(until, ended.recv()).await {
            crowd.live[guest] -= 1;
            if allowed[guest] {
                outcome.wrong_cuts += 1;
                continue;
            }
            outcome.cut_after.push(at.saturating_duration_since(acknowledged));
            left -= 1;
            if left == 0 {
                until = Instant::now() + QUIET;
            }
        }
        outcome.survivors += left;
        // New connections are let in once the sidecar before the app has heard of the change.
        let reachable = (0..GUESTS.len()).filter(|guest| allowed[*guest] && !before[*guest]);
        for guest in reachable {
            crate::wait::until("a guest to be let in again", SURVIVED, async || {
                open(crowd.outbound[guest]).await
            })
            .await?;
        }
    }
    outcome.cut_after.sort_unstable();
    Ok(outcome)
}

/// As many files as the system allows may this process open, and those that it starts.
fn raise_open_files() -> anyhow::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}
