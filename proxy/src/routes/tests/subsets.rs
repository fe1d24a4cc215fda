//! Which version connections go to, and what becomes of its part when it has nobody. The endpoints are those of [`super::nearness`].

use super::nearness::{EACH, home, located, preferring, world};
use super::*;
use weft_model::traffic::Subset;

const MANY: usize = 2_000;

fn subset(name: &str, version: &str, weight: u16) -> Subset {
    let labels = [("version".to_owned(), version.to_owned())].into();
    Subset { name: name.parse().unwrap(), labels, weight }
}

fn canary(balance: Balance, stable: u16, canary: u16) -> TrafficPolicy {
    TrafficPolicy {
        subsets: vec![subset("stable", "1", stable), subset("canary", "2", canary)],
        ..policy(balance)
    }
}

fn version(index: usize) -> usize {
    if index % EACH == EACH - 1 { 2 } else { usize::from(index > 0) }
}

/// How many of so many connections go to who says no version, to version 1 and to version 2.
fn versions(world: &mut World, connections: usize) -> [usize; 3] {
    let mut got = [0; 3];
    for _ in 0..connections {
        let (index, _, mut load) = world.choose(&[]).unwrap();
        load.opened();
        got[version(index)] += 1;
    }
    got
}

#[test]
fn a_canary_gets_exactly_its_part_however_endpoints_are_chosen() {
    for balance in Balance::ALL {
        let mut world = world(canary(balance, 95, 5), &[]);
        assert_eq!(versions(&mut world, MANY), [0, MANY * 95 / 100, MANY * 5 / 100], "{balance:?}");
        // Within a round it is spread.
        assert_eq!(versions(&mut world, 20), [0, 19, 1]);
    }
}

#[test]
fn the_part_of_a_subset_without_anybody_goes_to_the_others() {
    let mut without = world(canary(Balance::Random, 50, 50), &[9, 19, 29]);
    assert_eq!(versions(&mut without, 100), [0, 100, 0]);
    // Who belongs to no subset gets something when nobody else is left, and so does a subset without a weight.
    let mut withheld = world(canary(Balance::Random, 1, 0), &[]);
    assert_eq!(versions(&mut withheld, 100), [0, 100, 0]);
    let stable: Vec<Name> = (0..3 * EACH)
        .filter(|index| version(*index) == 1)
        .map(|index| format!("api-{index}").parse().unwrap())
        .collect();
    for _ in 0..20 {
        let (index, way, _load) = withheld.choose(&stable).unwrap();
        assert_eq!((version(index), way), (2, Way::Balanced));
    }
    let most: Vec<Name> = (1..3 * EACH).map(|index| format!("api-{index}").parse().unwrap()).collect();
    assert_eq!(withheld.choose(&most).unwrap().0, 0);
}

#[test]
fn a_retry_takes_no_turn() {
    let mut world = world(canary(Balance::LeastConnections, 3, 1), &[]);
    let mut got = [0; 3];
    for number in 0..400 {
        let (index, _, mut load) = world.choose(&[]).unwrap();
        got[version(index)] += 1;
        if number % 3 == 0 {
            // It did not work, and another one is tried.
            let tried = format!("api-{index}").parse().unwrap();
            load = world.choose(&[tried]).unwrap().2;
        }
        load.opened();
    }
    assert_eq!(got, [0, 300, 100]);
}

/// The three canaries fail; the last resort is not looked for while version 1 works.
#[tokio::test(start_paused = true)]
async fn an_ejected_canary_costs_no_connection() {
    let mut world = world(canary(Balance::Random, 1, 1), &[]);
    for _ in 0..MANY {
        let (index, way, mut load) = world.choose(&[]).unwrap();
        assert_ne!(way, Way::LastResort);
        if version(index) == 2 {
            load.failed(Cause::ConnectRefused)
        } else {
            load.opened()
        };
    }
    assert_eq!(world.routes.ejected(), 3);
    assert_eq!(versions(&mut world, 100), [0, 100, 0]);
}

#[test]
fn a_source_sticks_to_its_subset() {
    let sticky =
        |stable, weight| TrafficPolicy { sticky_sources: true, ..canary(Balance::Random, stable, weight) };
    let own = own();
    let of = |policy: &TrafficPolicy, number: u32| {
        let routes = Routes::new(&located(policy, &[]), None, &own, &HOME);
        let source = Source { address: Ipv4Addr::from(0x0a00_0000 + number).into(), own: &own };
        let mut rng = SmallRng::seed_from_u64(number.into());
        let mut subsets = (0..5).map(|_| {
            routes.choose(&own.service, policy, source, &[], &mut rng).unwrap().subset.cloned().unwrap()
        });
        let first = subsets.next().unwrap();
        assert!(subsets.all(|subset| subset == first));
        first
    };
    let canaries = |policy: &TrafficPolicy| -> Vec<u32> {
        (0..400).filter(|number| of(policy, *number).as_str() == "canary").collect()
    };
    let (few, more) = (canaries(&sticky(90, 10)), canaries(&sticky(80, 20)));
    assert!((25..60).contains(&few.len()) && (55..110).contains(&more.len()), "{few:?} {more:?}");
    assert!(few.iter().all(|source| more.contains(source)), "who has the canary keeps it while it grows");
}

#[test]
fn a_subset_has_localities_of_its_own() {
    let subsets = canary(Balance::LeastConnections, 3, 1).subsets;
    let mut world =
        world(TrafficPolicy { subsets, ..preferring(Nearness::Zone, Balance::LeastConnections) }, &[9]);
    let mut got = [[0; 3]; 3];
    for _ in 0..400 {
        let (index, _, mut load) = world.choose(&[]).unwrap();
        load.opened();
        got[version(index)][index / EACH] += 1;
    }
    // The canary at home is down, so its part goes next door.
    assert_eq!(got, [[0, 0, 0], [300, 0, 0], [0, 100, 0]]);
}

#[test]
fn which_subset_it_is_is_told() {
    let own = own();
    let choose = |policy: &TrafficPolicy| {
        let routes = Routes::new(&located(policy, &[]), None, &own, &home());
        let source = Source { address: Ipv4Addr::LOCALHOST.into(), own: &own };
        let chosen = routes.choose(&own.service, policy, source, &[], &mut SmallRng::seed_from_u64(1));
        chosen.unwrap().subset.map(ToString::to_string)
    };
    assert_eq!(choose(&canary(Balance::Random, 0, 1)).as_deref(), Some("canary"));
    assert_eq!(choose(&policy(Balance::Random)), None);
}
