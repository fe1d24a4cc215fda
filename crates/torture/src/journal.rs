//! What was asked and answered, and whether the log agrees.

use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

use crate::worker::{Answer, Command, Outcome, payload};

/// An event, as plain SQL reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) position: u64,
    pub(crate) scope: String,
    pub(crate) version: u64,
    pub(crate) command: Uuid,
    pub(crate) epoch: u64,
    /// Microseconds since the Unix epoch.
    pub(crate) recorded_at: i64,
    pub(crate) payload: String,
    /// The first bytes of its chain hash.
    pub(crate) hash: i64,
}

/// Everything that writers asked and were told.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    /// Commands that were given to a worker, and what the first answer said that told that they were recorded.
    asked: BTreeMap<Uuid, (Command, Option<Outcome>)>,
    /// Commands that were told that somebody was faster.
    refused: BTreeSet<Uuid>,
    repeats: u64,
    wrong: Vec<String>,
}

/// What the log and the journal disagree about. All zero, or something is broken.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Verdict {
    /// Acknowledged and not in the log, or only in part, or with other content.
    pub(crate) lost: u64,
    /// In the log more than once, or in part, or asked by nobody.
    pub(crate) doubled: u64,
    /// Positions or versions that are missing.
    pub(crate) gaps: u64,
    /// Events that a reader of `position > cursor` did not get, or not in order.
    pub(crate) skipped: u64,
    /// Answers that were not the first one, or not what the log says.
    pub(crate) wrong_outcomes: u64,
}

impl Verdict {
    pub(crate) fn is_sound(&self) -> bool {
        *self == Self::default()
    }
}

impl std::ops::AddAssign for Verdict {
    fn add_assign(&mut self, other: Self) {
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.gaps += other.gaps;
        self.skipped += other.skipped;
        self.wrong_outcomes += other.wrong_outcomes;
    }
}

impl Journal {
    /// A command is about to be given to a worker.
    pub(crate) fn ask(&mut self, command: &Command) {
        self.asked.entry(command.id).or_insert_with(|| (command.clone(), None));
    }

    /// A command was answered. Any answer after the first must say the same, and that it does.
    pub(crate) fn answer(&mut self, command: &Command, answer: &Answer) {
        let Some((first, known)) = self.asked.get_mut(&command.id) else { return };
        let other_content = first.content != command.content;
        match (answer, known) {
            (Answer::Reused, Some(_)) if other_content => self.repeats += 1,
            (Answer::Recorded { outcome, .. }, known @ None) if !other_content => {
                *known = Some(outcome.clone());
            }
            (Answer::Recorded { outcome, repeated }, Some(known)) if !other_content => {
                self.repeats += 1;
                if outcome != known || !repeated {
                    self.wrong.push(format!("{}: {answer:?} after {known:?}", command.id));
                }
            }
            // Nobody else writes what a writer calls its own, its first one; of another the command must have expected
            // something else than is there.
            (Answer::Conflict { scope, current }, None)
                if !other_content
                    && command.parts.iter().skip(1).any(|part| {
                        part.scope == *scope && part.expected.is_some_and(|expected| expected != *current)
                    }) =>
            {
                self.refused.insert(command.id);
            }
            (answer, known) => self.wrong.push(format!("{}: {answer:?} after {known:?}", command.id)),
        }
    }

    /// Commands that were acknowledged.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.asked.values().filter(|(_, answer)| answer.is_some()).count() as u64
    }

    /// Answers to repeated commands that were as they must be.
    pub(crate) const fn repeats(&self) -> u64 {
        self.repeats
    }

    /// What was wrong with answers, in words; the first few.
    pub(crate) fn complaints(&self) -> impl Iterator<Item = &str> {
        self.wrong.iter().take(5).map(String::as_str)
    }

    /// Holds the log, and what a polling reader got of it, against what was asked and answered.
    pub(crate) fn judge(&self, log: &[Event], polled: &[Polled]) -> Verdict {
        let mut verdict = Verdict { wrong_outcomes: self.wrong.len() as u64, ..Verdict::default() };
        let mut versions: BTreeMap<&str, u64> = BTreeMap::new();
        let mut of_command: BTreeMap<Uuid, Vec<&Event>> = BTreeMap::new();
        for (event, position) in log.iter().zip(1..) {
            let version = versions.entry(event.scope.as_str()).or_default();
            *version += 1;
            verdict.gaps += u64::from(event.position != position || event.version != *version);
            of_command.entry(event.command).or_default().push(event);
        }
        verdict.skipped = skipped(log, polled);
        for (id, (command, answer)) in &self.asked {
            let recorded = of_command.remove(id).unwrap_or_default();
            let expected: usize = command.parts.iter().map(|part| part.events as usize).sum();
            if recorded.is_empty() && answer.is_none() {
                continue;
            }
            if recorded.len() > expected {
                verdict.doubled += 1;
            } else if !says(command, &recorded) {
                verdict.lost += 1;
            } else if !follows(command, &recorded) || self.refused.contains(id) {
                verdict.wrong_outcomes += 1;
            } else if let Some(outcome) = answer {
                verdict.wrong_outcomes += u64::from(!tells(outcome, command, &recorded));
            }
        }
        // What is left was asked by nobody.
        verdict.doubled += of_command.len() as u64;
        verdict
    }
}

