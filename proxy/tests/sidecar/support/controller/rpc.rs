//! The controller's gRPC services.

use super::{Call, Inner, model_version, now, wire_version};
use futures_util::{Stream, StreamExt, stream};
use prost::Message;
use rustls_pki_types::CertificateDer;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Code, Request, Response, Status};
use weft_identity::ca::LEAF_LIFETIME;
use weft_identity::certificate::PeerIdentity;
use weft_identity::public_key::PublicKey;
use weft_identity::spiffe::Subject;
use weft_identity::tls::{ClientAuth, ExpectedPeer, TlsIdentity, peer_identity};
use weft_model::health::{Health, HealthCommand, HealthReported};
use weft_model::membership::{InstanceRegistered, MembershipCommand, Upstreams};
use weft_model::{Command, InstanceId, Port, Rejection, ServiceName};
use weft_proto::v1;
use weft_proto::v1::discovery_server::{Discovery, DiscoveryServer};
use weft_proto::v1::identity_server::{Identity, IdentityServer};
use weft_proto::v1::mesh_server::{Mesh, MeshServer};

/// Serves connections of the listener, for ever.
pub(super) async fn serve(inner: Arc<Inner>, listener: std::net::TcpListener) {
    listener.set_nonblocking(true).unwrap();
    let listener = TcpListener::from_std(listener).unwrap();
    let subject = Subject::Controller("c1".parse().unwrap());
    let credential = inner.ca.issue_credential(&subject, now(), LEAF_LIFETIME).unwrap();
    let tls = TlsIdentity::new(credential).server_config(ClientAuth::Optional, ExpectedPeer::Any, &[b"h2"]);
    let acceptor = TlsAcceptor::from(tls);
    let incoming = stream::unfold(listener, move |listener| {
        let acceptor = acceptor.clone();
        async move {
            let accepted = listener.accept().await.map(|(stream, _)| stream);
            let secured = async move { acceptor.accept(accepted?).await.map(Secured) };
            Some((secured, listener))
        }
    })
    .buffer_unordered(16)
    .filter(|secured: &std::io::Result<Secured>| std::future::ready(secured.is_ok()));
    Server::builder()
        .add_service(IdentityServer::new(Api(Arc::clone(&inner))))
        .add_service(DiscoveryServer::new(Api(Arc::clone(&inner))))
        .add_service(MeshServer::new(Api(inner)))
        .serve_with_incoming(Box::pin(incoming))
        .await
        .unwrap();
}

/// The services; streams keep a share of it beyond the call.
struct Api(Arc<Inner>);

impl Deref for Api {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

/// A connection that knows who is at its other end.
struct Secured(TlsStream<TcpStream>);

#[derive(Clone)]
struct Peer(Option<InstanceId>);

impl Connected for Secured {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        let peer = peer_identity(self.0.get_ref().1.peer_certificates()).unwrap();
        Peer(peer.and_then(|peer| peer.id.as_instance().cloned()))
    }
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

fn caller<T>(request: &Request<T>) -> Result<InstanceId, Status> {
    let peer = request.extensions().get::<Peer>().and_then(|peer| peer.0.clone());
    peer.ok_or_else(|| Status::unauthenticated("no certificate"))
}

fn answer(inner: &Inner, command: Command) -> Result<Response<v1::ApplyResponse>, Status> {
    match inner.commit(command) {
        Ok(version) => {
            let version = Some(wire_version(version));
            Ok(Response::new(v1::ApplyResponse { version, outcomes: Vec::new(), repeated: false }))
        }
        Err(refused) => {
            let mut rejected = v1::Rejected { scope: refused.scope.to_string(), ..v1::Rejected::default() };
            match &*refused.rejection {
                Rejection::StaleObservation { current } => rejected.current_revision = *current,
                Rejection::NotAdmitted { by, .. } => rejected.rule.clone_from(by),
                _ => {}
            }
            let detail =
                v1::ErrorDetail { change: None, detail: Some(v1::error_detail::Detail::Rejected(rejected)) };
            let details = detail.encode_to_vec().into();
            Err(Status::with_details(Code::FailedPrecondition, refused.to_string(), details))
        }
    }
}

impl Inner {
    fn leaf(&self, instance: &InstanceId, csr: &[u8]) -> Result<Response<v1::LeafResponse>, Status> {
        let key = PublicKey::from_csr(csr).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let lifetime = self.state().leaf_lifetime;
        let leaf = self.ca.issue_leaf(&Subject::Instance(instance.clone()), &key, now(), lifetime).unwrap();
        Ok(Response::new(v1::LeafResponse {
            chain: vec![leaf.certificate.to_vec().into()],
            roots: vec![self.ca.root().to_vec().into()],
            not_after_ms: leaf.identity.not_after.0,
        }))
    }

