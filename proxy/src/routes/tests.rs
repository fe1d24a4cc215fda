//! A service's endpoints under a simulated clock: what is chosen, who is ejected and when it comes back, to the millisecond.

mod nearness;
mod subsets;

use super::*;
use crate::outlier::{Cause, Share, State, Step};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::net::Ipv4Addr;
use std::time::Duration;
use weft_model::health::{Health, HealthReported};
use weft_model::membership::{InstanceRegistered, Upstreams};
use weft_model::traffic::{CircuitLimits, OutlierPolicy};
use weft_model::{Event, Port, Scope};
use weft_routing::{Projection, fixture};

const HOME: Locality = Locality { region: String::new(), zone: String::new() };

fn own() -> InstanceId {
    "default/api/api-0".parse().unwrap()
}

/// A snapshot with so many healthy endpoints, `api-0` among them.
fn snapshot(count: usize) -> Arc<Snapshot> {
    changed(count, |_| ())
}

/// The same after more has happened.
fn changed(count: usize, change: impl FnOnce(&mut Vec<(Scope, Event)>)) -> Arc<Snapshot> {
    let mut events = fixture::events(&own());
    for index in 0..count {
        let id: InstanceId = format!("default/api/api-{index}").parse().unwrap();
        let registered = InstanceRegistered {
            address: [127, 0, 0, 1].into(),
            port: Port::new(u16::try_from(15_002 + index).unwrap()).unwrap(),
            upstreams: Upstreams::Only([].into()),
            metadata: BTreeMap::new(),
        };
        if index > 0 {
            events.push((Scope::Membership(id.clone()), Event::Membership(registered.into())));
        }
        let health =
            HealthReported { health: Health::Healthy, revision: 1, doubt: Some(0), detail: String::new() };
        events.push((Scope::Health(id), Event::Health(health.into())));
    }
    change(&mut events);
    let mut projection = Projection::default();
    projection.apply(&fixture::facts(&events)).unwrap();
    let wanted = projection.wanted(&own()).unwrap();
    let shards = projection.shards().values().map(|shard| (shard.hash, shard.bytes.clone())).collect();
    let manifest = &wanted.class.manifest;
    Arc::new(Snapshot::assemble(wanted.version, manifest.hash(), &manifest.encode(), &shards).unwrap())
}

/// A sidecar's choices, and the clock.
struct World {
    routes: Routes,
    policy: TrafficPolicy,
    rng: SmallRng,
}

impl World {
    fn new(endpoints: usize, policy: TrafficPolicy) -> Self {
        let routes = Routes::new(&snapshot(endpoints), None, &own(), &HOME);
        Self { routes, policy, rng: SmallRng::seed_from_u64(11) }
    }

    fn choose(&mut self, tried: &[Name]) -> Result<(usize, Way, Load), Unchosen> {
        let own = own();
        let source = Source { address: Ipv4Addr::LOCALHOST.into(), own: &own };
        let chosen = self.routes.choose(&own.service, &self.policy, source, tried, &mut self.rng)?;
        let index = chosen.endpoint.instance.as_str().strip_prefix("api-").unwrap().parse().unwrap();
        Ok((index, chosen.way, chosen.load))
    }
}

async fn pass(milliseconds: u64) {
    tokio::time::advance(Duration::from_millis(milliseconds)).await;
}

fn policy(balance: Balance) -> TrafficPolicy {
    TrafficPolicy { balance, ..TrafficPolicy::default() }
}

#[test]
fn whose_turn_it_is_outlives_a_snapshot() {
    let instance = "default/web/web-1".parse().unwrap();
    let first = Routes::new(&Arc::new(fixture::snapshot(&instance)), None, &instance, &HOME);
    first.services[&instance.service].service.turns[0].store(5, Ordering::Relaxed);
    let second = Routes::new(&Arc::new(fixture::changed_snapshot(&instance)), Some(&first), &instance, &HOME);
    assert_eq!(second.services[&instance.service].service.turns[0].load(Ordering::Relaxed), 5);
}

