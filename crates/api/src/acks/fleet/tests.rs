use super::*;
use weft_model::membership::Upstreams;
use weft_model::{Epoch, Position};
use weft_routing::{Hash, InterestClass};

/// The tables, as the view over them reads them.
#[derive(Debug, Default)]
struct Tables {
    sidecars: BTreeMap<InstanceId, Ack>,
    classes: BTreeMap<ClassId, ConfigVersion>,
    written: usize,
}

impl Tables {
    fn write(&mut self, plan: &Plan) {
        self.written += plan.sidecars.len() + plan.classes.len();
        self.sidecars.extend(plan.sidecars.iter().cloned());
        self.classes.extend(plan.classes.iter().map(|row| (row.class, row.applied)));
    }

    fn applied(&self, instance: &InstanceId) -> Option<ConfigVersion> {
        let row = self.sidecars.get(instance)?;
        let own = row.applied.map(|(version, _)| version)?;
        let class = row.class.as_ref().and_then(|class| self.classes.get(class));
        Some(class.map_or(own, |class| own.max(*class)))
    }

    fn look(&mut self, fleet: &mut Fleet) {
        let plan = fleet.plan();
        self.write(&plan);
        fleet.written(plan);
    }
}

fn at(position: u64) -> ConfigVersion {
    ConfigVersion::new(Epoch(1), Position(position))
}

fn instance(n: usize) -> InstanceId {
    format!("default/api/i{n}").parse().unwrap()
}

fn id(class: &str) -> ClassId {
    InterestClass {
        service: format!("default/{class}").parse().unwrap(),
        upstreams: Upstreams::All,
        canary: false,
    }
    .id()
}

fn apply(fleet: &mut Fleet, instance: &InstanceId, class: &str, position: u64) {
    fleet.say(instance, Some(id(class)), |ack| ack.applied = Some((at(position), Hash::of(b""))));
}

fn subscribed(sidecars: usize) -> (Fleet, Tables) {
    let (mut fleet, mut tables) = (Fleet::default(), Tables::default());
    for n in 0..sidecars {
        assert!(fleet.open_stream(&instance(n)));
        apply(&mut fleet, &instance(n), "c", 5);
    }
    tables.look(&mut fleet);
    assert_eq!(tables.written, sidecars + 1);
    tables.written = 0;
    (fleet, tables)
}

#[test]
fn a_change_that_all_take_is_one_row_however_their_words_come() {
    let (mut fleet, mut tables) = subscribed(1_000);
    for n in 0..1_000 {
        apply(&mut fleet, &instance(n), "c", 9);
        if n == 500 {
            tables.look(&mut fleet);
            assert_eq!(tables.written, 0);
        }
    }
    tables.look(&mut fleet);
    assert_eq!(tables.written, 1);
    assert!((0..1_000).all(|n| tables.applied(&instance(n)) == Some(at(9))));
    tables.look(&mut fleet);
    assert_eq!(tables.written, 1, "what is settled is not written again");
}

#[test]
fn who_hangs_back_goes_alone_and_returns() {
    let (mut fleet, mut tables) = subscribed(10);
    (1..10).for_each(|n| apply(&mut fleet, &instance(n), "c", 9));
    (0..=SETTLED_AFTER).for_each(|_| tables.look(&mut fleet));
    assert_eq!(tables.written, 2, "the class, and the one that hangs back");
    assert_eq!((tables.applied(&instance(0)), tables.applied(&instance(1))), (Some(at(5)), Some(at(9))));
    apply(&mut fleet, &instance(0), "c", 9);
    tables.look(&mut fleet);
    assert_eq!((tables.written, tables.applied(&instance(0))), (3, Some(at(9))));
}

#[test]
fn who_refuses_goes_alone_at_once() {
    let (mut fleet, mut tables) = subscribed(3);
    fleet.say(&instance(0), Some(id("c")), |ack| ack.error = Some("no".into()));
    (1..3).for_each(|n| apply(&mut fleet, &instance(n), "c", 9));
    tables.look(&mut fleet);
    assert_eq!((tables.applied(&instance(0)), tables.applied(&instance(1))), (Some(at(5)), Some(at(9))));
}

