//! The scripted controller: a real gRPC server over mTLS whose mesh is folded from events by the real rules, with a few
//! ways to misbehave. It runs on a runtime of its own, so that killing it takes every connection with it.

mod rpc;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use weft_identity::ca::{CertificateAuthority, LEAF_LIFETIME};
use weft_identity::credential::Credential;
use weft_identity::spiffe::Subject;
use weft_identity::token::JoinToken;
use weft_model::ca::RootAdded;
use weft_model::health::{Health, HealthCommand, HealthReported};
use weft_model::membership::{InstanceRegistered, MembershipCommand, Upstreams};
use weft_model::security::{Action, Rule, SecurityCommand, SecurityPolicy, Sources};
use weft_model::service::{ServiceCommand, ServiceDeclared, ServicePort};
use weft_model::traffic::{TrafficCommand, TrafficPolicy};
use weft_model::{Command, ConfigVersion, Epoch, Fact, InstanceId, Port, Position, ServiceName, Timestamp};
use weft_proto::v1;
use weft_routing::decide::Refused;
use weft_routing::manifest::encode_entries;
use weft_routing::{Manifest, Projection};

/// What the controller was asked, in order.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Call {
    Joined(InstanceId),
    Renewed(InstanceId),
    Registered(InstanceId),
    Drained(InstanceId),
    Deregistered(InstanceId),
    UpstreamAsked(InstanceId, ServiceName),
    Health(InstanceId, Health, u64),
    Subscribed(InstanceId),
    Pulled(InstanceId),
    Acked(InstanceId, ConfigVersion, String),
}

/// The mesh as the controller has it, and how it misbehaves.
pub(crate) struct State {
    pub(crate) projection: Projection,
    pub(crate) calls: Vec<Call>,
    /// How long the leaves live that are issued from now on.
    pub(crate) leaf_lifetime: Duration,
    pub(crate) refuse_renewals: bool,
    pub(crate) heartbeat: Duration,
    /// No notice is sent to anybody.
    pub(crate) silent: bool,
    /// Who subscribes is told to come back later.
    pub(crate) refuse_subscribers: bool,
    /// Who subscribes with a witness, or changes anything, is told that the log was rewound.
    pub(crate) rewound: bool,
    /// What is told with every notice.
    pub(crate) witness: Vec<u8>,
    /// What every notice brings.
    pub(crate) patch: Option<v1::Patch>,
    /// What subscribers showed, in order.
    pub(crate) shown: Vec<Vec<u8>>,
    /// So many pulls are told that there is too much to do.
    pub(crate) overloaded: usize,
    /// These hear of no change, only heartbeats with what they were told last.
    pub(crate) frozen: BTreeMap<InstanceId, Option<v1::Notice>>,
    /// What these are told is wanted, and what they get when they pull it.
    pub(crate) forged: BTreeMap<InstanceId, v1::PullResponse>,
    /// Streams of notices that were opened before this rose have ended.
    streams: u64,
    tokens: BTreeMap<String, InstanceId>,
    /// Every manifest that was sent.
    sent: BTreeMap<Vec<u8>, Manifest>,
}

/// What the server's tasks share.
pub(crate) struct Inner {
    pub(crate) ca: CertificateAuthority,
    state: Mutex<State>,
    changes: watch::Sender<u64>,
}

/// See the module's documentation.
pub(crate) struct Controller {
    pub(crate) inner: Arc<Inner>,
    pub(crate) address: SocketAddr,
    runtime: Option<Runtime>,
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.stop();
    }
}

#[expect(clippy::disallowed_methods, reason = "the leaves are checked against the system's clock")]
pub(crate) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    Timestamp(i64::try_from(since.as_millis()).unwrap())
}