    pub(super) fn notice(&self, instance: &InstanceId) -> v1::Notice {
        let mut state = self.state();
        let wanted = match state.forged.get(instance) {
            Some(forged) => forged.header.clone(),
            None => state.header(instance),
        };
        let head = Some(wire_version(state.projection.version()));
        let heartbeat_ms = state.heartbeat.as_millis().try_into().unwrap();
        let witness = state.witness.clone().into();
        let patch = state.patch.clone();
        let fresh = v1::Notice { wanted, head, heartbeat_ms, witness, patch, ..v1::Notice::default() };
        match state.frozen.get_mut(instance) {
            Some(told) => told.get_or_insert(fresh).clone(),
            None => fresh,
        }
    }
}

#[tonic::async_trait]
impl Identity for Api {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::LeafResponse>, Status> {
        let request = request.into_inner();
        let owner = self.state().tokens.remove(&request.token);
        let instance = owner.ok_or_else(|| Status::permission_denied("the token was used already"))?;
        if instance.to_string() != request.instance {
            return Err(Status::permission_denied(format!("the token is for {instance}")));
        }
        self.state().calls.push(Call::Joined(instance.clone()));
        self.leaf(&instance, &request.csr)
    }

    async fn introduce(
        &self,
        _: Request<v1::IntroduceRequest>,
    ) -> Result<Response<v1::IntroduceResponse>, Status> {
        Err(Status::unimplemented("a sidecar has a connection of its own"))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::LeafResponse>, Status> {
        if self.state().refuse_renewals {
            return Err(Status::permission_denied("not now"));
        }
        let caller = caller(&request);
        let request = request.into_inner();
        // Whether the ended leaf and the key belong together is the real controller's business.
        let instance =
            match PeerIdentity::from_certificate(&CertificateDer::from(request.ended_leaf.to_vec())) {
                Ok(ended) => ended.id.as_instance().cloned().unwrap(),
                Err(_) => caller?,
            };
        let leaf = self.leaf(&instance, &request.csr)?;
        self.state().calls.push(Call::Renewed(instance));
        Ok(leaf)
    }
}

type Notices = Pin<Box<dyn Stream<Item = Result<v1::Notice, Status>> + Send>>;

#[tonic::async_trait]
impl Discovery for Api {
    type SubscribeStream = Notices;

    async fn subscribe(&self, request: Request<v1::SubscribeRequest>) -> Result<Response<Notices>, Status> {
        let instance = caller(&request)?;
        let shown = request.into_inner().witness;
        self.state().calls.push(Call::Subscribed(instance.clone()));
        self.state().shown.push(shown.to_vec());
        if self.state().rewound && !shown.is_empty() {
            return Err(Status::failed_precondition("LOG_REWOUND: event 1.9 was seen and is not in the log"));
        }
        if self.state().refuse_subscribers {
            return Err(Status::unavailable("not yet"));
        }
        let inner = Arc::clone(&self.0);
        let mut changes = inner.changes.subscribe();
        changes.mark_changed();
        let opened = inner.state().streams;
        let notices = stream::unfold(
            (inner, changes, instance),
            move |(inner, mut changes, instance): (Arc<Inner>, watch::Receiver<u64>, _)| async move {
                let heartbeat: Duration = inner.state().heartbeat;
                tokio::select! {
                    _ = changes.changed() => {}
                    () = tokio::time::sleep(heartbeat) => {}
                }
                while inner.state().silent {
                    changes.changed().await.ok()?;
                }
                if inner.state().streams != opened {
                    return None;
                }
                let notice = inner.notice(&instance);
                Some((Ok(notice), (inner, changes, instance)))
            },
        );
        Ok(Response::new(Box::pin(notices)))
    }

    async fn pull(&self, request: Request<v1::PullRequest>) -> Result<Response<v1::PullResponse>, Status> {
        let instance = caller(&request)?;
        let mut state = self.state();
        state.calls.push(Call::Pulled(instance.clone()));
        if state.overloaded > 0 {
            state.overloaded -= 1;
            return Err(Status::resource_exhausted("too many pulls"));
        }
        if let Some(forged) = state.forged.get(&instance) {
            return Ok(Response::new(forged.clone()));
        }
        let have = request.into_inner().have.map(|have| have.manifest_hash);
        let pulled = state.pull(&instance, have.as_deref());
        pulled.map(Response::new).ok_or_else(|| Status::not_found("not registered"))
    }

    async fn ack(&self, request: Request<v1::AckRequest>) -> Result<Response<v1::AckResponse>, Status> {
        let instance = caller(&request)?;
        let ack = request.into_inner();
        let version = ack.applied.and_then(|applied| applied.version).map(|version| model_version(&version));
        self.state().calls.push(Call::Acked(instance, version.unwrap_or_default(), ack.error));
        Ok(Response::new(v1::AckResponse {}))
    }
}

type LogBatches = Pin<Box<dyn Stream<Item = Result<v1::LogBatch, Status>> + Send>>;

fn unscripted<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("no sidecar calls this"))
}

