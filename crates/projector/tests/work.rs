//! What one change takes, in things that are made anew and rows that are written: as much in a large mesh as in a small
//! one. And what a sidecar that names a few services takes: nothing of the others.
#![expect(clippy::unwrap_used, reason = "a mesh that cannot be made fails the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::time::Instant;
use weft_model::health::{Health, HealthReported};
use weft_model::membership::{InstanceRegistered, Upstreams};
use weft_model::service::{ServiceDeclared, ServicePort};
use weft_model::{
    Epoch, Event, Fact, InstanceId, Port, Position, Scope, ServiceName, Timestamp, Version, ca,
};
use weft_projector::Published;
use weft_projector::published::Delta;
use weft_routing::projection::Work;
use weft_routing::{Hash, Manifest, Projection, Snapshot};

struct Mesh {
    projection: Projection,
    versions: BTreeMap<Scope, u64>,
}

impl Mesh {
    /// So many services with so many instances each; the instances of each name the next four services.
    fn new(services: usize, instances: usize) -> Self {
        let mut mesh = Self { projection: Projection::default(), versions: BTreeMap::new() };
        let root = ca::RootAdded {
            trust_domain: "weft.test".parse().unwrap(),
            certificate_pem: "root".into(),
            sha256: "aa".into(),
        };
        let mut facts = vec![mesh.fact(Scope::Ca, Event::Ca(root.into()))];
        for service in 0..services {
            let port = ServicePort { name: "main".parse().unwrap(), port: Port::new(80).unwrap() };
            let declared = ServiceDeclared { ports: vec![port], address: None };
            facts.push(mesh.fact(Scope::Service(name(service)), Event::Service(declared.into())));
        }
        for service in 0..services {
            let upstreams = (1..5).map(|step| name((service + step) % services)).collect();
            for instance in 0..instances {
                let id = instance_of(service, instance);
                facts.push(mesh.register(&id, Upstreams::Only(BTreeSet::clone(&upstreams))));
                facts.push(mesh.report(&id, Health::Healthy));
            }
        }
        let mut bulk = std::mem::take(&mut mesh.projection).into_bulk();
        bulk.apply(&facts).unwrap();
        mesh.projection = bulk.finish();
        mesh
    }

    fn fact(&mut self, scope: Scope, event: Event) -> Fact {
        let version = self.versions.entry(scope.clone()).or_default();
        *version += 1;
        let version = Version(*version);
        let position = Position(self.versions.values().sum());
        Fact { epoch: Epoch(1), position, version, at: Timestamp(0), actor: "test".into(), scope, event }
    }

    fn register(&mut self, id: &InstanceId, upstreams: Upstreams) -> Fact {
        let registered = InstanceRegistered {
            address: [10, 0, 0, 1].into(),
            port: Port::new(15_001).unwrap(),
            upstreams,
            metadata: BTreeMap::new(),
        };
        self.fact(Scope::Membership(id.clone()), Event::Membership(registered.into()))
    }

    fn report(&mut self, id: &InstanceId, health: Health) -> Fact {
        let revision = self.versions.get(&Scope::Health(id.clone())).map_or(1, |version| version + 1);
        let report = HealthReported { health, revision, doubt: Some(0), detail: String::new() };
        self.fact(Scope::Health(id.clone()), Event::Health(report.into()))
    }

    /// Folds one more event.
    fn change(&mut self, fact: &Fact) -> Delta {
        let changes = self.projection.apply([fact]).unwrap();
        Delta::new(&self.projection, &changes, [&fact.scope])
    }

    fn snapshot(&self, id: &InstanceId) -> Snapshot {
        let wanted = self.projection.wanted(id).unwrap();
        let manifest = &wanted.class.manifest;
        let shards = self.projection.shards().values().map(|shard| (shard.hash, Arc::clone(&shard.bytes)));
        let shards = shards.collect();
        Snapshot::assemble(wanted.version, manifest.hash(), &manifest.encode(), &shards).unwrap()
    }
}

fn name(service: usize) -> ServiceName {
    format!("default/service-{service}").parse().unwrap()
}