/// A connection a millisecond, and one endpoint of four that refuses for 25 seconds: three failures, ten seconds without
/// one, a trial that fails, twenty seconds without one, a trial that opens.
#[tokio::test(start_paused = true)]
async fn an_endpoint_is_ejected_and_returns_exactly_as_it_is_written() {
    for balance in [Balance::RoundRobin, Balance::LeastConnections, Balance::PeakEwma, Balance::Random] {
        let mut world = World::new(4, policy(balance));
        let begin = clock::uptime_ms();
        let (mut failures, mut steps, mut given) = (Vec::new(), Vec::new(), [0; 4]);
        for _ in 0..60_000 {
            let now = clock::uptime_ms();
            let mut tried = Vec::new();
            // Every connection of the app works.
            loop {
                let (index, way, mut load) = world.choose(&tried).unwrap();
                given[index] += 1;
                if index == 2 && now - begin < 25_000 {
                    failures.push((now - begin, way));
                    steps.extend(load.failed(Cause::ConnectRefused).map(|step| (now - begin, step)));
                    tried.push("api-2".parse().unwrap());
                    assert!(tried.len() < 2, "it is not chosen twice for a connection");
                } else {
                    steps.extend(load.opened().map(|step| (now - begin, step)));
                    break;
                }
            }
            pass(1).await;
        }
        let ejected_at = failures[2].0;
        assert!(ejected_at < 100, "{failures:?}");
        let trial = ejected_at + 10_000;
        // A returning endpoint is chosen as any other: it may be some milliseconds until it is its turn.
        assert_eq!(failures.len(), 4, "{balance:?}: {failures:?}");
        assert!((trial..trial + 50).contains(&failures[3].0), "{balance:?}: {failures:?}");
        assert_eq!(failures[3].1, Way::Trial);
        let again = failures[3].0 + 20_000;
        let [(_, first), (_, second), (returned_at, third)] = steps[..] else {
            panic!("{balance:?}: {steps:?}")
        };
        assert!(
            matches!(
                first,
                Step::Ejected {
                    from: State::Closed,
                    in_a_row: 3,
                    ejections: 1,
                    length_ms: 10_000,
                    share: Some(Share { ejected: 0, endpoints: 4 }),
                    ..
                }
            ),
            "{first:?}"
        );
        assert!(
            matches!(
                second,
                Step::Ejected { from: State::Returning, in_a_row: 1, ejections: 2, length_ms: 20_000, .. }
            ),
            "{second:?}"
        );
        assert_eq!(third, Step::Returned { from: State::Returning, ejections: 2 });
        assert!((again..again + 50).contains(&returned_at), "{balance:?}: {returned_at}");
        assert!(given[2] > 1_000, "{balance:?}: it has its share again: {given:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_trial_comes_at_the_very_millisecond() {
    let mut world = World::new(1, policy(Balance::LeastConnections));
    for _ in 0..3 {
        world.choose(&[]).unwrap().2.failed(Cause::ConnectTimeout);
    }
    let way = |world: &mut World| world.choose(&[]).unwrap().1;
    assert_eq!(way(&mut world), Way::LastResort);
    pass(9_999).await;
    assert_eq!(way(&mut world), Way::LastResort);
    pass(1).await;
    assert_eq!(way(&mut world), Way::Trial);
    let (_, first, _load) = world.choose(&[]).unwrap();
    assert_eq!(
        (first, way(&mut world)),
        (Way::Trial, Way::LastResort),
        "one at a time, unless nothing else is left"
    );
}

#[tokio::test(start_paused = true)]
async fn all_but_one_may_fail_and_no_connection_does() {
    let outlier_detection = OutlierPolicy { ejected_percent_max: 100, ..OutlierPolicy::default() };
    for balance in Balance::ALL {
        let mut world = World::new(3, TrafficPolicy { outlier_detection, ..policy(balance) });
        let mut attempts = 0;
        for _ in 0..500 {
            let mut tried = Vec::new();
            loop {
                let (index, _, mut load) = world.choose(&tried).unwrap();
                attempts += 1;
                if index == 1 {
                    load.opened();
                    break;
                }
                load.failed(Cause::TlsFailed);
                tried.push(format!("api-{index}").parse().unwrap());
                assert!(tried.len() <= 2, "two retries are enough");
            }
            pass(10).await;
        }
        // Six failures until both are ejected; nobody's time is up within five seconds.
        assert_eq!(attempts, 506, "{balance:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_says_which_it_is() {
    let limits =
        CircuitLimits { endpoint_pending: Some(1), service_connections: Some(5), ..CircuitLimits::default() };
    let mut world = World::new(3, TrafficPolicy { limits, ..TrafficPolicy::default() });
    let mut loads: Vec<_> = (0..3).map(|_| world.choose(&[]).unwrap().2).collect();
    assert_eq!(world.choose(&[]).unwrap_err(), Unchosen::Full("endpoint_pending"));
    loads[0].opened();
    let one_more = world.choose(&[]).unwrap();
    loads[1].opened();
    let another = world.choose(&[]).unwrap();
    loads[2].opened();
    assert_eq!(world.choose(&[]).unwrap_err(), Unchosen::Full("service_connections"));
    drop((one_more, another));
    let all: Vec<Name> = (0..3).map(|index| format!("api-{index}").parse().unwrap()).collect();
    assert_eq!(world.choose(&all).unwrap_err(), Unchosen::NoneLeft);
}

#[tokio::test(start_paused = true)]
async fn ejections_and_slow_starts_outlive_a_snapshot_and_new_endpoints_start_slowly() {
    let mut world = World::new(2, TrafficPolicy { slow_start_ms: 10_000, ..policy(Balance::RoundRobin) });
    let service = own().service;
    let warmth = |world: &World, index: usize| {
        world.routes.services[&service].endpoints[index].warmth(10_000, clock::uptime_ms())
    };
    assert_eq!((warmth(&world, 0), warmth(&world, 1)), (balance::WARM, balance::WARM));
    while world.routes.ejected() == 0 {
        let (index, _, mut load) = world.choose(&[]).unwrap();
        if index == 1 {
            load.failed(Cause::ConnectRefused)
        } else {
            load.opened()
        };
    }
    pass(5_000).await;
    world.routes = Routes::new(&snapshot(3), Some(&world.routes), &own(), &HOME);
    assert_eq!(world.routes.ejected(), 1);
    assert_eq!((warmth(&world, 0), warmth(&world, 2)), (balance::WARM, balance::WARM / 10));
    pass(5_000).await;
    assert_eq!(warmth(&world, 2), balance::WARM / 2);
    world.routes = Routes::new(&snapshot(4), Some(&world.routes), &own(), &HOME);
    assert_eq!((warmth(&world, 2), warmth(&world, 3)), (balance::WARM / 2, balance::WARM / 10));
}

fn health(index: usize, health: Health, revision: u64) -> (Scope, Event) {
    let id: InstanceId = format!("default/api/api-{index}").parse().unwrap();
    let report = HealthReported { health, revision, doubt: Some(0), detail: String::new() };
    (Scope::Health(id), Event::Health(report.into()))
}

#[tokio::test(start_paused = true)]
async fn news_of_an_endpoint_bring_its_return_forward_and_another_address_has_no_past() {
    let mut world = World::new(2, policy(Balance::RoundRobin));
    while world.routes.ejected() == 0 {
        let (index, _, mut load) = world.choose(&[]).unwrap();
        if index == 1 {
            load.failed(Cause::ConnectRefused)
        } else {
            load.opened()
        };
    }
    pass(1_000).await;
    let down = changed(2, |events| events.push(health(1, Health::Unhealthy, 2)));
    world.routes = Routes::new(&down, Some(&world.routes), &own(), &HOME);
    for _ in 0..9 {
        assert_eq!(world.choose(&[]).unwrap().0, 0);
    }
    let up = changed(2, |events| {
        events.extend([health(1, Health::Unhealthy, 2), health(1, Health::Healthy, 3)]);
    });
    world.routes = Routes::new(&up, Some(&world.routes), &own(), &HOME);
    assert_eq!(world.routes.ejected(), 1, "it is not forgiven");
    let loads: Vec<_> = (0..9).map(|_| world.choose(&[]).unwrap()).collect();
    let trials: Vec<_> = loads.iter().filter(|(index, ..)| *index == 1).map(|(_, way, _)| *way).collect();
    assert_eq!(trials, [Way::Trial]);
    drop(loads);

    let moved = changed(2, |events| {
        let registered = InstanceRegistered {
            address: [127, 0, 0, 1].into(),
            port: Port::new(19_999).unwrap(),
            upstreams: Upstreams::Only([].into()),
            metadata: BTreeMap::new(),
        };
        let id = "default/api/api-1".parse().unwrap();
        events.extend([health(1, Health::Unhealthy, 2), health(1, Health::Healthy, 3)]);
        events.push((Scope::Membership(id), Event::Membership(registered.into())));
    });
    world.routes = Routes::new(&moved, Some(&world.routes), &own(), &HOME);
    assert_eq!(world.routes.ejected(), 0);
}
