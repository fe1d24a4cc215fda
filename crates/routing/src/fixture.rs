//! Snapshots for unit tests, folded from events as the projector does, and a mesh whose endpoints flap. Only with the
//! feature `fixture`.

pub mod flaps;

use std::collections::{BTreeMap, BTreeSet};
use weft_model::ca::RootAdded;
use weft_model::membership::{InstanceRegistered, Upstreams};
use weft_model::security::{Action, SecurityPolicy, SecurityPolicySet};
use weft_model::service::{ServiceDeclared, ServicePort};
use weft_model::{
    Epoch, Event, Fact, InstanceId, Port, Position, Scope, SecurityScope, Timestamp, TrustDomain, Version,
};

use crate::{Projection, Snapshot};

/// Of every snapshot here.
#[must_use]
pub fn trust_domain() -> TrustDomain {
    "weft.test".parse().unwrap()
}

/// What `instance` runs when its service and it are all there is.
#[must_use]
pub fn snapshot(instance: &InstanceId) -> Snapshot {
    snapshot_after(&events(instance), instance)
}

/// The same, one policy later.
#[must_use]
pub fn changed_snapshot(instance: &InstanceId) -> Snapshot {
    let policy = SecurityPolicy { default: Some(Action::Deny), ..SecurityPolicy::default() };
    let mut events = events(instance);
    let scope = Scope::Security(SecurityScope::Service(instance.service.clone()));
    events.push((scope, Event::Security(SecurityPolicySet { policy }.into())));
    snapshot_after(&events, instance)
}

/// A trusted root, the service of `instance`, and itself.
#[must_use]
pub fn events(instance: &InstanceId) -> Vec<(Scope, Event)> {
    let root = RootAdded {
        trust_domain: trust_domain(),
        certificate_pem: "not parsed in unit tests".into(),
        sha256: "00".into(),
    };
    let port = ServicePort { name: "http".parse().unwrap(), port: Port::new(8080).unwrap() };
    let declared = ServiceDeclared { ports: vec![port], address: None };
    let registered = InstanceRegistered {
        address: [127, 0, 0, 1].into(),
        port: Port::new(15001).unwrap(),
        upstreams: Upstreams::Only(BTreeSet::from([instance.service.clone()])),
        metadata: Default::default(),
    };
    vec![
        (Scope::Ca, Event::Ca(root.into())),
        (Scope::Service(instance.service.clone()), Event::Service(declared.into())),
        (Scope::Membership(instance.clone()), Event::Membership(registered.into())),
    ]
}

/// Events as a log of them holds them.
#[must_use]
pub fn facts(events: &[(Scope, Event)]) -> Vec<Fact> {
    let mut versions: BTreeMap<&Scope, u64> = BTreeMap::new();
    let facts = events.iter().zip(1..).map(|((scope, event), position)| {
        let version = versions.entry(scope).or_default();
        *version += 1;
        Fact {
            epoch: Epoch(1),
            position: Position(position),
            version: Version(*version),
            at: Timestamp(0),
            actor: "test".into(),
            scope: scope.clone(),
            event: event.clone(),
        }
    });
    facts.collect()
}

fn snapshot_after(events: &[(Scope, Event)], instance: &InstanceId) -> Snapshot {
    let mut projection = Projection::default();
    projection.apply(&facts(events)).unwrap();
    let wanted = projection.wanted(instance).unwrap();
    let shards = projection.shards().values().map(|shard| (shard.hash, shard.bytes.clone())).collect();
    let manifest = &wanted.class.manifest;
    Snapshot::assemble(wanted.version, manifest.hash(), &manifest.encode(), &shards).unwrap()
}
