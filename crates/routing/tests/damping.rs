//! Damping by itself: endpoints that flap, controllers that come and go, and the clock, all simulated.
#![expect(clippy::unwrap_used, reason = "a broken simulation fails the test")]

use proptest::prelude::*;
use std::time::Duration;
use weft_model::damping::DampingSettings;
use weft_model::health::{Health, HealthCommand, HealthEvent, HealthReported};
use weft_model::membership::MembershipCommand;
use weft_model::mesh::MeshDefaults;
use weft_model::{Command, Event, InstanceId, Rejection, Scope};
use weft_routing::damping::guard::standing;
use weft_routing::damping::{self, Penalty};
use weft_routing::fixture::flaps::{Figures, Mesh, flapper};
use weft_routing::why::explain;
use weft_routing::{Checkpoint, Projection};

const SECOND: Duration = Duration::from_secs(1);

fn types(mesh: &Mesh, from: usize) -> Vec<&'static str> {
    mesh.facts[from..].iter().map(|fact| fact.event.type_name()).collect()
}

fn published(mesh: &Mesh, id: &InstanceId) -> Health {
    mesh.projection.state().health_seen(id)
}

fn is_held(mesh: &Mesh, id: &InstanceId) -> bool {
    mesh.projection.state().held().any(|held| held == id)
}

/// So many downs and ups in a row, each lasting `every`.
fn flap(mesh: &mut Mesh, controller: usize, id: &InstanceId, times: usize, every: Duration) {
    for _ in 0..times {
        mesh.report(controller, id, Health::Unhealthy).unwrap();
        mesh.pass(every);
        mesh.report(controller, id, Health::Healthy).unwrap();
        mesh.pass(every);
    }
}

/// The figure that the design promises.
#[test]
fn a_flapper_costs_a_mesh_next_to_nothing() {
    let figures = flapper(10, SECOND, Duration::from_secs(600));
    let Figures { raw, changes, events, released_after } = figures;
    assert!(raw >= 600, "{figures:?}");
    assert!(changes <= 8, "{figures:?}");
    assert!(events <= 70, "{figures:?}");
    let released = released_after.unwrap();
    assert!(released > Duration::from_secs(130) && released < Duration::from_secs(160), "{figures:?}");
}

/// However fast it flaps; the bounds of a service that it cannot do without are those of its reports.
#[test]
fn no_endpoint_floods_the_log() {
    let fast = flapper(10, Duration::from_millis(10), Duration::from_secs(60));
    assert!(fast.changes <= 8 && fast.events <= 16, "{fast:?}");
    let only = flapper(1, Duration::from_millis(10), Duration::from_secs(60));
    assert!(only.events <= 70, "{only:?}");
    assert_eq!(only.released_after, None, "a service's only endpoint is not held");
}

#[test]
fn four_downs_in_a_burst_hold_for_a_good_minute() {
    let mut mesh = Mesh::new(5, 1);
    let id = mesh.instance(2);
    let from = mesh.facts.len();
    flap(&mut mesh, 0, &id, 3, SECOND / 4);
    assert_eq!(published(&mesh, &id), Health::Healthy);
    assert!(!is_held(&mesh, &id));
    mesh.report(0, &id, Health::Unhealthy).unwrap();
    assert!(is_held(&mesh, &id));
    assert_eq!(types(&mesh, from), ["HealthReported"; 7]);

    // Up again: counted, and recorded within ten seconds. It stays unhealthy for everybody.
    mesh.report(0, &id, Health::Healthy).unwrap();
    assert_eq!(types(&mesh, from).len(), 7);
    mesh.pass(11 * SECOND);
    assert_eq!(types(&mesh, from)[7..], ["FlapsSummarized"]);
    assert_eq!(published(&mesh, &id), Health::Unhealthy);
    assert_eq!(mesh.projection.state().health_reported(&id), Health::Healthy);
    let why = explain(&mesh.projection, &mesh.service, &mesh.service, weft_model::Port::new(80).unwrap());
    let steps = why.unwrap().steps;
    let step = steps.iter().find(|step| step.question == "does e2 flap?").unwrap();
    let (scope, source) = step.rests_on.clone().unwrap();
    assert_eq!((scope, source.position.0), (Scope::Health(id.clone()), from as u64 + 7));
    assert!(step.answer.contains("held down") && step.answer.contains("let go in"), "{}", step.answer);

    let held = mesh.now;
    while is_held(&mesh, &id) {
        mesh.pass(SECOND / 4);
    }
    // From nearly 4,000 points to 750 it takes 72 s, and there is a second of grace.
    let took = mesh.now.since(held) + 11 * SECOND;
    assert!(took > Duration::from_secs(70) && took < Duration::from_secs(75), "{took:?}");
    assert_eq!(types(&mesh, from)[8..], ["DampingReleased"]);
    assert_eq!(published(&mesh, &id), Health::Healthy);
}

