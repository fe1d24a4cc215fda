//! Controllers as processes, and clients that change things through them.

use anyhow::Context;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use uuid::Uuid;
use weft_client::{ALPN, CallError, ControllerAddress, command};
use weft_identity::credential::Credential;
use weft_identity::tls::{ExpectedPeer, TlsIdentity};
use weft_proto::v1 as pb;
use weft_proto::v1::mesh_client::MeshClient;

use crate::journal::{Event, Verdict};
use crate::phase::PROGRESS_MAX;

/// How long a client waits for one answer before it asks another controller.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Lines of a controller's log that are shown when it ended by itself.
const LAST_WORDS: usize = 5;

/// How a controller is run.
#[derive(Clone, Debug)]
pub(crate) struct Controller {
    pub(crate) program: PathBuf,
    pub(crate) name: String,
    /// Several share it, and with it the certificate authority.
    pub(crate) state: PathBuf,
    pub(crate) url: String,
    pub(crate) port: u16,
    pub(crate) admin_port: u16,
}

impl Controller {
    /// One on free ports.
    pub(crate) fn new(program: &Path, name: &str, state: &Path, url: String) -> anyhow::Result<Self> {
        Ok(Self {
            program: program.to_owned(),
            name: name.to_owned(),
            state: state.to_owned(),
            url,
            port: weft_pgserver::reserve_loopback_port()?,
            admin_port: weft_pgserver::reserve_loopback_port()?,
        })
    }

    pub(crate) fn spawn(&self) -> anyhow::Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(["--name", &self.name]).arg("--state-dir").arg(&self.state);
        command.env("WEFT_DATABASE_URL", &self.url);
        command.args(["--listen", &format!("127.0.0.1:{}", self.port)]);
        command.args(["--admin-listen", &format!("127.0.0.1:{}", self.admin_port)]);
        let log = File::options().create(true).append(true).open(self.log())?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).kill_on_drop(true);
        command.spawn().context("the controller cannot be started")
    }

    fn log(&self) -> PathBuf {
        self.state.join(format!("{}.log", self.name))
    }

    /// The last lines of its log.
    pub(crate) fn last_words(&self) -> String {
        weft_pgserver::log::tail(&self.log(), LAST_WORDS)
    }

    /// Waits until it listens.
    pub(crate) async fn listens(&self, child: &mut Child) -> anyhow::Result<()> {
        let listens = async {
            while TcpStream::connect(("127.0.0.1", self.port)).await.is_err() {
                anyhow::ensure!(child.try_wait()?.is_none(), "the controller ended instead of starting");
                sleep(Duration::from_millis(10)).await;
            }
            anyhow::Ok(())
        };
        timeout(PROGRESS_MAX, listens).await.context("the controller does not listen")?
    }

    /// Waits until it serves. Before that it listens already, and whoever connects waits.
    pub(crate) async fn serves(&self, child: &mut Child) -> anyhow::Result<()> {
        let serves = async {
            while !self.is_ready().await.unwrap_or(false) {
                anyhow::ensure!(child.try_wait()?.is_none(), "the controller ended instead of starting");
                sleep(Duration::from_millis(10)).await;
            }
            anyhow::Ok(())
        };
        timeout(PROGRESS_MAX, serves).await.context("the controller does not serve")?
    }

    async fn is_ready(&self) -> std::io::Result<bool> {
        let mut admin = TcpStream::connect(("127.0.0.1", self.admin_port)).await?;
        admin.write_all(b"GET /ready HTTP/1.0\r\n\r\n").await?;
        let mut status = [0; b"HTTP/1.0 200".len()];
        admin.read_exact(&mut status).await?;
        Ok(status.ends_with(b" 200"))
    }

    /// Waits until it has issued the admin credential, which it does after it listens.
    pub(crate) async fn admin(&self) -> anyhow::Result<TlsIdentity> {
        let dir = self.state.join("operator/admin");
        let issued = async {
            loop {
                match Credential::load(&dir) {
                    Ok(credential) => return TlsIdentity::new(credential),
                    Err(_) => sleep(Duration::from_millis(20)).await,
                }
            }
        };
        timeout(PROGRESS_MAX, issued).await.context("the controller issues no credential")
    }

    pub(crate) fn address(&self) -> anyhow::Result<ControllerAddress> {
        Ok(format!("127.0.0.1:{}", self.port).parse()?)
    }
}

