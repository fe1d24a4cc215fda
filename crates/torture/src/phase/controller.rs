//! The controller itself is killed, while clients change things through it and its projector writes.

use anyhow::Context;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use uuid::Uuid;
use weft_client::{ALPN, CallError, ControllerAddress, command};
use weft_eventlog::Reader;
use weft_identity::credential::Credential;
use weft_identity::tls::{ExpectedPeer, TlsIdentity};
use weft_projector::Store;
use weft_proto::v1 as pb;
use weft_proto::v1::mesh_client::MeshClient;

use super::{Findings, PROGRESS_MAX, verify};
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

/// What each command was told: its position, and whether it was told so twice.
type Told = Arc<Mutex<BTreeMap<Uuid, u64>>>;

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
    let process = Process {
        program,
        state: state.path(),
        url: server.url_through(proxy.port(), "controller")?,
        port: weft_pgserver::reserve_loopback_port()?,
        admin_port: weft_pgserver::reserve_loopback_port()?,
    };
    let poller = Poller::start(direct.clone());
    let mut running = process.start(&proxy).await?;
    let (told, ending, wrong) =
        (Told::default(), Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let channel = process.channel().await?;
    let mut clients = JoinSet::new();
    for n in 0..CLIENTS {
        let client = Client {
            mesh: MeshClient::new(channel.clone()),
            service: format!("default/torture-{n}"),
            told: Arc::clone(&told),
            wrong: Arc::clone(&wrong),
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
        running = process.start(&proxy).await?;
    }
    ending.store(true, Ordering::SeqCst);
    timeout(PROGRESS_MAX, async { while clients.join_next().await.is_some() {} }).await?;

    let log = read_all(&direct).await?;
    let told = std::mem::take(&mut *told.lock().unwrap_or_else(PoisonError::into_inner));
    let mut of_command: BTreeMap<Uuid, Vec<u64>> = BTreeMap::new();
    for event in &log {
        of_command.entry(event.command).or_default().push(event.position);
    }
    for (id, position) in &told {
        match of_command.get(id).map(Vec::as_slice) {
            Some([recorded]) => findings.verdict.wrong_outcomes += u64::from(recorded != position),
            Some(_) => findings.verdict.doubled += 1,
            None => findings.verdict.lost += 1,
        }
    }
    findings.verdict.wrong_outcomes += wrong.load(Ordering::SeqCst);
    projected(&direct, findings).await?;
    let _ = running.kill().await;
    let polled = poller.end().await;
    findings.verdict.skipped += skipped(&log, &polled);
    findings.acknowledged += told.len() as u64;
    findings.events += log.len() as u64;
    verify(&direct, findings).await
}

/// Waits until the rows cover the log, and compares them with a fold of it.
async fn projected(url: &str, findings: &mut Findings) -> anyhow::Result<()> {
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

struct Process<'a> {
    program: &'a Path,
    state: &'a Path,
    url: String,
    port: u16,
    admin_port: u16,
}

impl Process<'_> {
    /// Starts the controller and waits until it listens.
    async fn start(&self, proxy: &Proxy) -> anyhow::Result<Child> {
        let mut command = Command::new(self.program);
        command.arg("--state-dir").arg(self.state).env("WEFT_DATABASE_URL", &self.url);
        command.args(["--listen", &format!("127.0.0.1:{}", self.port)]);
        command.args(["--admin-listen", &format!("127.0.0.1:{}", self.admin_port)]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        proxy.expect_process();
        let mut child = command.spawn().context("the controller cannot be started")?;
        proxy.guard(child.id().and_then(|id| i32::try_from(id).ok()).unwrap_or_default());
        let listens = async {
            while tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.is_err() {
                anyhow::ensure!(child.try_wait()?.is_none(), "the controller ended instead of starting");
                sleep(Duration::from_millis(10)).await;
            }
            anyhow::Ok(())
        };
        timeout(PROGRESS_MAX, listens).await.context("the controller does not listen")??;
        Ok(child)
    }

    async fn channel(&self) -> anyhow::Result<Channel> {
        let dir = self.state.join("operator/admin");
        let issued = async {
            loop {
                match Credential::load(&dir) {
                    Ok(credential) => return credential,
                    // It listens before it issues one.
                    Err(_) => sleep(Duration::from_millis(20)).await,
                }
            }
        };
        let credential =
            timeout(PROGRESS_MAX, issued).await.context("the controller issues no credential")?;
        let address: ControllerAddress = format!("127.0.0.1:{}", self.port).parse()?;
        let tls = TlsIdentity::new(credential).client_config(ExpectedPeer::Controller, ALPN);
        Ok(weft_client::channel(vec![address], tls))
    }
}

/// Declares its service with another port each time.
struct Client {
    mesh: MeshClient<Channel>,
    service: String,
    told: Told,
    wrong: Arc<AtomicU64>,
}

impl Client {
    async fn run(self, ending: Arc<AtomicBool>) {
        let mut port = 1_000;
        while !ending.load(Ordering::SeqCst) {
            port = if port < 60_000 { port + 1 } else { 1_000 };
            let request = self.request(port);
            let Some(first) = self.insist(&request).await else { continue };
            // Asked again, it is told the same.
            if port % 5 == 0 && self.insist(&request).await != Some(first) {
                self.wrong.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    fn request(&self, port: u32) -> pb::ApplyRequest {
        let declared = pb::DeclareService {
            name: self.service.clone(),
            ports: vec![pb::ServicePort { name: "main".into(), port }],
            address: String::new(),
        };
        let change = pb::change::Change::DeclareService(declared);
        pb::ApplyRequest {
            meta: Some(command("torture")),
            changes: vec![pb::Change { expected: None, change: Some(change) }],
            dry_run: false,
        }
    }

    /// Asks until somebody answers; the position that it was told. None if it was refused, which nothing here deserves.
    async fn insist(&self, request: &pb::ApplyRequest) -> Option<u64> {
        loop {
            let mut mesh = self.mesh.clone();
            match mesh.apply(request.clone()).await.map_err(CallError::from) {
                Ok(response) => {
                    let position = response.into_inner().version.map(|version| version.position)?;
                    let id = request.meta.as_ref()?.command_id.parse().ok()?;
                    self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(id, position);
                    return Some(position);
                }
                Err(error) if error.is_transient() => sleep(Duration::from_millis(20)).await,
                Err(error) => {
                    crate::say(&format!("a client was refused: {error}"));
                    self.wrong.fetch_add(1, Ordering::SeqCst);
                    return None;
                }
            }
        }
    }
}
