//! How each version reaches this controller's sidecars: which of them ran it how long after they were told. Pure.
//!
//! **When a sidecar ran it.** Its own clock is not asked. It says how long ago the swap was when it sent its word, and that is
//! counted back from when the word came: never too early, and too late by the word's way here at most. What it says cannot
//! put the swap before the version was published.
//!
//! **Cost.** An acknowledgement costs as much as there are versions that it covers, mostly one; a version costs the sidecars'
//! times, rounded, in one entry per time. Both bounded.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;
use tokio::time::Instant;
use weft_model::{ConfigVersion, InstanceId, Position};
use weft_projector::{Announced, PropagationRow};
use weft_routing::ClassId;

/// Versions that are followed at once; beyond, the oldest is left as it was written last.
const FOLLOWED_MAX: usize = 1_024;
/// How long a version is followed: whoever takes longer was away, and is late by any measure.
const FOLLOWED_FOR: Duration = Duration::from_secs(600);
/// Versions of one class; a sidecar that skipped more counts for the newest of them.
const OF_A_CLASS_MAX: usize = 64;

/// Times are rounded up to steps of so much, and longer ones to a five hundredth of themselves: exact to 1 ms up to half a
/// second, in few entries.
const STEP: Duration = Duration::from_micros(250);
const STEPS_EXACT: u128 = 512;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Propagation {
    versions: BTreeMap<ConfigVersion, Version>,
    /// By class, oldest first.
    classes: BTreeMap<ClassId, VecDeque<ConfigVersion>>,
    /// Versions whose rows are not what is known.
    unwritten: BTreeSet<ConfigVersion>,
}

#[derive(Debug)]
struct Version {
    folded_at: Instant,
    published_at: Instant,
    interested: usize,
    applied: BTreeMap<Duration, u32>,
    last: Option<(InstanceId, Duration)>,
}

/// A sidecar's word.
#[derive(Clone, Copy, Debug)]
pub(super) struct Word<'a> {
    /// The event that put it into its class: what the class was told before is none of its business.
    pub(super) since: Position,
    /// What it said before that it runs.
    pub(super) before: ConfigVersion,
    /// What it runs now.
    pub(super) applied: ConfigVersion,
    /// When what was put in force, oldest first, as far as it said.
    pub(super) swaps: &'a [(ConfigVersion, Instant)],
    /// When the word came.
    pub(super) came_at: Instant,
}

impl Propagation {
    /// A version was published.
    pub(super) fn announce(&mut self, announced: Announced) {
        let Announced { version, classes, sidecars, folded_at, published_at } = announced;
        for class in classes {
            let versions = self.classes.entry(class).or_default();
            versions.push_back(version);
            if versions.len() > OF_A_CLASS_MAX {
                versions.pop_front();
            }
        }
        let fresh =
            Version { folded_at, published_at, interested: sidecars, applied: BTreeMap::new(), last: None };
        self.versions.insert(version, fresh);
        self.unwritten.insert(version);
        if self.versions.len() > FOLLOWED_MAX
            && let Some((oldest, _)) = self.versions.pop_first()
        {
            self.unwritten.remove(&oldest);
        }
    }

    /// A sidecar of a class says what it runs.
    pub(super) fn hear(&mut self, instance: &InstanceId, class: ClassId, word: Word<'_>) {
        let Some(versions) = self.classes.get(&class) else { return };
        let covered = versions.iter().rev().skip_while(|version| **version > word.applied);
        let news = |version: &ConfigVersion| *version > word.before && version.position > word.since;
        for covered in covered.take_while(|version| news(version)) {
            let Some(version) = self.versions.get_mut(covered) else { continue };
            let swap = word.swaps.iter().find(|(swapped, _)| swapped >= covered);
            let at = swap.map_or(word.came_at, |(_, at)| *at);
            let after = rounded(at.saturating_duration_since(version.published_at));
            *version.applied.entry(after).or_default() += 1;
            if version.last.as_ref().is_none_or(|(_, last)| *last < after) {
                version.last = Some((instance.clone(), after));
            }
            self.unwritten.insert(*covered);
        }
    }

    /// What is not written yet of what is known.
    pub(super) fn unwritten(&mut self) -> Vec<PropagationRow> {
        let versions = std::mem::take(&mut self.unwritten);
        let row = |version: ConfigVersion| {
            let Version { folded_at, published_at, interested, applied, last } =
                self.versions.get(&version)?;
            Some(PropagationRow {
                version,
                folded_at: *folded_at,
                published_at: *published_at,
                interested: *interested,
                applied: applied.iter().map(|(after, sidecars)| (*after, *sidecars)).collect(),
                last: last.clone(),
            })
        };
        versions.into_iter().filter_map(row).collect()
    }

    /// These rows could not be written.
    pub(super) fn failed(&mut self, rows: &[PropagationRow]) {
        self.unwritten.extend(rows.iter().map(|row| row.version));
    }

    /// Lets go of what was followed long enough. To be called when everything is written.
    pub(super) fn retire(&mut self, now: Instant) {
        while let Some(oldest) = self.versions.first_entry() {
            if now.saturating_duration_since(oldest.get().published_at) < FOLLOWED_FOR {
                break;
            }
            oldest.remove();
        }
        let versions = &self.versions;
        self.unwritten.retain(|version| versions.contains_key(version));
        self.classes
            .retain(|_, of_class| of_class.back().is_some_and(|newest| versions.contains_key(newest)));
    }
}

