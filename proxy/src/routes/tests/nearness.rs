//! Which locality connections go to, while its endpoints fail and come back.

use super::*;
use weft_model::TrafficScope;
use weft_model::membership::{REGION, ZONE};
use weft_model::traffic::{LocalityPolicy, TrafficPolicySet};

/// Endpoints 0 to 9 run where the client does, 10 to 19 in another zone of the region, 20 to 29 far away.
pub(super) const EACH: usize = 10;
const PLACES: [(&str, &str); 3] = [("eu", "eu-a"), ("eu", "eu-b"), ("us", "us-a")];
/// Connections that are opened to see where they go.
const MANY: usize = 20_000;

pub(super) fn home() -> Locality {
    Locality { region: "eu".into(), zone: "eu-a".into() }
}

pub(super) fn preferring(prefer: Nearness, balance: Balance) -> TrafficPolicy {
    TrafficPolicy { locality: LocalityPolicy { prefer, threshold_percent: 70 }, ..policy(balance) }
}

/// A snapshot of them with these unhealthy. The last one of each place runs version 2, the first of all says nothing of a version.
pub(super) fn located(policy: &TrafficPolicy, unhealthy: &[usize]) -> Arc<Snapshot> {
    changed(3 * EACH, |events| {
        for index in 0..3 * EACH {
            let id: InstanceId = format!("default/api/api-{index}").parse().unwrap();
            let (region, zone) = PLACES[index / EACH];
            let version = if index % EACH == EACH - 1 { "2" } else { "1" };
            let mut metadata = vec![(REGION, region), (ZONE, zone), ("version", version)];
            metadata.truncate(if index == 0 { 2 } else { 3 });
            let registered = InstanceRegistered {
                address: [127, 0, 0, 1].into(),
                // Where it was before, or it would have to be observed anew.
                port: Port::new(u16::try_from(15_001 + index + usize::from(index > 0)).unwrap()).unwrap(),
                upstreams: Upstreams::All,
                metadata: metadata
                    .into_iter()
                    .map(|(key, value)| (key.to_owned(), value.to_owned()))
                    .collect(),
            };
            events.push((Scope::Membership(id), Event::Membership(registered.into())));
        }
        for index in unhealthy {
            let id: InstanceId = format!("default/api/api-{index}").parse().unwrap();
            let report = HealthReported {
                health: Health::Unhealthy,
                revision: 2,
                doubt: Some(0),
                detail: String::new(),
            };
            events.push((Scope::Health(id), Event::Health(report.into())));
        }
        let scope = TrafficScope { source: None, destination: "default/api".parse().unwrap() };
        events.push((
            Scope::Traffic(scope),
            Event::Traffic(TrafficPolicySet { policy: policy.clone() }.into()),
        ));
    })
}

pub(super) fn world(policy: TrafficPolicy, unhealthy: &[usize]) -> World {
    let routes = Routes::new(&located(&policy, unhealthy), None, &own(), &home());
    World { routes, policy, rng: SmallRng::seed_from_u64(5) }
}

/// How many of a thousand connections go to each place.
fn spread(world: &mut World) -> [usize; 3] {
    let mut spread = [0; 3];
    for _ in 0..MANY {
        let (index, _, mut load) = world.choose(&[]).unwrap();
        load.opened();
        spread[index / EACH] += 1;
    }
    spread.map(|count| count * 1_000 / MANY)
}

fn near(spread: [usize; 3], expected: [usize; 3]) -> bool {
    spread.iter().zip(expected).all(|(is, should)| is.abs_diff(should) <= 15)
}

#[test]
fn connections_stay_near_and_spill_over_in_proportion() {
    for balance in [Balance::LeastConnections, Balance::RoundRobin, Balance::Random, Balance::PeakEwma] {
        for (unhealthy, expected) in [
            (0, [1_000, 0, 0]),
            (3, [1_000, 0, 0]),
            (4, [857, 143, 0]),
            (5, [714, 286, 0]),
            (9, [142, 858, 0]),
            (10, [0, 1_000, 0]),
            (15, [0, 714, 286]),
        ] {
            let unhealthy: Vec<_> = (0..unhealthy).collect();
            let mut world = world(preferring(Nearness::Zone, balance), &unhealthy);
            let spread = spread(&mut world);
            assert!(near(spread, expected), "{balance:?}, {unhealthy:?} are down: {spread:?}");
        }
    }
}

#[test]
fn a_region_may_be_near_enough_and_so_may_be_the_world() {
    let mut by_region = world(preferring(Nearness::Region, Balance::Random), &[]);
    assert!(near(spread(&mut by_region), [500, 500, 0]));
    let mut by_nothing = world(preferring(Nearness::Any, Balance::Random), &[]);
    assert!(near(spread(&mut by_nothing), [333, 333, 333]));
    // A sidecar that does not say where it runs is near to nobody.
    let policy = preferring(Nearness::Zone, Balance::Random);
    let routes = Routes::new(&located(&policy, &[]), None, &own(), &HOME);
    let mut nowhere = World { routes, policy, rng: SmallRng::seed_from_u64(5) };
    assert!(near(spread(&mut nowhere), [333, 333, 333]));
}