/// A channel to these controllers in somebody's name.
pub(crate) fn channel(controllers: &[ControllerAddress], who: &TlsIdentity) -> Channel {
    weft_client::channel(controllers.to_vec(), who.client_config(ExpectedPeer::Controller, ALPN))
}

/// What clients were told: of each command its position, and how often an answer was wrong.
#[derive(Debug, Default)]
pub(crate) struct Told {
    positions: Mutex<BTreeMap<Uuid, u64>>,
    wrong: AtomicU64,
}

impl Told {
    /// How many commands were acknowledged.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.positions.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    /// Holds the log against it.
    pub(crate) fn judge(&self, log: &[Event]) -> Verdict {
        let mut verdict = Verdict { wrong_outcomes: self.wrong.load(Ordering::SeqCst), ..Verdict::default() };
        let mut of_command: BTreeMap<Uuid, Vec<u64>> = BTreeMap::new();
        for event in log {
            of_command.entry(event.command).or_default().push(event.position);
        }
        for (id, position) in &*self.positions.lock().unwrap_or_else(PoisonError::into_inner) {
            match of_command.get(id).map(Vec::as_slice) {
                Some([recorded]) => verdict.wrong_outcomes += u64::from(recorded != position),
                Some(_) => verdict.doubled += 1,
                None => verdict.lost += 1,
            }
        }
        verdict
    }
}

/// Declares its service with another port each time.
pub(crate) struct Client {
    /// To the same controllers, each beginning with another one.
    pub(crate) channels: Vec<Channel>,
    pub(crate) service: String,
    pub(crate) told: Arc<Told>,
    /// Between two changes.
    pub(crate) pause: Duration,
}

impl Client {
    pub(crate) async fn run(mut self, ending: Arc<AtomicBool>) {
        let mut port = 1_000;
        while !ending.load(Ordering::SeqCst) {
            port = if port < 60_000 { port + 1 } else { 1_000 };
            let request = declaration(&self.service, port);
            let Some(first) = self.insist(&request).await else { continue };
            // Asked again, it is told the same.
            if port % 5 == 0 && self.insist(&request).await != Some(first) {
                self.told.wrong.fetch_add(1, Ordering::SeqCst);
            }
            sleep(self.pause).await;
        }
    }

    /// Asks until somebody answers; the position that it was told. None if it was refused, which nothing here deserves.
    pub(crate) async fn insist(&mut self, request: &pb::ApplyRequest) -> Option<u64> {
        loop {
            let mut mesh = MeshClient::new(self.channels.first()?.clone());
            match timeout(ANSWER_MAX, mesh.apply(request.clone())).await {
                Ok(Ok(response)) => {
                    let position = response.into_inner().version.map(|version| version.position)?;
                    let id = request.meta.as_ref()?.command_id.parse().ok()?;
                    self.told.positions.lock().unwrap_or_else(PoisonError::into_inner).insert(id, position);
                    return Some(position);
                }
                Ok(Err(status)) => {
                    let error = CallError::from(status);
                    if !error.is_transient() {
                        crate::say(&format!("a client was refused: {error}"));
                        self.told.wrong.fetch_add(1, Ordering::SeqCst);
                        return None;
                    }
                    sleep(Duration::from_millis(20)).await;
                }
                // A controller that is paused takes connections and does not answer.
                Err(_) => {}
            }
            self.channels.rotate_left(1);
        }
    }
}

/// Declares a service that has this port.
pub(crate) fn declaration(service: &str, port: u32) -> pb::ApplyRequest {
    let declared = pb::DeclareService {
        name: service.to_owned(),
        ports: vec![pb::ServicePort { name: "main".into(), port }],
        address: String::new(),
    };
    let change = pb::change::Change::DeclareService(declared);
    pb::ApplyRequest {
        meta: Some(command("torture")),
        changes: vec![pb::Change { expected: None, change: Some(change) }],
        ..pb::ApplyRequest::default()
    }
}
