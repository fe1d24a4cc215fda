//! What sidecars are told and given.

use crate::support::{
    LIMIT, TestMesh, allow_from, declare, deny_all, discovery, health, register, wait_until,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tonic::Code;
use tonic::transport::Channel;
use weft_client::{command, take};
use weft_identity::spiffe::Subject;
use weft_model::{ConfigVersion, Epoch, Position, ServiceName};
use weft_proto::v1 as pb;
use weft_proto::v1::change::Change;
use weft_proto::v1::discovery_client::DiscoveryClient;
use weft_proto::v1::mesh_client::MeshClient;
use weft_routing::manifest::decode_entries;
use weft_routing::verdict::authorize;
use weft_routing::{Hash, Manifest, Snapshot};

const SHARD_BYTES_MAX: usize = weft_routing::snapshot::SHARD_BYTES_MAX;

/// A sidecar as simple as can be: the shards that it holds, and what it runs.
struct Sidecar {
    client: DiscoveryClient<Channel>,
    shards: BTreeMap<Hash, Arc<[u8]>>,
    manifest: Manifest,
    have: Option<pb::SnapshotHeader>,
}

impl Sidecar {
    fn new(mesh: &TestMesh, instance: &str) -> Self {
        Self {
            client: discovery(mesh.sidecar(instance)),
            shards: BTreeMap::new(),
            manifest: Manifest::default(),
            have: None,
        }
    }

    async fn pull(&mut self) -> (Snapshot, pb::PullResponse) {
        let mut request = pb::PullRequest { have: self.have.clone(), held: Vec::new() };
        let mut answer = self.client.pull(request.clone()).await.unwrap().into_inner();
        if answer.held_wanted {
            assert!(answer.shards.is_empty() && answer.manifest.is_empty());
            request.held = self.shards.keys().map(Hash::prefix).collect();
            answer = self.client.pull(request).await.unwrap().into_inner();
            assert!(answer.full && !answer.held_wanted);
        } else if answer.full {
            self.shards.clear();
        }
        for shard in &answer.shards {
            let bytes = zstd::bulk::decompress(&shard.body_zstd, SHARD_BYTES_MAX).unwrap();
            assert_eq!(bytes.len(), shard.length as usize);
            self.shards.insert(Hash::of(&bytes), bytes.into());
        }
        let header = answer.header.clone().unwrap();
        let hash = Hash::from_slice(&header.manifest_hash).unwrap();
        let mut entries = decode_entries(&answer.manifest).unwrap();
        if !answer.full {
            let mut all: BTreeMap<_, _> = self.manifest.entries().cloned().collect();
            all.retain(|key, _| !answer.removed.contains(&key.to_string()));
            all.append(&mut entries);
            entries = all;
        }
        self.manifest = Manifest::new(entries);
        let (version, manifest) = (version(header.version.as_ref()), self.manifest.encode());
        let snapshot = Snapshot::assemble(version, hash, &manifest, &self.shards).unwrap();
        self.have = Some(header);
        (snapshot, answer)
    }
}

fn version(version: Option<&pb::ConfigVersion>) -> ConfigVersion {
    let version = version.unwrap();
    ConfigVersion::new(Epoch(version.epoch), Position(version.position))
}

/// The next notice whose wanted snapshot is not `old`.
async fn news(
    stream: &mut tonic::Streaming<pb::Notice>,
    old: Option<&pb::SnapshotHeader>,
) -> pb::SnapshotHeader {
    let next = async {
        loop {
            let notice = stream.message().await.unwrap().unwrap();
            if let Some(wanted) = notice.wanted.filter(|wanted| Some(wanted) != old) {
                return wanted;
            }
        }
    };
    tokio::time::timeout(LIMIT, next).await.unwrap()
}

#[tokio::test]
async fn a_sidecar_learns_pulls_assembles_and_acknowledges() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api", "default/web", "default/other"]).await;
    let mut api = Sidecar::new(&mesh, "default/api/one");
    let mut notices = api.client.subscribe(pb::SubscribeRequest::default()).await.unwrap().into_inner();
    let wanted = news(&mut notices, None).await;
    let (snapshot, answer) = api.pull().await;
    assert!(answer.full);
    assert_eq!(answer.header.as_ref(), Some(&wanted));
    assert_eq!(snapshot.endpoints.len(), 3);
    let web: ServiceName = "default/web".parse().unwrap();
    let port = weft_model::Port::new(80).unwrap();
    assert!(!authorize(&snapshot.inbound, &web, port).permitted());

    mesh.apply(vec![allow_from("default/api", "default/web")]).await;
    let newer = news(&mut notices, Some(&wanted)).await;
    let (snapshot, answer) = api.pull().await;
    let header = answer.header.as_ref().unwrap();
    assert_eq!(header.version, newer.version);
    assert!(
        header.manifest_hash.starts_with(&newer.manifest_hash),
        "a patch comes with the hash's beginning"
    );
    assert!(!answer.full);
    assert_eq!(
        answer.shards.iter().map(|shard| shard.key.as_str()).collect::<Vec<_>>(),
        ["inbound/default/api"]
    );
    assert!(authorize(&snapshot.inbound, &web, port).permitted());

    // Nothing new: the answer carries no shard.
    let (_, answer) = api.pull().await;
    assert!(!answer.full && answer.shards.is_empty());

    let ack = pb::AckRequest { applied: api.have.clone(), took_ms: 7, ..Default::default() };
    api.client.ack(ack).await.unwrap();
    let mut admin = mesh.admin();
    wait_until("the acknowledgement to show", LIMIT, async || {
        let status = admin.status(pb::StatusRequest::default()).await.unwrap().into_inner();
        let one = status.sidecars.iter().find(|sidecar| sidecar.instance == "default/api/one").unwrap();
        one.applied == newer.version && one.connected && one.lag_ms == 0
    })
    .await;
    drop(notices);
    wait_until("the sidecar to have left", LIMIT, async || {
        let status = admin.status(pb::StatusRequest::default()).await.unwrap().into_inner();
        status.sidecars.iter().all(|sidecar| !sidecar.connected)
    })
    .await;
    mesh.controller.stop().await;
}