fn rounded(after: Duration) -> Duration {
    let steps = after.as_nanos().div_ceil(STEP.as_nanos());
    let unit = (steps / STEPS_EXACT + 1).next_power_of_two();
    let steps = u32::try_from(steps.div_ceil(unit) * unit).unwrap_or(u32::MAX);
    STEP.saturating_mul(steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::Epoch;
    use weft_model::membership::Upstreams;
    use weft_routing::InterestClass;

    fn class(name: &str) -> ClassId {
        InterestClass {
            service: format!("default/{name}").parse().unwrap(),
            upstreams: Upstreams::All,
            canary: false,
        }
        .id()
    }

    fn at(position: u64) -> ConfigVersion {
        ConfigVersion::new(Epoch(1), Position(position))
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn announce(propagation: &mut Propagation, position: u64, published_at: Instant) {
        propagation.announce(Announced {
            version: at(position),
            classes: vec![class("c")],
            sidecars: 3,
            folded_at: published_at,
            published_at,
        });
    }

    fn word<'a>(
        (before, applied): (u64, u64),
        swaps: &'a [(ConfigVersion, Instant)],
        came_at: Instant,
    ) -> Word<'a> {
        Word { since: Position(4), before: at(before), applied: at(applied), swaps, came_at }
    }

    #[test]
    fn a_held_back_word_counts_from_its_swap() {
        let start = Instant::now();
        let mut propagation = Propagation::default();
        announce(&mut propagation, 7, start);
        let one: InstanceId = "default/api/one".parse().unwrap();
        let two: InstanceId = "default/api/two".parse().unwrap();
        let swaps = [(at(7), start + ms(12))];
        propagation.hear(&one, class("c"), word((5, 7), &swaps, start + ms(900)));
        propagation.hear(&two, class("c"), word((5, 7), &[], start + ms(40)));
        let rows = propagation.unwritten();
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].applied, [(ms(12), 1), (ms(40), 1)]);
        assert_eq!(rows[0].last, Some((two, ms(40))));
        assert_eq!(rows[0].interested, 3);
        assert_eq!(propagation.unwritten(), []);
    }

    #[test]
    fn a_word_covers_what_was_skipped_and_nothing_twice() {
        let start = Instant::now();
        let mut propagation = Propagation::default();
        [6, 7, 8, 9].iter().for_each(|position| announce(&mut propagation, *position, start));
        let one: InstanceId = "default/api/one".parse().unwrap();
        let swaps = [(at(7), start + ms(2)), (at(8), start + ms(5))];
        propagation.hear(&one, class("c"), word((6, 8), &swaps, start + ms(9)));
        propagation.hear(&one, class("c"), word((8, 8), &swaps, start + ms(10)));
        propagation.hear(&one, class("another"), word((0, 9), &[], start + ms(10)));
        let applied: Vec<_> =
            propagation.unwritten().into_iter().map(|row| (row.version, row.applied)).collect();
        let expected =
            [(6, vec![]), (7, vec![(ms(2), 1)]), (8, vec![(ms(5), 1)]), (9, vec![])].map(|(p, a)| (at(p), a));
        assert_eq!(applied, expected);
    }

    #[test]
    fn who_joined_later_has_no_part_in_what_came_before() {
        let start = Instant::now();
        let mut propagation = Propagation::default();
        [3, 5].iter().for_each(|position| announce(&mut propagation, *position, start));
        let one: InstanceId = "default/api/one".parse().unwrap();
        propagation.hear(&one, class("c"), word((2, 5), &[], start));
        let counts: Vec<_> = propagation.unwritten().iter().map(|row| row.applied.len()).collect();
        assert_eq!(counts, [0, 1]);
    }

    #[test]
    fn nobody_applied_what_was_not_published_yet() {
        let start = Instant::now();
        let mut propagation = Propagation::default();
        announce(&mut propagation, 7, start + ms(50));
        let swaps = [(at(7), start)];
        propagation.hear(
            &"default/api/one".parse().unwrap(),
            class("c"),
            word((1, 7), &swaps, start + ms(60)),
        );
        assert_eq!(propagation.unwritten()[0].applied, [(ms(0), 1)]);
    }

    #[test]
    fn times_are_rounded_up_by_little() {
        for micros in [0, 1, 250, 251, 99_999, 127_999, 128_001, 255_999, 511_999, 3_333_333, 3_600_000_000] {
            let (exact, rounded) = (Duration::from_micros(micros), rounded(Duration::from_micros(micros)));
            let off = rounded.checked_sub(exact).unwrap();
            assert!(off <= ms(1) || off <= exact / 250, "{exact:?} became {rounded:?}");
        }
    }

    #[test]
    fn what_is_followed_is_bounded_in_number_and_time() {
        let start = Instant::now();
        let mut propagation = Propagation::default();
        (1..=5_000).for_each(|position| announce(&mut propagation, position, start));
        propagation.retire(start);
        assert_eq!(propagation.versions.len(), FOLLOWED_MAX);
        assert_eq!(propagation.classes[&class("c")].len(), OF_A_CLASS_MAX);
        propagation.retire(start + FOLLOWED_FOR);
        assert!(propagation.versions.is_empty() && propagation.classes.is_empty());
        assert_eq!(propagation.unwritten(), []);
    }
}