impl Controller {
    /// A controller with an empty mesh.
    pub(crate) fn start() -> Self {
        let ca = CertificateAuthority::create(&"weft.test".parse().unwrap(), now()).unwrap();
        let state = State {
            projection: Projection::default(),
            calls: Vec::new(),
            leaf_lifetime: LEAF_LIFETIME,
            refuse_renewals: false,
            heartbeat: Duration::from_secs(5),
            silent: false,
            refuse_subscribers: false,
            rewound: false,
            witness: Vec::new(),
            patch: None,
            shown: Vec::new(),
            overloaded: 0,
            frozen: BTreeMap::new(),
            forged: BTreeMap::new(),
            streams: 0,
            tokens: BTreeMap::new(),
            sent: BTreeMap::new(),
        };
        let inner = Arc::new(Inner { ca, state: Mutex::new(state), changes: watch::Sender::new(0) });
        // Nobody else gets this port while the controller is down.
        let address = SocketAddr::from(([127, 0, 0, 1], weft_testkit::reserve_loopback_port()));
        let mut controller = Self { inner, address, runtime: None };
        controller.go_on();
        let root = controller.inner.ca.root();
        let certificate = pem::encode(&pem::Pem::new("CERTIFICATE", root.to_vec()));
        controller.commit(Command::Ca(RootAdded {
            trust_domain: "weft.test".parse().unwrap(),
            certificate_pem: certificate,
            sha256: controller.inner.ca.root_fingerprint().to_string(),
        }));
        controller
    }

    /// Kills the server with all its connections. The mesh's state stays.
    pub(crate) fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Waited for, on a thread where one may wait: afterwards the address is free again.
            let stopped = std::thread::spawn(move || runtime.shutdown_timeout(super::LIMIT)).join();
            stopped.unwrap();
        }
    }

    /// Serves, at the address where it served before.
    pub(crate) fn go_on(&mut self) {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = TcpListener::bind(self.address).unwrap();
        runtime.spawn(rpc::serve(Arc::clone(&self.inner), listener));
        self.runtime = Some(runtime);
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state()
    }

    /// Changes how it behaves, and wakes everybody who waits for it.
    pub(crate) fn script(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.inner.changed();
    }

    /// A change of the mesh, by the rules of the model.
    pub(crate) fn commit(&self, command: Command) -> ConfigVersion {
        self.inner.commit(command).unwrap()
    }

    pub(crate) fn declare(&self, service: &str, ports: &[u16]) {
        let port = |number: &u16| ServicePort {
            name: format!("p{number}").parse().unwrap(),
            port: Port::new(*number).unwrap(),
        };
        let declared = ServiceDeclared { ports: ports.iter().map(port).collect(), address: None };
        self.commit(Command::Service(service.parse().unwrap(), ServiceCommand::Declare(declared)));
    }

    /// Only these services may connect to `service`.
    pub(crate) fn allow(&self, service: &str, from: &[&str]) -> ConfigVersion {
        let services: BTreeSet<ServiceName> = from.iter().map(|name| name.parse().unwrap()).collect();
        let rule = Rule {
            name: "the-test-allows".parse().unwrap(),
            action: Action::Allow,
            from: Sources { services, ..Sources::default() },
            ports: BTreeSet::new(),
        };
        let rules = if from.is_empty() { Vec::new() } else { vec![rule] };
        let policy = SecurityPolicy { default: Some(Action::Deny), rules, ..SecurityPolicy::default() };
        self.put_security(service, policy)
    }

    pub(crate) fn put_security(&self, scope: &str, policy: SecurityPolicy) -> ConfigVersion {
        self.commit(Command::Security(scope.parse().unwrap(), SecurityCommand::Put(policy)))
    }

    pub(crate) fn put_traffic(&self, scope: &str, policy: TrafficPolicy) {
        self.commit(Command::Traffic(scope.parse().unwrap(), TrafficCommand::Put(policy)));
    }

    /// An instance that is said to be reached at `address` and to be healthy, whatever is there.
    pub(crate) fn pretend(&self, instance: &str, address: SocketAddr) {
        let instance: InstanceId = instance.parse().unwrap();
        let registered = InstanceRegistered {
            address: address.ip(),
            port: Port::new(address.port()).unwrap(),
            upstreams: Upstreams::Only(BTreeSet::new()),
            metadata: BTreeMap::new(),
        };
        self.commit(Command::Membership(instance.clone(), MembershipCommand::Register(registered)));
        let health =
            HealthReported { health: Health::Healthy, revision: 1, doubt: Some(0), detail: String::new() };
        self.commit(Command::Health(instance, HealthCommand::Report(health)));
    }

    /// A token for this instance.
    pub(crate) fn token(&self, instance: &str) -> JoinToken {
        let token = JoinToken::generate(self.inner.ca.root_fingerprint()).unwrap();
        self.state().tokens.insert(token.reveal().to_string(), instance.parse().unwrap());
        token
    }

    /// Who holds this may call itself `instance`.
    pub(crate) fn credential(&self, instance: &str) -> Credential {
        let subject = Subject::Instance(instance.parse().unwrap());
        self.inner.ca.issue_credential(&subject, now(), LEAF_LIFETIME).unwrap()
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.state().calls.clone()
    }

    /// How often this was asked.
    pub(crate) fn count(&self, matches: impl Fn(&Call) -> bool) -> usize {
        self.state().calls.iter().filter(|call| matches(call)).count()
    }

    /// What `instance` would get now if it pulled everything.
    pub(crate) fn full_pull(&self, instance: &str) -> v1::PullResponse {
        self.state().pull(&instance.parse().unwrap(), None).unwrap()
    }

    /// What `instance` would be told now.
    pub(crate) fn notice(&self, instance: &str) -> v1::Notice {
        self.inner.notice(&instance.parse().unwrap())
    }

    /// The version that `instance` is to run.
    pub(crate) fn wanted(&self, instance: &str) -> ConfigVersion {
        self.state().projection.wanted(&instance.parse().unwrap()).unwrap().version
    }
}

