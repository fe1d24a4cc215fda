//! A mesh without sidecars: controllers on a database of their own, and clients with credentials.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tonic::transport::Channel;
use weft_api::Clock;
use weft_client::{ALPN, CallError, ControllerAddress, Relay, command};
use weft_controller::{Config, Controller, clock};
use weft_eventlog::Reader;
use weft_identity::ca::CertificateAuthority;
use weft_identity::credential::Credential;
use weft_identity::key::LeafKey;
use weft_identity::spiffe::{Role, Subject};
use weft_identity::tls::{ExpectedPeer, TlsIdentity, join_config};
use weft_identity::token::JoinToken;
use weft_model::Timestamp;
use weft_projector::Store;
use weft_proto::v1 as pb;
use weft_proto::v1::change::Change as Wire;
use weft_proto::v1::discovery_client::DiscoveryClient;
use weft_proto::v1::identity_client::IdentityClient;
use weft_proto::v1::mesh_client::MeshClient;
use weft_testkit::TestDatabase;

pub(crate) use weft_testkit::wait_until;

/// Longest wait for anything; reached only by a test that fails.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct TestMesh {
    pub(crate) database: TestDatabase,
    state: TempDir,
    ahead_ms: Arc<AtomicI64>,
    pub(crate) controller: Controller,
}

impl TestMesh {
    pub(crate) async fn start() -> Self {
        let database = TestDatabase::create().await;
        let state = tempfile::tempdir().unwrap();
        let ahead_ms = Arc::new(AtomicI64::new(0));
        let controller = controller("c1", &database, &state, &ahead_ms).await.unwrap();
        Self { database, state, ahead_ms, controller }
    }

    /// Another controller of the same mesh.
    pub(crate) async fn another(&self, name: &str) -> Controller {
        self.try_another(name).await.unwrap()
    }

    /// The same, if it can be started.
    pub(crate) async fn try_another(&self, name: &str) -> anyhow::Result<Controller> {
        controller(name, &self.database, &self.state, &self.ahead_ms).await
    }

    /// Ends the controller, lets something happen to its database, and starts another one in its place.
    pub(crate) async fn succeed(self, name: &str, meanwhile: impl AsyncFnOnce(&TestDatabase)) -> Self {
        let Self { database, state, ahead_ms, controller: former } = self;
        former.stop().await;
        meanwhile(&database).await;
        let controller = controller(name, &database, &state, &ahead_ms).await.unwrap();
        Self { database, state, ahead_ms, controller }
    }

    /// Sets the controllers' clock forward.
    pub(crate) fn advance(&self, by: Duration) {
        self.ahead_ms.fetch_add(by.as_millis().try_into().unwrap(), Ordering::Relaxed);
    }

    pub(crate) fn authority(&self) -> CertificateAuthority {
        CertificateAuthority::load(&self.state.path().join("ca")).unwrap()
    }

    pub(crate) fn admin(&self) -> MeshClient<Channel> {
        let dir: PathBuf = self.state.path().join("operator/admin");
        MeshClient::new(self.channel(Credential::load(&dir).unwrap()))
    }

    pub(crate) fn admin_at(&self, controller: &Controller) -> MeshClient<Channel> {
        let dir: PathBuf = self.state.path().join("operator/admin");
        MeshClient::new(channel_to(controller, Credential::load(&dir).unwrap()))
    }

    pub(crate) fn channel_at(&self, controller: &Controller, subject: &Subject) -> Channel {
        channel_to(controller, self.credential(subject))
    }

    pub(crate) fn operator(&self, role: Role) -> Channel {
        let subject = Subject::Operator { role, name: "tess".parse().unwrap() };
        self.channel(self.credential(&subject))
    }

    /// A sidecar's channel, with a leaf that the authority made without any token.
    pub(crate) fn sidecar(&self, instance: &str) -> Channel {
        self.channel(self.credential(&Subject::Instance(instance.parse().unwrap())))
    }

    pub(crate) fn credential(&self, subject: &Subject) -> Credential {
        self.authority().issue_credential(subject, clock::now(), Duration::from_secs(3600)).unwrap()
    }

    /// A relay's connection, with the leaf of an instance.
    pub(crate) async fn relay(&self, instance: &str) -> Relay {
        let credential = self.credential(&Subject::Instance(instance.parse().unwrap()));
        let tls = TlsIdentity::new(credential).client_config(ExpectedPeer::Controller, ALPN);
        Relay::connect(vec![address(&self.controller)], tls).await.unwrap()
    }

    pub(crate) fn channel(&self, credential: Credential) -> Channel {
        channel_to(&self.controller, credential)
    }

    /// A channel without a certificate.
    pub(crate) fn stranger(&self) -> Channel {
        let tls = join_config(self.authority().root_fingerprint(), ALPN);
        weft_client::channel(vec![address(&self.controller)], tls)
    }

    pub(crate) fn reader(&self) -> Reader {
        Reader::new(self.database.url().parse().unwrap())
    }

    pub(crate) fn store(&self) -> Store {
        Store::new(self.database.url()).unwrap()
    }

    /// Applies changes as admin and demands that it works.
    pub(crate) async fn apply(&self, changes: Vec<Wire>) -> pb::ApplyResponse {
        self.admin().apply(apply_request(changes)).await.unwrap().into_inner()
    }

    /// Declares services and registers an instance of each, which may connect to all.
    pub(crate) async fn declare(&self, services: &[&str]) -> pb::ApplyResponse {
        let declared = services.iter().map(|service| declare(service, 80));
        let registered = services.iter().map(|service| register(&format!("{service}/one"), 9000));
        self.apply(declared.chain(registered).collect()).await
    }