#[test]
fn a_rolling_deploy_of_a_flapping_service_is_not_held() {
    let mut mesh = Mesh::new(20, 1);
    for round in 0..5 {
        for number in 0..20 {
            let id = mesh.instance(number);
            mesh.report(0, &id, Health::Unhealthy).unwrap();
            mesh.execute(Command::Membership(id.clone(), MembershipCommand::Drain)).unwrap();
            mesh.execute(Command::Membership(id.clone(), MembershipCommand::Deregister)).unwrap();
            mesh.pass(SECOND / 2);
            mesh.join(&id);
            assert!(mesh.projection.state().damping(&id).is_none(), "round {round}: who is back starts anew");
        }
    }
    assert_eq!(mesh.projection.state().held().len(), 0);
}

#[test]
fn a_changed_registration_counts_a_little() {
    let mut mesh = Mesh::new(5, 1);
    let id = mesh.instance(0);
    for zone in ["b", "b", "c"] {
        mesh.register(&id, zone);
    }
    let damping = mesh.projection.state().damping(&id).unwrap();
    assert_eq!(damping.penalty, Penalty::of(500));
    assert_eq!(published(&mesh, &id), Health::Healthy);
}

#[test]
fn what_a_dead_controller_counted_is_lost_without_harm() {
    let mut mesh = Mesh::new(5, 2);
    let id = mesh.instance(0);
    flap(&mut mesh, 0, &id, 4, SECOND);
    assert!(is_held(&mesh, &id));
    // It is up when the controller dies, and nothing of that is in the log. The sidecar tells the next one.
    mesh.crash(0);
    assert_eq!(mesh.projection.state().health_reported(&id), Health::Unhealthy);
    mesh.report(1, &id, Health::Healthy).unwrap();
    mesh.pass(11 * SECOND);
    assert_eq!(mesh.projection.state().health_reported(&id), Health::Healthy);
    mesh.pass(160 * SECOND);
    assert_eq!(published(&mesh, &id), Health::Healthy);

    // And the other way round: what died believed that it is up.
    flap(&mut mesh, 0, &id, 4, SECOND);
    mesh.report(0, &id, Health::Unhealthy).unwrap();
    mesh.crash(0);
    mesh.report(1, &id, Health::Unhealthy).unwrap();
    mesh.pass(200 * SECOND);
    assert_eq!(published(&mesh, &id), Health::Unhealthy, "it is down and stays so");
    mesh.report(1, &id, Health::Healthy).unwrap();
    mesh.pass(7 * SECOND);
    assert_eq!(published(&mesh, &id), Health::Healthy);
}

#[test]
fn of_two_controllers_the_one_with_the_last_report_is_believed() {
    let mut mesh = Mesh::new(5, 2);
    let id = mesh.instance(0);
    flap(&mut mesh, 0, &id, 4, SECOND);
    mesh.pass(12 * SECOND);
    mesh.report_as(0, &id, Health::Unhealthy, 100).unwrap();
    mesh.report_as(1, &id, Health::Healthy, 101).unwrap();
    // The second one's counts come first; the first one's are older and are dropped.
    mesh.counting.swap(0, 1);
    let from = mesh.facts.len();
    mesh.pass(12 * SECOND);
    assert_eq!(types(&mesh, from), ["HealthReported"]);
    assert_eq!(mesh.projection.state().health_reported(&id), Health::Healthy);
    assert!(mesh.counting.iter().all(damping::Counting::is_empty));
}

#[test]
fn stale_reports_are_refused_whether_recorded_or_counted() {
    let mut mesh = Mesh::new(5, 1);
    let id = mesh.instance(0);
    flap(&mut mesh, 0, &id, 4, SECOND);
    mesh.report_as(0, &id, Health::Healthy, 200).unwrap();
    for (health, revision) in [(Health::Unhealthy, 200), (Health::Unhealthy, 150), (Health::Healthy, 1)] {
        assert_eq!(
            mesh.report_as(0, &id, health, revision),
            Err(Rejection::StaleObservation { current: 200 })
        );
    }
    // The same again is a repeat whose answer was lost.
    mesh.report_as(0, &id, Health::Healthy, 200).unwrap();
}