fn instance_of(service: usize, instance: usize) -> InstanceId {
    format!("default/service-{service}/i-{instance}").parse().unwrap()
}

/// One endpoint goes down.
fn one_change(services: usize, wildcards: usize) -> (Work, usize) {
    let mut mesh = Mesh::new(services, 3);
    for service in 0..wildcards {
        let everything = mesh.register(&instance_of(service, 100), Upstreams::All);
        mesh.change(&everything);
    }
    let down = mesh.report(&instance_of(7, 1), Health::Unhealthy);
    let delta = mesh.change(&down);
    assert_eq!(mesh.projection.recompute(), mesh.projection);
    (delta.work, delta.rows.len())
}

#[test]
fn one_change_takes_as_much_in_a_large_mesh_as_in_a_small_one() {
    let small = one_change(10, 0);
    // The four services that name this one; the shard's row, its instance's, that of its points, and one for each manifest.
    assert_eq!(small, (Work { shards: 1, lists: 4, manifests: 4 }, 7));
    assert_eq!(one_change(400, 0), small);
}

#[test]
fn who_sees_everything_costs_one_list_and_a_hash_each() {
    // The list of all services is one, whoever has it.
    assert_eq!(one_change(400, 3).0, Work { shards: 1, lists: 5, manifests: 7 });
    assert_eq!(one_change(400, 30).0, Work { shards: 1, lists: 5, manifests: 34 });
}

#[test]
fn a_change_makes_one_page_of_a_long_manifest_anew() {
    let mut mesh = Mesh::new(400, 1);
    let everything = mesh.register(&instance_of(0, 100), Upstreams::All);
    mesh.change(&everything);
    let manifest = |mesh: &Mesh| -> Manifest {
        mesh.projection.wanted(&instance_of(0, 100)).unwrap().class.manifest.clone()
    };
    let before = manifest(&mesh);
    let down = mesh.report(&instance_of(7, 0), Health::Unhealthy);
    mesh.change(&down);
    let after = manifest(&mesh);
    assert_eq!((before.len(), after.len()), (402, 402));
    assert_eq!(after.pages_not_in(&before), 1);
    let difference = after.since(&before);
    assert_eq!(difference.changed.len(), 1);
    assert_eq!(difference.changed[0].key.to_string(), "endpoints/default/service-7");
    assert!(difference.removed.is_empty());
}

#[test]
fn a_sidecar_holds_nothing_of_services_that_it_does_not_name() {
    let (small, large) = (Mesh::new(8, 2), Mesh::new(400, 2));
    let id = instance_of(0, 0);
    let (few, many) = (small.snapshot(&id), large.snapshot(&id));
    let keys = |snapshot: &Snapshot| snapshot.shards.keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&few), keys(&many));
    assert_eq!(few.shards.len(), 6, "four upstreams, its own policy, and whom to trust");
    // Positions are larger numbers in a larger mesh, so bytes are compared without them.
    let endpoints = |snapshot: &Snapshot| -> Vec<_> {
        let shards = snapshot.endpoints.values();
        shards.map(|shard| (shard.service.clone(), shard.endpoints.len(), shard.ports.clone())).collect()
    };
    assert_eq!(endpoints(&few), endpoints(&many));
    assert_eq!(few.manifest.len(), many.manifest.len());
}

#[test]
fn what_is_published_for_a_class_is_a_manifest_of_what_it_names() {
    let mut mesh = Mesh::new(400, 1);
    let mut published = Published::default();
    published.take_in(Delta::everything(&mesh.projection), Instant::now());
    let id = instance_of(0, 0);
    let named = |published: &Published| published.wanted(&id).unwrap().class.manifest.len();
    assert_eq!(named(&published), 6);
    let hash = |published: &Published| -> Hash { published.wanted(&id).unwrap().class.manifest.hash() };
    let before = hash(&published);
    for unrelated in 100..140 {
        let down = mesh.report(&instance_of(unrelated, 0), Health::Unhealthy);
        let delta = mesh.change(&down);
        published.take_in(delta, Instant::now());
    }
    assert_eq!(hash(&published), before, "forty changes elsewhere are no change here");
    assert_eq!(published.wanted(&id).unwrap().class.remembered(), 0);
}
