//! What one change costs, in the controller's fold and in the sidecar that takes its patch.
//!
//!     cargo bench -p weft-routing --bench change
//!
//! In a mesh of 10 and of 1,000 services with 50 instances each, of which each names five others: an instance moves to another port.
//! Then in one service of 1,000, 5,000 and 10,000 instances: the same, how the patch is made, and how a snapshot becomes the
//! next one by it. Each figure is the median of many changes, in CPU time of one thread, all in memory. The last line is JSON.

#![expect(clippy::unwrap_used, reason = "a bench that cannot run fails")]

use nix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;
use weft_model::membership::{InstanceRegistered, MembershipState};
use weft_model::{Decoder, Epoch, Event, Fact, InstanceId, Port, Scope};
use weft_routing::{Projection, ShardKey, Snapshot, Splice};

#[path = "fold/mesh.rs"]
mod mesh;

/// Changes that are measured, of different instances.
const CHANGES: usize = 200;

fn main() {
    let mut json = String::from("{");
    let small = median(&mut changes(&mut projection(10, 50)));
    let large = median(&mut changes(&mut projection(1_000, 50)));
    println!("one change, 10 services x 50: {small} us; 1,000 services x 50: {large} us");
    write!(json, "\"change_us_10\":{small},\"change_us_1000\":{large}").unwrap();
    for instances in [1_000, 5_000, 10_000] {
        let [fold, patch, take] = one_service(instances);
        println!("one service of {instances}: fold {fold} us, patch {patch} us, take {take} us");
        write!(
            json,
            ",\"fold_us_{instances}\":{fold},\"patch_us_{instances}\":{patch},\"take_us_{instances}\":{take}"
        )
        .unwrap();
    }
    println!("{json}}}");
}

/// A mesh as it is when everybody has come.
fn projection(services: usize, instances: usize) -> Projection {
    let events = mesh::events(services, instances, 0);
    let mut decoder = Decoder::default();
    let mut bulk = Projection::default().into_bulk();
    for event in &events {
        bulk.apply([&decoder.decode(&event.view()).unwrap()]).unwrap();
    }
    bulk.finish()
}

/// The next event: the instance moves to another port.
fn moves(projection: &Projection, id: &InstanceId) -> Fact {
    let entry = projection.state().membership(id).unwrap();
    let MembershipState::Ready(registration) = &entry.state else { unreachable!("it is there") };
    let port = Port::new(registration.port.number() ^ 1).unwrap();
    Fact {
        epoch: Epoch(1),
        position: projection.version().position.next(),
        version: entry.source.version.next(),
        at: projection.state().at(),
        actor: "bench".into(),
        scope: Scope::Membership(id.clone()),
        event: Event::Membership(InstanceRegistered { port, ..registration.clone() }.into()),
    }
}

/// Microseconds of each change.
fn changes(projection: &mut Projection) -> Vec<u128> {
    let ids: Vec<_> = projection.sidecars().cloned().collect();
    let step = (ids.len() / CHANGES).max(1);
    let one = |id: &InstanceId| {
        let fact = moves(projection, id);
        timed(|| drop(black_box(projection.apply([&fact]).unwrap())))
    };
    ids.iter().step_by(step).map(one).collect()
}

/// Of a change in a service: its fold, its patch, and what the sidecar of an instance makes of it.
fn one_service(instances: usize) -> [u128; 3] {
    // Its instances name it, among others that do not exist.
    let mut projection = projection(1, instances);
    let ids: Vec<_> = projection.sidecars().cloned().collect();
    let key = ShardKey::Endpoints(ids[0].service.clone());
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    let mut snapshot = whole(&projection, &ids[0]);
    for id in ids.iter().step_by(ids.len() / CHANGES) {
        let fact = moves(&projection, id);
        let old = Arc::clone(&projection.shards()[&key].bytes);
        times[0].push(timed(|| drop(black_box(projection.apply([&fact]).unwrap()))));
        let shard = &projection.shards()[&key];
        let mut splice = Splice::default();
        times[1].push(timed(|| splice = Splice::between(&old, &shard.bytes)));
        let wanted = projection.wanted(&ids[0]).unwrap();
        let mut next = None;
        times[2].push(timed(|| {
            let bytes: Arc<[u8]> = splice.apply(snapshot.shard(&key).unwrap()).unwrap().into();
            let change = (key.clone(), shard.position, Some(bytes));
            next = Some(
                snapshot.patched(wanted.version, wanted.class.manifest.hash().start(), [change]).unwrap(),
            );
        }));
        snapshot = next.unwrap();
    }
    assert_eq!(snapshot, whole(&projection, &ids[0]));
    times.map(|mut times| median(&mut times))
}

fn whole(projection: &Projection, id: &InstanceId) -> Snapshot {
    let wanted = projection.wanted(id).unwrap();
    let shards: BTreeMap<_, _> =
        projection.shards().values().map(|shard| (shard.hash, Arc::clone(&shard.bytes))).collect();
    let manifest = &wanted.class.manifest;
    Snapshot::assemble(wanted.version, manifest.hash(), &manifest.encode(), &shards).unwrap()
}

/// Microseconds that this thread computed: what else runs on the machine does not count.
fn timed(work: impl FnOnce()) -> u128 {
    let now = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
    let started = now();
    work();
    (now() - started).as_micros()
}

fn median(times: &mut [u128]) -> u128 {
    times.sort_unstable();
    times[times.len() / 2]
}