#[tokio::test]
async fn the_way_of_a_change_into_the_sidecars_is_told() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api", "default/web"]).await;
    // Two that join later change no manifest of their class, and one of them leaves again.
    mesh.apply(vec![register("default/api/two", 9001), register("default/api/three", 9002)]).await;
    let gone = pb::DeregisterInstance { instance: "default/api/three".into() };
    mesh.apply(vec![Change::DeregisterInstance(gone)]).await;
    let mut api = Sidecar::new(&mesh, "default/api/one");
    let (first, _) = api.pull().await;
    let have = api.have.clone();
    let subscribe = pb::SubscribeRequest { have: have.clone(), ..Default::default() };
    let mut notices = api.client.subscribe(subscribe).await.unwrap().into_inner();
    let changed = mesh.apply(vec![allow_from("default/api", "default/web")]).await.version;
    let mut newer = news(&mut notices, have.as_ref()).await;
    while newer.version != changed {
        newer = news(&mut notices, Some(&newer)).await;
    }
    let (snapshot, _) = api.pull().await;
    assert!(snapshot.version > first.version);
    // A word that was held back for an hour is no reason to believe that the swap was before the change.
    let swap = pb::Swap { version: newer.version, ago_us: 3_600_000_000 };
    let ack = pb::AckRequest { applied: api.have.clone(), swaps: vec![swap], ..Default::default() };
    api.client.ack(ack.clone()).await.unwrap();
    let mut admin = mesh.admin();
    let mut told = None;
    wait_until("the change's way", LIMIT, async || {
        let status = admin.status(pb::StatusRequest::default()).await.unwrap().into_inner();
        told = status.propagation.into_iter().find(|change| change.version == newer.version);
        told.as_ref().is_some_and(|change| change.applied == 1)
    })
    .await;
    let told = told.unwrap();
    assert_eq!((told.event.as_str(), told.interested), ("SecurityPolicySet", 2));
    assert_eq!(told.scope, "security/default/api");
    assert_eq!(told.last_sidecar, "default/api/one");
    assert_eq!(told.applied_last_ms, Some(told.published_ms), "no sooner than it was published");
    assert!(told.folded_ms <= told.published_ms);

    let mut many = ack;
    many.swaps = vec![many.swaps[0]; 33];
    assert_eq!(api.client.ack(many).await.unwrap_err().code(), Code::InvalidArgument);
    mesh.controller.stop().await;
}