/// An event as a reader that polls got it: its position, and the first bytes of its chain hash.
pub(crate) type Polled = (u64, i64);

/// How many events a reader of `position > cursor` did not get in their order, or got and are not there any more.
pub(crate) fn skipped(log: &[Event], polled: &[Polled]) -> u64 {
    let same = |(event, polled): &(&Event, &Polled)| (event.position, event.hash) == **polled;
    let in_order = log.iter().zip(polled).take_while(same).count();
    (log.len().max(polled.len()) - in_order) as u64
}

/// Whether what was recorded stands together, and each scope went on from where the command expected it.
fn follows(command: &Command, recorded: &[&Event]) -> bool {
    let one = |event: &&Event| (event.epoch, event.recorded_at);
    let together =
        recorded.windows(2).all(|two| two[0].position + 1 == two[1].position && one(&two[0]) == one(&two[1]));
    let first = |scope: &str| recorded.iter().find(|event| event.scope == scope).map(|event| event.version);
    together
        && command
            .parts
            .iter()
            .all(|part| part.expected.is_none_or(|expected| first(&part.scope) == Some(expected + 1)))
}

/// Whether the events are what the command asked for, in its order.
fn says(command: &Command, recorded: &[&Event]) -> bool {
    let parts = command.parts.iter();
    let wanted = parts.flat_map(|part| (0..part.events).map(|n| (&part.scope, n)));
    wanted
        .map(|(scope, n)| (scope.as_str(), payload(scope, n, command.content)))
        .eq(recorded.iter().map(|event| (event.scope.as_str(), event.payload.clone())))
}