#[test]
fn two_controllers_do_not_let_go_twice() {
    let mut mesh = Mesh::new(5, 1);
    let id = mesh.instance(0);
    flap(&mut mesh, 0, &id, 4, SECOND);
    mesh.pass(12 * SECOND);
    let mut later = mesh.clone();
    while damping::due(later.projection.state(), later.now).is_empty() {
        later.now = later.now.after(SECOND);
    }
    let reconsider = || Command::Health(id.clone(), HealthCommand::Reconsider);
    assert_eq!(later.execute(reconsider()).unwrap(), 1);
    assert_eq!(later.execute(reconsider()).unwrap(), 0);
    assert_eq!(mesh.execute(reconsider()).unwrap(), 0, "it is not time");
}

#[test]
fn switched_off_it_lets_everything_go() {
    let mut mesh = Mesh::new(5, 1);
    let id = mesh.instance(0);
    flap(&mut mesh, 0, &id, 4, SECOND);
    assert!(is_held(&mesh, &id));
    let off = DampingSettings { enabled: false, ..DampingSettings::default() };
    mesh.execute(Command::Mesh(MeshDefaults { damping: off, ..MeshDefaults::default() })).unwrap();
    mesh.pass(SECOND);
    assert_eq!(published(&mesh, &id), Health::Healthy);
    let from = mesh.changes;
    flap(&mut mesh, 0, &id, 10, SECOND);
    assert_eq!(mesh.changes - from, 20);
}

#[test]
fn observations_from_before_there_was_damping_do_not_count() {
    let mut mesh = Mesh::new(5, 1);
    let id = mesh.instance(0);
    for revision in 100..140 {
        let health = if revision % 2 == 0 { Health::Unhealthy } else { Health::Healthy };
        let report = HealthReported { health, revision, doubt: None, detail: String::new() };
        mesh.execute(Command::Health(id.clone(), HealthCommand::Report(report))).unwrap();
    }
    assert!(mesh.projection.state().damping(&id).is_none());
    assert_eq!(published(&mesh, &id), Health::Healthy);
}

#[test]
fn what_a_service_needs_is_let_go() {
    let mut mesh = Mesh::new(10, 1);
    let flappers: Vec<_> = (0..3).map(|number| mesh.instance(number)).collect();
    for (more, id) in flappers.iter().enumerate() {
        flap(&mut mesh, 0, id, 4 + more, SECOND / 4);
    }
    assert!(flappers.iter().all(|id| is_held(&mesh, id)));
    mesh.pass(12 * SECOND);
    // A fourth one is over the 30 %.
    let fourth = mesh.instance(3);
    flap(&mut mesh, 0, &fourth, 5, SECOND / 4);
    mesh.pass(3 * SECOND);
    assert!(!is_held(&mesh, &fourth));
    assert_eq!(published(&mesh, &fourth), Health::Healthy);
    // Others go down: half of ten is needed, so the calmest is let go first.
    for number in 4..7 {
        let id = mesh.instance(number);
        mesh.report(0, &id, Health::Unhealthy).unwrap();
    }
    let from = mesh.facts.len();
    mesh.pass(SECOND / 4);
    assert_eq!(types(&mesh, from), ["DampingOverridden"]);
    let Event::Health(HealthEvent::DampingOverridden(told)) = &mesh.facts[from].event else { unreachable!() };
    assert_eq!((told.usable, told.of, told.held), (4, 10, 3));
    assert_eq!(mesh.facts[from].scope, Scope::Health(flappers[0].clone()));
    assert_eq!(published(&mesh, &flappers[0]), Health::Healthy);
    assert!(!mesh.endpoints().unwrap().panic);
    // All the rest: nothing is left to let go, and the service is in panic. Unobserved ones stay out of it.
    for number in 3..10 {
        let id = mesh.instance(number);
        mesh.report(0, &id, Health::Unhealthy).unwrap();
        mesh.pass(SECOND);
    }
    let unobserved = mesh.instance(10);
    mesh.register(&unobserved, "a");
    let shard = mesh.endpoints().unwrap();
    assert!(shard.panic);
    let takes = |endpoint: &&weft_routing::shard::Endpoint| shard.takes(endpoint);
    assert_eq!(shard.endpoints.iter().filter(takes).count(), 10);
    assert!(!shard.endpoints.iter().filter(takes).any(|endpoint| endpoint.instance == unobserved.instance));
    let why = explain(&mesh.projection, &mesh.service, &mesh.service, weft_model::Port::new(80).unwrap());
    assert!(why.unwrap().steps.iter().any(|step| step.answer.contains("in panic")));
}