#[tokio::test]
async fn who_is_outside_the_propagation_bound_is_listed() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api", "default/web"]).await;
    let defaults =
        pb::MeshDefaults { security: pb::Action::Deny.into(), propagation_bound_ms: 10, damping: None };
    mesh.apply(vec![Change::SetMeshDefaults(defaults)]).await;
    let mut api = Sidecar::new(&mesh, "default/api/one");
    api.pull().await;
    let subscribe = pb::SubscribeRequest { have: api.have.clone(), ..Default::default() };
    let _notices = api.client.subscribe(subscribe).await.unwrap().into_inner();
    let mut admin = mesh.admin();
    wait_until("the other one to be late", LIMIT, async || {
        let status = admin.status(pb::StatusRequest::default()).await.unwrap().into_inner();
        assert_eq!(status.propagation_bound_ms, 10);
        let late = status.sidecars.iter().filter(|sidecar| sidecar.outside_bound);
        let late: Vec<_> = late.map(|sidecar| sidecar.instance.as_str()).collect();
        late == ["default/web/one"]
    })
    .await;
    let client = mesh.database.connect().await;
    let stale = client.query_one("select instance from status.stale", &[]).await.unwrap();
    assert_eq!(stale.get::<_, String>(0), "default/web/one");
    assert_eq!(mesh.store().sidecars_outside_bound().await.unwrap(), 1);
    mesh.controller.stop().await;
}

/// The next notice with another snapshot than `old`, as it is.
async fn notice(stream: &mut tonic::Streaming<pb::Notice>, old: &pb::SnapshotHeader) -> pb::Notice {
    let next = async {
        loop {
            let notice = stream.message().await.unwrap().unwrap();
            if notice.wanted.as_ref().is_some_and(|wanted| wanted != old) {
                return notice;
            }
        }
    };
    tokio::time::timeout(LIMIT, next).await.unwrap()
}

#[tokio::test]
async fn a_small_change_comes_with_the_notice_whatever_the_size_of_what_it_is_in() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api", "default/web"]).await;
    for group in (0..600_u16).collect::<Vec<_>>().chunks(200) {
        let register = |n: &u16| {
            let registration =
                crate::support::registration(&format!("default/web/web-{n}"), 20_000 + u32::from(*n));
            Change::RegisterInstance(registration)
        };
        mesh.apply(group.iter().map(register).collect()).await;
    }
    mesh.projected().await;
    let mut api = Sidecar::new(&mesh, "default/api/one");
    let mut notices = api.client.subscribe(pb::SubscribeRequest::default()).await.unwrap().into_inner();
    news(&mut notices, None).await;
    let (mut current, answer) = api.pull().await;
    let largest = answer.shards.iter().map(|shard| shard.length).max();
    assert!(largest > Some(15_000), "{largest:?}");
    let instance = "default/api/one".parse().unwrap();
    for n in 0..3 {
        let drain = pb::DrainInstance { instance: format!("default/web/web-{}", n * 100) };
        mesh.apply(vec![Change::DrainInstance(drain)]).await;
        let notice = notice(&mut notices, &take::header(&current)).await;
        let patched = take::take_patch(&notice, &current, &instance, &current.trust.trust_domain);
        let patched = patched.unwrap().expect("a patch from what was told last");
        let (pulled, _) = api.pull().await;
        assert_eq!(patched, pulled);
        // The figure is the bench's; this says that it does not grow with the service.
        let bytes = prost::Message::encoded_len(&notice);
        assert!(bytes <= 85, "{bytes} bytes: {notice:?}");
        current = patched;
    }
    // What adds a shard is pulled.
    mesh.apply(vec![declare("default/more", 80)]).await;
    assert!(notice(&mut notices, &take::header(&current)).await.patch.is_none());
    mesh.controller.stop().await;
}