#[tonic::async_trait]
impl Mesh for Api {
    type ReadLogStream = LogBatches;

    async fn register_instance(
        &self,
        request: Request<v1::RegisterInstanceRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        let instance = caller(&request)?;
        if self.state().rewound {
            return Err(Status::failed_precondition("LOG_REWOUND: nothing is appended"));
        }
        let wanted = request.into_inner().registration.unwrap();
        let registered = InstanceRegistered {
            address: wanted.address.parse().unwrap(),
            port: Port::new(wanted.port.try_into().unwrap()).unwrap(),
            upstreams: if wanted.all_upstreams {
                Upstreams::All
            } else {
                Upstreams::Only(wanted.upstreams.iter().map(|name| name.parse().unwrap()).collect())
            },
            metadata: wanted.metadata.into_iter().collect(),
        };
        self.state().calls.push(Call::Registered(instance.clone()));
        answer(self, Command::Membership(instance, MembershipCommand::Register(registered)))
    }

    async fn add_upstream(
        &self,
        request: Request<v1::AddUpstreamRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        let instance = caller(&request)?;
        let v1::AddUpstreamRequest { service, port, .. } = request.into_inner();
        let (service, port): (ServiceName, _) = (service.parse().unwrap(), port.try_into().unwrap());
        self.state().calls.push(Call::UpstreamAsked(instance.clone(), service.clone()));
        let command = MembershipCommand::AddUpstream { service, port: Port::new(port).unwrap() };
        answer(self, Command::Membership(instance, command))
    }

    async fn drain_instance(
        &self,
        request: Request<v1::DrainInstanceRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        let instance = caller(&request)?;
        self.state().calls.push(Call::Drained(instance.clone()));
        answer(self, Command::Membership(instance, MembershipCommand::Drain))
    }

    async fn deregister_instance(
        &self,
        request: Request<v1::DeregisterInstanceRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        let instance = caller(&request)?;
        self.state().calls.push(Call::Deregistered(instance.clone()));
        answer(self, Command::Membership(instance, MembershipCommand::Deregister))
    }

    async fn report_health(
        &self,
        request: Request<v1::ReportHealthRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        let instance = caller(&request)?;
        let report = request.into_inner();
        let health = match report.health() {
            v1::Health::Healthy => Health::Healthy,
            v1::Health::Unhealthy => Health::Unhealthy,
            v1::Health::Unknown => Health::Unknown,
        };
        let (revision, doubt) = (report.revision, u8::try_from(report.doubt).ok());
        let reported = HealthReported { health, revision, doubt, detail: report.detail };
        let answered = answer(self, Command::Health(instance.clone(), HealthCommand::Report(reported)))?;
        self.state().calls.push(Call::Health(instance, health, report.revision));
        Ok(answered)
    }

    async fn apply(&self, _: Request<v1::ApplyRequest>) -> Result<Response<v1::ApplyResponse>, Status> {
        unscripted()
    }

    async fn advance_rollout(
        &self,
        _: Request<v1::EndRolloutRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        unscripted()
    }

    async fn abort_rollout(
        &self,
        _: Request<v1::EndRolloutRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        unscripted()
    }

    async fn get_rollout(
        &self,
        _: Request<v1::GetRolloutRequest>,
    ) -> Result<Response<v1::GetRolloutResponse>, Status> {
        unscripted()
    }

    async fn put_traffic_policy(
        &self,
        _: Request<v1::PutTrafficPolicyRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        unscripted()
    }

    async fn put_security_policy(
        &self,
        _: Request<v1::PutSecurityPolicyRequest>,
    ) -> Result<Response<v1::ApplyResponse>, Status> {
        unscripted()
    }

    async fn create_join_token(
        &self,
        _: Request<v1::CreateJoinTokenRequest>,
    ) -> Result<Response<v1::CreateJoinTokenResponse>, Status> {
        unscripted()
    }

    async fn get(&self, _: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        unscripted()
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        unscripted()
    }

    async fn why(&self, _: Request<v1::WhyRequest>) -> Result<Response<v1::WhyResponse>, Status> {
        unscripted()
    }

    async fn adopt_history(
        &self,
        _: Request<v1::AdoptHistoryRequest>,
    ) -> Result<Response<v1::AdoptHistoryResponse>, Status> {
        unscripted()
    }

    async fn read_log(&self, _: Request<v1::ReadLogRequest>) -> Result<Response<LogBatches>, Status> {
        unscripted()
    }
}