#[derive(Clone, Debug)]
enum Act {
    Report { controller: usize, instance: usize, healthy: bool },
    Late { controller: usize, instance: usize, healthy: bool, revision: u64 },
    Pass(u64),
    Crash(usize),
    Leave(usize),
    Join(usize),
    Zone(usize, bool),
    Switch(bool),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        12 => (0..2_usize, 0..6_usize, any::<bool>())
            .prop_map(|(controller, instance, healthy)| Act::Report { controller, instance, healthy }),
        1 => (0..2_usize, 0..6_usize, any::<bool>(), 1..60_u64).prop_map(|(controller, instance, healthy, revision)| {
            Act::Late { controller, instance, healthy, revision }
        }),
        4 => (1..30_000_u64).prop_map(Act::Pass),
        1 => (0..2_usize).prop_map(Act::Crash),
        1 => (0..6_usize).prop_map(Act::Leave),
        2 => (0..6_usize).prop_map(Act::Join),
        1 => (0..6_usize, any::<bool>()).prop_map(|(instance, other)| Act::Zone(instance, other)),
        1 => prop::bool::weighted(0.8).prop_map(Act::Switch),
    ]
}

fn health(healthy: bool) -> Health {
    if healthy { Health::Healthy } else { Health::Unhealthy }
}