#[tokio::test]
async fn what_does_not_concern_a_sidecar_changes_nothing_for_it() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api", "default/web"]).await;
    let only = Change::RegisterInstance(pb::RegisterInstance {
        all_upstreams: false,
        upstreams: vec!["default/web".into()],
        ..crate::support::registration("default/api/two", 9100)
    });
    mesh.apply(vec![only]).await;
    let mut two = Sidecar::new(&mesh, "default/api/two");
    let (snapshot, _) = two.pull().await;
    assert_eq!(snapshot.endpoints.len(), 1);
    mesh.apply(vec![declare("default/unseen", 80), deny_all("default/web")]).await;
    mesh.projected().await;
    let (_, answer) = two.pull().await;
    assert!(answer.shards.is_empty());
    assert_eq!(version(answer.header.unwrap().version.as_ref()), snapshot.version);
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_known_manifest_gets_the_difference_and_an_unknown_one_everything() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api", "default/web"]).await;
    let mut api = Sidecar::new(&mesh, "default/api/one");
    api.pull().await;
    let first = api.have.clone();
    for revision in 1..=3 {
        let mut report = health("default/web/one", revision);
        if revision % 2 == 0 {
            report.health = pb::Health::Unhealthy.into();
        }
        MeshClient::new(mesh.sidecar("default/web/one")).report_health(report).await.unwrap();
    }
    mesh.projected().await;
    let (snapshot, answer) = api.pull().await;
    assert!(!answer.full);
    assert_eq!(
        answer.shards.iter().map(|shard| shard.key.as_str()).collect::<Vec<_>>(),
        ["endpoints/default/web"]
    );
    let web = &snapshot.endpoints[&"default/web".parse().unwrap()];
    assert_eq!(web.eligible().count(), 1);

    let mut unknown = first.unwrap();
    unknown.manifest_hash = vec![7; 32].into();
    api.have = Some(unknown);
    let (again, answer) = api.pull().await;
    assert!(answer.full && answer.shards.is_empty(), "it holds all of it");
    assert_eq!(again, snapshot);
    api.have = None;
    let (again, answer) = api.pull().await;
    assert!(answer.full);
    assert_eq!(again, snapshot);
    let listed = Manifest::decode(&answer.manifest).unwrap().len();
    assert_eq!(answer.shards.len(), listed);
    mesh.controller.stop().await;
}

#[tokio::test]
async fn whoever_was_away_gets_what_it_lacks_from_a_controller_that_never_saw_what_it_has() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api", "default/web", "default/other"]).await;
    let mut api = Sidecar::new(&mesh, "default/api/one");
    api.pull().await;
    // Far more than manifests are remembered.
    for port in 100..150 {
        mesh.apply(vec![declare("default/web", port)]).await;
    }
    let leave = pb::DeregisterInstanceRequest {
        meta: Some(command("test")),
        expected: None,
        instance: "default/other/one".into(),
    };
    mesh.admin().deregister_instance(leave).await.unwrap();
    mesh.projected().await;

    let later = mesh.another("c2").await;
    let one = Subject::Instance("default/api/one".parse().unwrap());
    api.client = discovery(mesh.channel_at(&later, &one));
    let (snapshot, answer) = api.pull().await;
    let sent: Vec<_> = answer.shards.iter().map(|shard| shard.key.as_str()).collect();
    assert_eq!(sent, ["endpoints/default/other", "endpoints/default/web"]);
    let web = &snapshot.endpoints[&"default/web".parse().unwrap()];
    assert_eq!(web.ports.iter().map(|port| port.port.number()).collect::<Vec<_>>(), [149]);
    later.stop().await;
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_version_from_nowhere_is_a_rewound_log() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api"]).await;
    let mut api = Sidecar::new(&mesh, "default/api/one");
    api.pull().await;
    let mut ahead = api.have.clone().unwrap();
    ahead.version = Some(pb::ConfigVersion { epoch: 1, position: 1_000_000 });
    let status =
        api.client.pull(pb::PullRequest { have: Some(ahead.clone()), held: Vec::new() }).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("LOG_REWOUND"), "{status:?}");
    let status = api
        .client
        .subscribe(pb::SubscribeRequest { have: Some(ahead), ..Default::default() })
        .await
        .unwrap_err();
    assert!(status.message().contains("LOG_REWOUND"), "{status:?}");
    mesh.controller.stop().await;
}

#[tokio::test]
async fn who_registers_later_hears_of_it_on_the_open_stream() {
    let mesh = TestMesh::start().await;
    mesh.apply(vec![declare("default/api", 80)]).await;
    let mut client = discovery(mesh.sidecar("default/api/one"));
    let mut notices = client.subscribe(pb::SubscribeRequest::default()).await.unwrap().into_inner();
    let first = notices.message().await.unwrap().unwrap();
    assert!(first.wanted.is_none());
    assert_eq!(first.heartbeat_ms, 5_000);
    mesh.apply(vec![register("default/api/one", 9000)]).await;
    news(&mut notices, None).await;
    // With nothing to say, a heartbeat comes all the same.
    let heartbeat = tokio::time::timeout(Duration::from_secs(8), notices.message()).await;
    assert!(heartbeat.unwrap().unwrap().unwrap().wanted.is_some());
    mesh.controller.stop().await;
}