    pub(crate) async fn token(&self, service: &str) -> String {
        let request = pb::CreateJoinTokenRequest {
            meta: Some(command("test")),
            service: service.into(),
            instance: String::new(),
            ttl_seconds: 60,
        };
        self.admin().create_join_token(request).await.unwrap().into_inner().token
    }

    /// Waits until the rows cover the log.
    pub(crate) async fn projected(&self) {
        let (reader, store) = (self.reader(), self.store());
        wait_until("the projection to reach the head", LIMIT, async || {
            let head = reader.head().await.unwrap().position;
            store.checkpoint().await.unwrap().position == head
        })
        .await;
        store.close().await;
    }
}

async fn controller(
    name: &str,
    database: &TestDatabase,
    state: &TempDir,
    ahead: &Arc<AtomicI64>,
) -> anyhow::Result<Controller> {
    let config = Config {
        database_url: database.url().into(),
        listen: "127.0.0.1:0".parse().unwrap(),
        admin_listen: "127.0.0.1:0".parse().unwrap(),
        state_dir: state.path().into(),
        trust_domain: "weft.test".parse().unwrap(),
        name: name.parse().unwrap(),
        allow_unsafe_database: true,
    };
    let ahead = Arc::clone(ahead);
    let clock: Clock = Arc::new(move || Timestamp(clock::now().0 + ahead.load(Ordering::Relaxed)));
    Controller::start(config, clock, None).await
}

pub(crate) fn address(controller: &Controller) -> ControllerAddress {
    controller.address().to_string().parse().unwrap()
}

fn channel_to(controller: &Controller, credential: Credential) -> Channel {
    let tls = TlsIdentity::new(credential).client_config(ExpectedPeer::Controller, ALPN);
    weft_client::channel(vec![address(controller)], tls)
}

pub(crate) fn discovery(channel: Channel) -> DiscoveryClient<Channel> {
    DiscoveryClient::new(channel)
}

pub(crate) fn apply_request(changes: Vec<Wire>) -> pb::ApplyRequest {
    let change = |change| pb::Change { expected: None, change: Some(change) };
    pb::ApplyRequest {
        meta: Some(command("test")),
        changes: changes.into_iter().map(change).collect(),
        ..pb::ApplyRequest::default()
    }
}

pub(crate) fn declare(service: &str, port: u32) -> Wire {
    Wire::DeclareService(pb::DeclareService {
        name: service.into(),
        ports: vec![pb::ServicePort { name: "main".into(), port }],
        address: String::new(),
    })
}

pub(crate) fn registration(instance: &str, port: u32) -> pb::RegisterInstance {
    pb::RegisterInstance {
        instance: instance.into(),
        address: "127.0.0.1".into(),
        port,
        all_upstreams: true,
        ..pb::RegisterInstance::default()
    }
}

pub(crate) fn register(instance: &str, port: u32) -> Wire {
    Wire::RegisterInstance(registration(instance, port))
}

pub(crate) fn deny_all(scope: &str) -> Wire {
    let policy = pb::SecurityPolicy { default: pb::Action::Deny.into(), ..Default::default() };
    Wire::PutSecurityPolicy(pb::PutSecurityPolicy { scope: scope.into(), policy: Some(policy) })
}

pub(crate) fn allow_from(scope: &str, source: &str) -> Wire {
    let rule = pb::Rule {
        name: "allowed".into(),
        action: pb::Action::Allow.into(),
        from_services: vec![source.into()],
        ..pb::Rule::default()
    };
    let policy =
        pb::SecurityPolicy { default: pb::Action::Deny.into(), rules: vec![rule], ..Default::default() };
    Wire::PutSecurityPolicy(pb::PutSecurityPolicy { scope: scope.into(), policy: Some(policy) })
}

pub(crate) fn health(instance: &str, revision: u64) -> pb::ReportHealthRequest {
    pb::ReportHealthRequest {
        meta: Some(command("test")),
        instance: instance.into(),
        health: pb::Health::Healthy.into(),
        revision,
        doubt: 0,
        detail: String::new(),
    }
}

/// Somebody who wants to join, and keeps its key over repeats.
pub(crate) struct Joiner {
    pub(crate) key: LeafKey,
    pub(crate) request: pb::JoinRequest,
}

impl Joiner {
    pub(crate) fn new(token: &str, instance: &str) -> Self {
        let key = LeafKey::generate().unwrap();
        let csr = key.csr_der().unwrap().into();
        let request = pb::JoinRequest {
            meta: Some(command("test")),
            token: token.into(),
            instance: instance.into(),
            csr,
        };
        Self { key, request }
    }

    pub(crate) async fn join(&self, channel: Channel) -> Result<Credential, CallError> {
        let leaf = IdentityClient::new(channel).join(self.request.clone()).await?.into_inner();
        let roots = leaf.roots.iter().map(|root| root.to_vec().into()).collect();
        Ok(Credential::new(leaf.chain[0].to_vec().into(), self.key.clone(), roots).unwrap())
    }
}

/// The token with its last digit of the secret changed.
pub(crate) fn spoiled(token: &str) -> String {
    let mut parts: Vec<String> = token.split('.').map(str::to_owned).collect();
    let last = parts[2].pop().unwrap();
    parts[2].push(if last == '0' { '1' } else { '0' });
    let spoiled = parts.join(".");
    assert!(spoiled.parse::<JoinToken>().is_ok());
    spoiled
}