#[test]
fn who_left_is_written_and_forgotten() {
    let (mut fleet, mut tables) = subscribed(3);
    apply(&mut fleet, &instance(0), "c", 7);
    fleet.end_stream(&instance(0));
    tables.look(&mut fleet);
    let row = &tables.sidecars[&instance(0)];
    assert_eq!((row.connected, tables.applied(&instance(0))), (false, Some(at(7))));
    assert_eq!(fleet.sidecars.len(), 2);
    fleet.end_all();
    tables.look(&mut fleet);
    assert!(fleet.sidecars.is_empty());
    fleet.forget_classes();
    assert!(fleet.classes.is_empty());
}

#[test]
fn nobody_opens_streams_without_end() {
    let mut fleet = Fleet::default();
    let opened = (0..20).filter(|_| fleet.open_stream(&instance(0))).count();
    assert_eq!(opened, STREAMS_PER_SIDECAR_MAX);
    (0..opened).for_each(|_| fleet.end_stream(&instance(0)));
    assert!(fleet.open_stream(&instance(0)));
}

#[test]
fn what_a_failed_database_may_have_lost_is_written_again() {
    let (mut fleet, _) = subscribed(4);
    apply(&mut fleet, &instance(0), "c", 7);
    fleet.plan();
    fleet.lost();
    let mut tables = Tables::default();
    tables.look(&mut fleet);
    assert_eq!(tables.written, 5);
    assert_eq!(tables.applied(&instance(1)), Some(at(5)));
}

/// A small generator of its own: the same numbers on every machine.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

#[test]
fn rows_never_say_too_much_and_say_all_once_it_is_quiet() {
    for seed in 0..400 {
        let mut numbers = Numbers(seed);
        let (mut fleet, mut tables) = (Fleet::default(), Tables::default());
        let (mut truth, mut open) = (BTreeMap::new(), [0_u32; 6]);
        for _ in 0..200 {
            let n = usize::try_from(numbers.below(6)).unwrap();
            let (one, class) = (instance(n), if numbers.below(2) == 0 { "a" } else { "b" });
            match numbers.below(12) {
                // A restart without a disk, or with an old one: what it runs may fall.
                0 => {
                    open[n] += u32::from(fleet.open_stream(&one));
                    let have = numbers.below(9);
                    truth.insert(one.clone(), at(have));
                    apply(&mut fleet, &one, class, have);
                }
                1 if open[n] > 0 => {
                    fleet.end_stream(&one);
                    open[n] -= 1;
                }
                2 if truth.contains_key(&one) => {
                    let runs = truth[&one];
                    fleet.say(&one, Some(id(class)), |ack| {
                        (ack.applied, ack.error) = (Some((runs, Hash::of(b""))), Some("no".into()));
                    });
                }
                3..=6 if truth.contains_key(&one) => {
                    let newer = at(truth[&one].position.0 + numbers.below(3));
                    truth.insert(one.clone(), newer);
                    fleet.say(&one, Some(id(class)), |ack| {
                        (ack.applied, ack.error) = (Some((newer, Hash::of(b""))), None);
                    });
                }
                7 => fleet.lost(),
                _ => {
                    tables.look(&mut fleet);
                    for (one, runs) in &truth {
                        let said = tables.applied(one);
                        assert!(said <= Some(*runs), "seed {seed}: {one} runs {runs}, not {said:?}");
                    }
                }
            }
        }
        (0..=SETTLED_AFTER + 1).for_each(|_| tables.look(&mut fleet));
        for (one, runs) in &truth {
            assert_eq!(tables.applied(one), Some(*runs), "seed {seed}: {one}");
        }
        let before = tables.written;
        tables.look(&mut fleet);
        assert_eq!(tables.written, before, "seed {seed}: nothing is left to write");
    }
}
