//! A simulated sidecar: who it is, and its session of the moment.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use weft_client::{ALPN, command, retry};
use weft_identity::credential::Credential;
use weft_identity::tls::{ExpectedPeer, ResumingClient, TlsIdentity};
use weft_model::InstanceId;
use weft_proto::v1;
use weft_proto::v1::mesh_client::MeshClient;

use crate::error::FleetError;
use crate::line::{Line, Session};

/// Who a sidecar is, and how it shows that.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) tls: TlsIdentity,
    pub(crate) client: ResumingClient,
}

#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) index: usize,
    /// Whether the target service is among its upstreams.
    pub(crate) interested: bool,
    pub(crate) instance: InstanceId,
    registration: v1::RegisterInstance,
    identity: OnceLock<Identity>,
    line: Arc<Line>,
    session: Mutex<Option<Session>>,
    revision: AtomicU64,
    /// Its health as everybody saw it last, as the wire writes it.
    pub(crate) seen: AtomicI32,
}

/// The number of a sidecar's first report: by the clock, as real ones number theirs, so above those of an earlier fleet of the same
/// names.
#[expect(clippy::disallowed_methods, reason = "what was reported before is told by the clock alone")]
fn first_revision() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_micros()).unwrap_or_default()
}

impl Member {
    pub(crate) fn new(
        index: usize,
        interested: bool,
        registration: v1::RegisterInstance,
        line: Arc<Line>,
    ) -> Result<Self, FleetError> {
        let instance = registration.instance.parse();
        let instance = instance.map_err(|error| FleetError::Plan(format!("an instance's name: {error}")))?;
        Ok(Self {
            index,
            interested,
            instance,
            registration,
            identity: OnceLock::new(),
            line,
            session: Mutex::default(),
            revision: AtomicU64::new(first_revision()),
            seen: AtomicI32::new(v1::Health::Healthy.into()),
        })
    }

    pub(crate) fn registration(&self) -> v1::RegisterInstance {
        self.registration.clone()
    }

    /// Takes the identity that it was given, once.
    pub(crate) fn become_somebody(&self, credential: Credential) {
        let tls = TlsIdentity::new(credential);
        let client = tls.resuming_client(ExpectedPeer::Controller, ALPN);
        // It enrolls once.
        let _ = self.identity.set(Identity { tls, client });
    }

    fn identity(&self) -> Result<&Identity, FleetError> {
        let nobody = || FleetError::Identity(format!("{} has not joined", self.instance));
        self.identity.get().ok_or_else(nobody)
    }

    /// Lets its next handshake be a whole one.
    pub(crate) fn forget_tickets(&self) {
        if let Some(identity) = self.identity.get() {
            identity.client.forget();
        }
    }

    /// The session of the moment, or a new one if that is the one that broke.
    pub(crate) async fn session(&self, broken: Option<&Session>) -> Result<Session, FleetError> {
        let current = self.session.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let broken = broken.map(|session| session.number);
        if let Some(current) = current.filter(|current| Some(current.number) != broken) {
            return Ok(current);
        }
        let after = broken.unwrap_or_default();
        let opened = Box::pin(self.line.session(self.index, self.identity()?, after)).await;
        let opened = opened.map_err(FleetError::of("connecting"))?;
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(opened.clone());
        Ok(opened)
    }

    /// Lets go of the session, so that its connection ends with that of the others on it.
    pub(crate) fn hang_up(&self) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The same, and ends its connection for all on it.
    pub(crate) async fn leave_line(&self) {
        self.hang_up();
        self.line.close().await;
    }

    pub(crate) async fn register(&self) -> Result<v1::ApplyResponse, FleetError> {
        let mesh = MeshClient::new(self.session(None).await?.channel);
        let request = v1::RegisterInstanceRequest {
            meta: Some(command("a simulated sidecar connects")),
            expected: None,
            registration: Some(self.registration.clone()),
        };
        let registered = retry(|| {
            let (mut mesh, request) = (mesh.clone(), request.clone());
            async move { mesh.register_instance(request).await }
        });
        registered.await.map_err(FleetError::of("registering"))
    }

    pub(crate) async fn report(&self, health: v1::Health) -> Result<v1::ApplyResponse, FleetError> {
        let mesh = MeshClient::new(self.session(None).await?.channel);
        let request = v1::ReportHealthRequest {
            meta: Some(command("a simulated sidecar observes")),
            instance: self.instance.to_string(),
            health: health.into(),
            revision: self.revision.fetch_add(1, Ordering::Relaxed),
            doubt: 0,
            detail: String::new(),
        };
        let reported = retry(|| {
            let (mut mesh, request) = (mesh.clone(), request.clone());
            async move { mesh.report_health(request).await }
        });
        reported.await.map_err(FleetError::of("reporting health"))
    }
}