#[test]
fn within_a_locality_turns_are_even() {
    let mut world = world(preferring(Nearness::Zone, Balance::RoundRobin), &[]);
    let mut given = [0; EACH];
    for _ in 0..500 * EACH {
        given[world.choose(&[]).unwrap().0] += 1;
    }
    assert_eq!(given, [500; EACH]);
}

#[test]
fn what_was_tried_here_is_tried_next_door_before_it_is_tried_far_away() {
    let mut world = world(preferring(Nearness::Zone, Balance::LeastConnections), &[]);
    let name = |index: usize| format!("api-{index}").parse::<Name>().unwrap();
    let here: Vec<_> = (0..EACH).map(name).collect();
    let both: Vec<_> = (0..2 * EACH).map(name).collect();
    let all: Vec<_> = (0..3 * EACH).map(name).collect();
    for _ in 0..200 {
        assert_eq!(world.choose(&here).unwrap().0 / EACH, 1);
        assert_eq!(world.choose(&both).unwrap().0 / EACH, 2);
    }
    assert!(matches!(world.choose(&all), Err(Unchosen::NoneLeft)));
}

#[test]
fn a_limit_here_is_room_next_door() {
    let limits = CircuitLimits { endpoint_connections: Some(2), ..CircuitLimits::default() };
    let mut world = world(TrafficPolicy { limits, ..preferring(Nearness::Zone, Balance::Random) }, &[]);
    let mut held = Vec::new();
    for place in 0..3 {
        for _ in 0..2 * EACH {
            let (index, _, load) = world.choose(&[]).unwrap();
            assert_eq!(index / EACH, place);
            held.push(load);
        }
    }
    assert!(matches!(world.choose(&[]), Err(Unchosen::Full("endpoint_connections"))));
}

/// Five of the ten fail for this sidecar alone: the mesh sees them healthy.
#[tokio::test(start_paused = true)]
async fn what_this_sidecar_ejects_counts_until_it_returns() {
    let mut world = world(preferring(Nearness::Zone, Balance::Random), &[]);
    let mut ejected = 0;
    for _ in 0..MANY {
        let (index, _, mut load) = world.choose(&[]).unwrap();
        if index < 5 {
            ejected += usize::from(matches!(load.failed(Cause::ConnectRefused), Some(Step::Ejected { .. })));
        } else {
            load.opened();
        }
    }
    assert_eq!(ejected, 5);
    let spilled = spread(&mut world);
    assert!(near(spilled, [714, 286, 0]), "{spilled:?}");
    pass(10_000).await;
    // One connection tries each; then all is as it was.
    let mut returned = 0;
    for _ in 0..MANY {
        let (.., mut load) = world.choose(&[]).unwrap();
        returned += usize::from(matches!(load.opened(), Some(Step::Returned { .. })));
    }
    assert_eq!(returned, 5);
    assert_eq!(spread(&mut world), [1_000, 0, 0]);
}

#[test]
fn a_source_stays_where_it_is_while_others_spill_over() {
    let policy = preferring(Nearness::Zone, Balance::Maglev);
    let routes = Routes::new(&located(&policy, &[0, 1, 2, 3, 4]), None, &own(), &home());
    let mut rng = SmallRng::seed_from_u64(5);
    let own = own();
    let mut places = [0; 3];
    for number in 0..4_000_u32 {
        let source = Source { address: Ipv4Addr::from(0x0a00_0000 + number).into(), own: &own };
        let mut choose = || {
            let chosen = routes.choose(&own.service, &policy, source, &[], &mut rng).unwrap();
            chosen.endpoint.instance.clone()
        };
        let first = choose();
        assert_eq!((choose(), choose()), (first.clone(), first.clone()));
        places[first.as_str().strip_prefix("api-").unwrap().parse::<usize>().unwrap() / EACH] += 1;
    }
    assert!(near(places.map(|count: usize| count / 4), [714, 286, 0]), "{places:?}");
}

#[test]
fn in_a_panic_it_is_no_matter_where() {
    let unhealthy: Vec<_> = (0..25).collect();
    let mut world = world(preferring(Nearness::Zone, Balance::Random), &unhealthy);
    assert!(world.routes.snapshot.endpoints[&own().service].panic);
    assert!(near(spread(&mut world), [333, 333, 333]));
}

#[test]
fn how_near_it_is_is_told() {
    let choose = |policy: TrafficPolicy| {
        let own = own();
        let routes = Routes::new(&located(&policy, &[]), None, &own, &home());
        let source = Source { address: Ipv4Addr::LOCALHOST.into(), own: &own };
        let chosen = routes.choose(&own.service, &policy, source, &[], &mut SmallRng::seed_from_u64(1));
        chosen.unwrap().near.map(Near::as_str)
    };
    assert_eq!(choose(preferring(Nearness::Zone, Balance::Random)), Some("zone"));
    assert_eq!(choose(preferring(Nearness::Region, Balance::Random)), Some("region"));
    assert_eq!(choose(preferring(Nearness::Any, Balance::Random)), None);
}