/// Plays acts, and what every sidecar believes of itself.
fn play(acts: &[Act]) -> (Mesh, Vec<Option<Health>>) {
    let mut mesh = Mesh::new(6, 2);
    let mut truth = vec![Some(Health::Healthy); 6];
    for act in acts {
        match *act {
            Act::Report { controller, instance, healthy } => {
                let id = mesh.instance(instance);
                if mesh.report(controller, &id, health(healthy)).is_ok() {
                    truth[instance] = Some(health(healthy));
                }
            }
            Act::Late { controller, instance, healthy, revision } => {
                let id = mesh.instance(instance);
                // A revision that is taken belongs to another report; whether it is refused is what matters.
                if mesh.report_as(controller, &id, health(healthy), revision).is_ok() {
                    truth[instance] = None;
                }
            }
            Act::Pass(ms) => mesh.pass(Duration::from_millis(ms)),
            Act::Crash(controller) => {
                mesh.crash(controller);
                // Its sidecars go to the other one, and say how they are.
                for (instance, health) in truth.iter().enumerate() {
                    if let Some(health) = health {
                        let _ = mesh.report(1 - controller, &mesh.instance(instance), *health);
                    }
                }
            }
            Act::Leave(instance) => {
                let leave = MembershipCommand::Deregister;
                let _ = mesh.execute(Command::Membership(mesh.instance(instance), leave));
                truth[instance] = None;
            }
            Act::Join(instance) => {
                mesh.register(&mesh.instance(instance), "a");
            }
            Act::Zone(instance, other) => {
                mesh.register(&mesh.instance(instance), if other { "b" } else { "a" });
            }
            Act::Switch(enabled) => {
                let damping = DampingSettings { enabled, ..DampingSettings::default() };
                let defaults = MeshDefaults { damping, ..MeshDefaults::default() };
                mesh.execute(Command::Mesh(defaults)).unwrap();
            }
        }
    }
    (mesh, truth)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// I2: incremental equals full, one by one equals all at once, and a checkpoint in between changes nothing.
    #[test]
    fn the_fold_is_the_same_however_it_is_done(acts in prop::collection::vec(act(), 1..150), cut in any::<prop::sample::Index>()) {
        let (mesh, _) = play(&acts);
        prop_assert_eq!(&mesh.projection.recompute(), &mesh.projection);
        let mut at_once = Projection::default();
        at_once.apply(&mesh.facts).unwrap();
        prop_assert_eq!(&at_once, &mesh.projection);
        let (first, rest) = mesh.facts.split_at(cut.index(mesh.facts.len() + 1));
        let mut begun = Projection::default();
        begun.apply(first).unwrap();
        let bytes = Checkpoint::of(&begun).encode();
        let mut restored = Checkpoint::decode(&bytes).unwrap().into_projection();
        prop_assert_eq!(&restored, &begun);
        restored.apply(rest).unwrap();
        prop_assert_eq!(&restored, &mesh.projection);
        for fact in &mesh.facts {
            let payload = fact.event.payload().unwrap();
            let read = Event::decode(&fact.scope, fact.event.type_name(), fact.event.schema(), &payload).unwrap();
            prop_assert_eq!(&read, &fact.event);
        }
    }

    /// After everybody was quiet for long enough, what is published is what was reported last, whatever was lost on the way.
    #[test]
    fn in_the_end_everybody_is_seen_as_it_is(acts in prop::collection::vec(act(), 1..150)) {
        let (mut mesh, truth) = play(&acts);
        mesh.pass(Duration::from_secs(400));
        prop_assert!(mesh.counting.iter().all(damping::Counting::is_empty));
        for (instance, truth) in truth.into_iter().enumerate() {
            let id = mesh.instance(instance);
            let takes_part = mesh.projection.state().membership(&id).is_some_and(|entry| entry.state.registration().is_some());
            if let Some(truth) = truth.filter(|_| takes_part) {
                prop_assert_eq!(published(&mesh, &id), truth, "{}", id);
            }
            prop_assert!(!is_held(&mesh, &id) || mesh.projection.state().health_reported(&id) != Health::Healthy);
        }
    }

    /// Points stay under their bound and only fall while nothing happens; and damping never takes what the guard forbids.
    #[test]
    fn bounds_hold_at_every_step(acts in prop::collection::vec(act(), 1..80)) {
        let settings = DampingSettings::default();
        let (mut mesh, _) = play(&[]);
        for act in acts {
            // Only the ones that do not need what sidecars believe.
            match act {
                Act::Report { controller, instance, healthy } | Act::Late { controller, instance, healthy, .. } => {
                    let id = mesh.instance(instance);
                    let _ = mesh.report(controller, &id, health(healthy));
                }
                Act::Pass(ms) => mesh.pass(Duration::from_millis(ms)),
                Act::Crash(controller) => mesh.crash(controller),
                Act::Leave(instance) => {
                    let id = mesh.instance(instance);
                    let _ = mesh.execute(Command::Membership(id, MembershipCommand::Deregister));
                }
                Act::Join(instance) => mesh.register(&mesh.instance(instance), "a"),
                Act::Zone(instance, _) => mesh.register(&mesh.instance(instance), "b"),
                Act::Switch(_) => {}
            }
            mesh.look();
            let state = mesh.projection.state();
            for number in 0..6 {
                let Some(damping) = state.damping(&mesh.instance(number)) else { continue };
                prop_assert!(damping.penalty <= Penalty::most(&settings));
                let mut last = damping.penalty_at(mesh.now, &settings);
                for later in [1, 10, 100, 10_000, 100_000] {
                    let next = damping.penalty_at(mesh.now.after(Duration::from_millis(later)), &settings);
                    prop_assert!(next <= last);
                    last = next;
                }
            }
            // Whoever could be let go, and is needed, has been.
            let standing = standing(state, &mesh.service);
            let up_but_held =
                state.held().filter(|id| state.health_reported(id) == Health::Healthy).count();
            let needed = standing.usable * 2 < standing.of || standing.held > 1.max(standing.of * 3 / 10);
            prop_assert!(!needed || up_but_held == 0, "{standing:?} with {up_but_held} held");
            prop_assert_eq!(
                mesh.endpoints().unwrap().panic,
                standing.of >= 2 && standing.usable * 2 < standing.of
            );
        }
    }

    /// Three evenly spaced downs a minute are a bad day, not flapping.
    #[test]
    fn three_downs_a_minute_are_never_held(gap in 20_000..60_000_u64, up_after in 100..19_000_u64, times in 1..60_usize) {
        let mut mesh = Mesh::new(4, 1);
        let id = mesh.instance(0);
        for _ in 0..times {
            mesh.report(0, &id, Health::Unhealthy).unwrap();
            prop_assert!(!is_held(&mesh, &id));
            mesh.pass(Duration::from_millis(up_after));
            mesh.report(0, &id, Health::Healthy).unwrap();
            mesh.pass(Duration::from_millis(gap - up_after));
        }
    }
}