impl Inner {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn changed(&self) {
        self.changes.send_modify(|change| *change += 1);
    }

    pub(crate) fn commit(&self, command: Command) -> Result<ConfigVersion, Refused> {
        let version = self.state().commit(command)?;
        self.changed();
        Ok(version)
    }
}

impl State {
    /// Every token that was given out is used from now on.
    pub(crate) fn forget_tokens(&mut self) {
        self.tokens.clear();
    }

    /// Ends every stream of notices.
    pub(crate) fn end_streams(&mut self) {
        self.streams += 1;
    }

    fn commit(&mut self, command: Command) -> Result<ConfigVersion, Refused> {
        let state = self.projection.state();
        let decisions = weft_routing::decide::decide(state, &[command], now())?;
        let mut position = state.version().position;
        let mut facts = Vec::new();
        for decision in decisions {
            let mut version = decision.seen;
            for event in decision.events {
                position = position.next();
                version = version.next();
                facts.push(Fact {
                    epoch: Epoch(1),
                    position,
                    version,
                    at: now(),
                    actor: "test".into(),
                    scope: decision.scope.clone(),
                    event,
                });
            }
        }
        self.projection.apply(&facts).unwrap();
        Ok(ConfigVersion::new(Epoch(1), position))
    }

    pub(crate) fn header(&self, instance: &InstanceId) -> Option<v1::SnapshotHeader> {
        let wanted = self.projection.wanted(instance)?;
        Some(v1::SnapshotHeader {
            version: Some(wire_version(wanted.version)),
            manifest_hash: wanted.class.manifest.hash().0.to_vec().into(),
        })
    }

    /// The answer to a pull from somebody who has a manifest with this hash.
    fn pull(&mut self, instance: &InstanceId, have: Option<&[u8]>) -> Option<v1::PullResponse> {
        let header = self.header(instance)?;
        let newest = self.projection.wanted(instance)?.class.manifest.clone();
        let known = have.and_then(|hash| self.sent.get(hash)).cloned();
        let full = known.is_none();
        let known = known.unwrap_or_default();
        let difference = newest.since(&known);
        let changed = difference.changed.iter();
        let lacks = changed.clone().filter(|it| it.before.map(|before| before.hash) != Some(it.entry.hash));
        let shards = lacks.map(|it| {
            assert_eq!(self.projection.shards()[it.key].hash, it.entry.hash);
            shard(&it.key.to_string(), &self.projection.shards()[it.key].bytes)
        });
        let response = v1::PullResponse {
            header: Some(header),
            full,
            manifest: encode_entries(changed.map(|it| (it.key, it.entry))).into(),
            shards: shards.collect(),
            removed: difference.removed.iter().map(ToString::to_string).collect(),
            held_wanted: false,
        };
        self.sent.insert(newest.hash().0.to_vec(), newest);
        Some(response)
    }
}

pub(crate) fn shard(key: &str, bytes: &[u8]) -> v1::Shard {
    v1::Shard {
        key: key.into(),
        body_zstd: zstd::bulk::compress(bytes, 3).unwrap().into(),
        length: bytes.len().try_into().unwrap(),
    }
}

pub(crate) fn wire_version(version: ConfigVersion) -> v1::ConfigVersion {
    v1::ConfigVersion { epoch: version.epoch.0, position: version.position.0 }
}

pub(crate) fn model_version(version: &v1::ConfigVersion) -> ConfigVersion {
    ConfigVersion::new(Epoch(version.epoch), Position(version.position))
}
