use super::*;
use weft_model::health::{Health, HealthReported};
use weft_model::service::{ServiceDeclared, ServicePort};
use weft_model::{Epoch, Event, Fact, Port, Version};
use weft_routing::{Snapshot, fixture};

fn instance() -> InstanceId {
    "default/web/web-1".parse().unwrap()
}

/// A mesh of one instance, which is observed so many times.
fn facts(reports: u64) -> Vec<Fact> {
    let report = |revision: u64| {
        let health = if revision.is_multiple_of(2) { Health::Unhealthy } else { Health::Healthy };
        let report = HealthReported { health, revision, doubt: Some(0), detail: String::new() };
        (Scope::Health(instance()), Event::Health(report.into()))
    };
    let mut events = fixture::events(&instance());
    events.extend((1..=reports).map(report));
    fixture::facts(&events)
}

/// Published event by event, with what the sidecar was to run after each.
fn published(facts: &[Fact]) -> (Published, Vec<Snapshot>) {
    let (mut projection, mut published, mut snapshots) =
        (Projection::default(), Published::default(), Vec::new());
    for fact in facts {
        let changes = projection.apply([fact]).unwrap();
        published.take_in(Delta::new(&projection, &changes, [&fact.scope]), Instant::now());
        if let Some(wanted) = projection.wanted(&instance()) {
            let shards =
                projection.shards().values().map(|shard| (shard.hash, shard.bytes.clone())).collect();
            let manifest = &wanted.class.manifest;
            let snapshot = Snapshot::assemble(wanted.version, manifest.hash(), &manifest.encode(), &shards);
            snapshots.push(snapshot.unwrap());
        }
    }
    (published, snapshots)
}

fn applied(patch: &Patch, to: &Snapshot, wanted: &WantedSnapshot<'_>) -> Snapshot {
    let changes = patch.shards.iter().map(|shard| {
        let key = to.manifest.key_at(shard.place).unwrap().clone();
        let former = to.shard(&key).unwrap();
        let bytes = shard.change.as_ref().map(|change| match change {
            ShardChange::Splice(splice) => Arc::from(splice.apply(former).unwrap()),
            ShardChange::Delta { zstd, length } => {
                let mut delta = zstd::bulk::Decompressor::with_dictionary(former).unwrap();
                Arc::from(delta.decompress(zstd, *length).unwrap())
            }
        });
        (key, shard.position, bytes)
    });
    to.patched(wanted.version, wanted.class.manifest.hash().start(), changes).unwrap()
}

#[test]
fn a_patch_leads_from_whatever_is_remembered_to_the_newest() {
    let (published, snapshots) = published(&facts(8));
    let wanted = published.wanted(&instance()).unwrap();
    let (newest, earlier) = snapshots.split_last().unwrap();
    let from = |old: &Snapshot| published.patch(wanted.class, old.manifest_hash);
    // Of each shard so many former contents are remembered; whoever is further behind pulls.
    let (far, near) = earlier.split_at(earlier.len() - FORMER_MAX);
    for old in near {
        assert_eq!(&applied(&from(old).unwrap(), old, &wanted), newest);
    }
    assert!(!far.is_empty() && far.iter().all(|old| from(old).is_none()));
    assert_eq!(from(newest).map(|patch| patch.shards.len()), Some(0));
}

#[test]
fn what_callers_claim_to_have_takes_no_memory() {
    let (published, _) = published(&facts(1));
    let wanted = published.wanted(&instance()).unwrap();
    for n in 0..100_u8 {
        assert!(published.patch(wanted.class, Hash::of(&[n])).is_none());
    }
    assert!(wanted.class.patches.lock().unwrap().is_empty());
}

#[test]
fn a_feed_tells_what_concerns_its_class_and_nothing_else() {
    let (mut projection, mut published) = (Projection::default(), Published::default());
    let facts = facts(1);
    let mut publish = |published: &mut Published, facts: &[Fact]| {
        let changes = projection.apply(facts).unwrap();
        let scopes: Vec<_> = facts.iter().map(|fact| &fact.scope).collect();
        published.take_in(Delta::new(&projection, &changes, scopes), Instant::now());
    };
    publish(&mut published, &facts[..3]);
    let mut feed = published.feed(&instance()).unwrap();
    assert!(published.feed(&"default/web/other".parse().unwrap()).is_none());
    feed.mark_unchanged();
    publish(&mut published, &facts[3..]);
    assert!(feed.has_changed().unwrap());
    feed.mark_unchanged();
    // Another service, which nobody here connects to.
    let port = ServicePort { name: "http".parse().unwrap(), port: Port::new(80).unwrap() };
    let declared = ServiceDeclared { ports: vec![port], address: None };
    let mut other = facts[1].clone();
    (other.position, other.scope) = (Position(5), Scope::Service("default/other".parse().unwrap()));
    other.event = Event::Service(declared.into());
    publish(&mut published, &[other.clone()]);
    assert!(!feed.has_changed().unwrap());
    // A new epoch is a new version for everybody.
    (other.epoch, other.position, other.version) = (Epoch(2), Position(6), Version(2));
    publish(&mut published, &[other]);
    assert!(feed.has_changed().unwrap());
}