/// Whether the answer says where the events are, when they were recorded, and what versions they brought.
fn tells(outcome: &Outcome, command: &Command, recorded: &[&Event]) -> bool {
    let positions: BTreeSet<u64> = recorded.iter().map(|event| event.position).collect();
    let last_version =
        |scope: &str| recorded.iter().filter(|event| event.scope == scope).map(|event| event.version).max();
    positions == (outcome.first..=outcome.last).collect()
        && recorded
            .iter()
            .all(|event| (event.epoch, event.recorded_at) == (outcome.epoch, outcome.recorded_at))
        && command
            .parts
            .iter()
            .zip(&outcome.versions)
            .all(|(part, version)| last_version(&part.scope) == Some(*version))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::Part;

    fn command(n: u128, events: u32) -> Command {
        let parts = vec![Part { scope: "s".into(), expected: None, events }];
        Command { id: Uuid::from_u128(n), content: 0, parts }
    }

    fn recorded(first: u64, last: u64, repeated: bool) -> Answer {
        let outcome = Outcome { first, last, epoch: 1, recorded_at: 7, versions: vec![last] };
        Answer::Recorded { outcome, repeated }
    }

    fn log(commands: &[u128]) -> Vec<Event> {
        let mut events: Vec<Event> = Vec::new();
        for (command, position) in commands.iter().zip(1..) {
            let command = Uuid::from_u128(*command);
            let before = events.iter().filter(|event| event.command == command).count();
            events.push(Event {
                position,
                scope: "s".into(),
                version: position,
                command,
                epoch: 1,
                recorded_at: 7,
                payload: payload("s", u32::try_from(before).unwrap(), 0),
                hash: i64::try_from(position).unwrap() * 7,
            });
        }
        events
    }

    /// As a poller gets them.
    fn polled(positions: &[u64]) -> Vec<Polled> {
        positions.iter().map(|position| (*position, i64::try_from(*position).unwrap() * 7)).collect()
    }

    /// Command 1 has two events and an answer, command 2 has one and none.
    fn journal() -> Journal {
        let mut journal = Journal::default();
        journal.ask(&command(1, 2));
        journal.answer(&command(1, 2), &recorded(1, 2, false));
        journal.ask(&command(2, 1));
        journal
    }

    #[test]
    fn what_agrees_is_sound_whether_the_unanswered_one_was_recorded_or_not() {
        assert!(journal().judge(&log(&[1, 1, 2]), &polled(&[1, 2, 3])).is_sound());
        assert!(journal().judge(&log(&[1, 1]), &polled(&[1, 2])).is_sound());
        assert_eq!(journal().acknowledged(), 1);
    }

    #[test]
    fn each_planted_fault_is_found() {
        let verdict = |log: &[Event], got: &[u64]| journal().judge(log, &polled(got));
        assert_eq!(verdict(&[], &[]), Verdict { lost: 1, ..Verdict::default() });
        assert_eq!(verdict(&log(&[1]), &[1]), Verdict { lost: 1, ..Verdict::default() });
        assert_eq!(verdict(&log(&[1, 1, 1]), &[1, 2, 3]), Verdict { doubled: 1, ..Verdict::default() });
        assert_eq!(verdict(&log(&[1, 1, 9]), &[1, 2, 3]), Verdict { doubled: 1, ..Verdict::default() });
        assert_eq!(
            verdict(&log(&[2, 1, 1]), &[1, 2, 3]),
            Verdict { wrong_outcomes: 1, ..Verdict::default() }
        );
        for got in [&[1, 3][..], &[1, 3, 2], &[1, 2], &[1, 2, 3, 3]] {
            let skipped = verdict(&log(&[1, 1, 2]), got).skipped;
            assert!(skipped > 0, "{got:?}");
        }
        let mut replaced = log(&[1, 1, 2]);
        replaced[2].hash = 0;
        assert_eq!(verdict(&replaced, &[1, 2, 3]), Verdict { skipped: 1, ..Verdict::default() });
        let mut gap = log(&[1, 1, 2]);
        gap[2].position = 4;
        assert!(verdict(&gap, &[1, 2, 4]).gaps > 0);
        let mut version = log(&[1, 1, 2]);
        version[2].version = 4;
        assert!(verdict(&version, &[1, 2, 3]).gaps > 0);
        let mut other = log(&[1, 1, 2]);
        other[2].payload = payload("s", 0, 1);
        assert_eq!(verdict(&other, &[1, 2, 3]), Verdict { lost: 1, ..Verdict::default() });
        let mut order = log(&[1, 1]);
        let (one, two) = order.split_at_mut(1);
        std::mem::swap(&mut one[0].payload, &mut two[0].payload);
        assert_eq!(verdict(&order, &[1, 2]), Verdict { lost: 1, ..Verdict::default() });
        let mut later = log(&[1, 1]);
        later[1].recorded_at = 8;
        assert_eq!(verdict(&later, &[1, 2]), Verdict { wrong_outcomes: 1, ..Verdict::default() });
    }

    /// The one event that command 2 asks for, at a version of its scope that it did or did not expect.
    #[test]
    fn what_was_recorded_must_be_what_was_expected() {
        let judged = |expected| {
            let mut journal = Journal::default();
            journal.ask(&Command {
                parts: vec![Part { scope: "s".into(), expected, events: 1 }],
                ..command(2, 1)
            });
            journal.ask(&command(1, 2));
            journal.judge(&log(&[1, 1, 2]), &polled(&[1, 2, 3]))
        };
        assert!(judged(None).is_sound() && judged(Some(2)).is_sound());
        for wrong in [0, 1, 3] {
            assert_eq!(judged(Some(wrong)), Verdict { wrong_outcomes: 1, ..Verdict::default() });
        }
    }

    #[test]
    fn a_command_stands_together_even_if_nobody_was_told() {
        let mut journal = Journal::default();
        journal.ask(&command(1, 2));
        journal.ask(&command(2, 1));
        let apart = Verdict { wrong_outcomes: 1, ..Verdict::default() };
        assert_eq!(journal.judge(&log(&[1, 2, 1]), &polled(&[1, 2, 3])), apart);
    }

    #[test]
    fn a_conflict_must_be_one() {
        let shared = |expected| vec![own(), Part { scope: "shared".into(), expected, events: 1 }];
        fn own() -> Part {
            Part { scope: "s".into(), expected: None, events: 1 }
        }
        let told = |expected, scope: &str| {
            let command = Command { parts: shared(expected), ..command(3, 1) };
            let mut journal = Journal::default();
            journal.ask(&command);
            journal.answer(&command, &Answer::Conflict { scope: scope.into(), current: 2 });
            journal.complaints().count()
        };
        assert_eq!(told(Some(1), "shared"), 0);
        assert_eq!((told(Some(2), "shared"), told(None, "shared"), told(Some(1), "s")), (1, 1, 1));
    }

    #[test]
    fn what_was_refused_must_not_be_there() {
        let mut journal = journal();
        let mut refused = command(2, 1);
        refused.parts.push(Part { scope: "shared".into(), expected: Some(1), events: 0 });
        journal.answer(&refused, &Answer::Conflict { scope: "shared".into(), current: 2 });
        assert!(journal.judge(&log(&[1, 1]), &polled(&[1, 2])).is_sound());
        let told_otherwise = Verdict { wrong_outcomes: 1, ..Verdict::default() };
        assert_eq!(journal.judge(&log(&[1, 1, 2]), &polled(&[1, 2, 3])), told_otherwise);
    }

    #[test]
    fn a_repeat_must_be_told_the_first_answer_and_other_content_refused() {
        let told = |answer: Answer, content: u32| {
            let mut journal = journal();
            journal.answer(&Command { content, ..command(1, 2) }, &answer);
            (journal.repeats(), journal.complaints().count())
        };
        assert_eq!(told(recorded(1, 2, true), 0), (1, 0));
        assert_eq!(told(Answer::Reused, 1), (1, 0));
        assert_eq!(told(recorded(3, 4, true), 0).1, 1);
        assert_eq!(told(recorded(1, 2, false), 0).1, 1);
        assert_eq!(told(recorded(1, 2, true), 1).1, 1);
        assert_eq!(told(Answer::Conflict { scope: "s".into(), current: 2 }, 0).1, 1);
        assert_eq!(told(Answer::Wrong("x".into()), 0).1, 1);
    }
}
