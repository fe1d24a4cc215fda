//! Proves that the log is what was appended: nothing changed, missing, added or reordered.
//!
//! What the chain alone cannot show is a tail that was cut off, or a history rewritten from some point to the end
//! with every hash made anew. Two other append-only tables testify against that: the outcomes that commands were
//! given, which say where, when and in which epoch each command's events are, and the hash that each epoch found when it
//! was opened. Against somebody who rewrites all three, compare the reported head with one that was noted elsewhere.
//!
//! Not checked: the fingerprints in outcomes, which say what was asked for and not what was recorded.

use futures_util::TryStreamExt;
use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use uuid::Uuid;
use weft_model::version::{Epoch, Position, Version};

use crate::event::{RecordedEvent, UnixMicros};
use crate::hash::EventHash;
use crate::read::{Evidence, Head, Reader, Testimony};
use crate::session::StoreError;

/// How far a verification has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyProgress {
    /// The last event that was checked.
    pub checked: Position,
    /// The last event that will be checked: the log's end when the verification began.
    pub of: Position,
}

/// The log is sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyReport {
    /// The end of what was checked. Noted elsewhere, it proves the whole log up to it.
    pub head: Head,
    /// Events that were checked.
    pub events: u64,
    /// Scopes that have events.
    pub scopes: u64,
    /// Epochs that were opened.
    pub epochs: u64,
}

/// The log could not be proven sound.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VerifyError {
    /// It is not what was appended; this is the first place where that shows.
    #[error("the log is damaged at position {position}")]
    Damaged {
        /// The first bad position.
        position: Position,
        /// What is wrong there.
        #[source]
        defect: Defect,
    },
    /// It could not be read.
    #[error("the log could not be read")]
    Store(#[from] StoreError),
}

/// What is wrong with a position of the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    /// No event is there, though later ones are.
    #[error("the event is missing; the next one is at position {next}")]
    Missing {
        /// Position of the next event.
        next: Position,
    },
    /// The event, or the hash before it, was changed after it was recorded.
    #[error("the event hashes to {computed}, but {recorded} was recorded")]
    Hash {
        /// The hash in the row.
        recorded: EventHash,
        /// The hash of the row's contents after the hash before it.
        computed: EventHash,
    },
    /// The versions of its scope have a gap or a repetition.
    #[error("scope {scope} is at version {expected} here, but {recorded} was recorded")]
    Version {
        /// The scope.
        scope: String,
        /// The version that follows the scope's last one.
        expected: Version,
        /// The version in the row.
        recorded: Version,
    },
    /// Its epoch is earlier than that of the event before it, or was never opened.
    #[error("the event claims epoch {recorded}, which was not open here")]
    Epoch {
        /// The epoch in the row.
        recorded: Epoch,
    },
    /// It was recorded before the event before it.
    #[error("the event was recorded at {recorded:?}, before the one before it at {previous:?}")]
    Time {
        /// Time in the row.
        recorded: UnixMicros,
        /// Time of the event before it.
        previous: UnixMicros,
    },
    /// When an epoch was opened, this position had another hash.
    #[error("epoch {epoch} found {found} here when it was opened")]
    Rewritten {
        /// The epoch.
        epoch: Epoch,
        /// The hash that it found.
        found: EventHash,
    },
    /// The command that it names was not answered with this event: its outcome is missing, or names other positions,
    /// another epoch or another time.
    #[error("the outcome recorded for command {command} does not include the event")]
    Outcome {
        /// The event's command.
        command: Uuid,
    },
    /// The log ends before this position, which is known to have been recorded.
    #[error("the log ends at {end}, but events up to {acknowledged} were acknowledged")]
    CutOff {
        /// The last event in the log.
        end: Position,
        /// The last event known to have been recorded.
        acknowledged: Position,
    },
}

/// Walks the whole log from its first event to the end that it has at the start, and checks all that its events and
/// the tables beside it promise. Calls `progress` after each page. Needs memory for every scope's name.
///
/// # Errors
/// [`VerifyError::Damaged`] with the first defect, or a failure of the store.
pub async fn verify(
    reader: &Reader,
    mut progress: impl FnMut(VerifyProgress) + Send,
) -> Result<VerifyReport, VerifyError> {
    // All of one moment: an epoch that opens or an event that comes in between would not fit the rest.
    let Evidence { head, forks, acknowledged } = reader.evidence().await?;

    let mut walk = Walk::new(&forks)?;
    let mut outcomes = Outcomes::new(reader);
    let mut pages = pin!(reader.stream(Position::ZERO, head.position));
    while let Some(page) = pages.try_next().await? {
        for event in &page {
            walk.step(event).map_err(|(position, defect)| VerifyError::Damaged { position, defect })?;
            outcomes.step(event).await?;
        }
        progress(VerifyProgress { checked: walk.position, of: head.position });
    }
    walk.finish(acknowledged.max(forks.iter().map(|fork| fork.1).max().unwrap_or_default()))?;
    Ok(VerifyReport {
        head,
        events: walk.position.0,
        scopes: walk.versions.len() as u64,
        epochs: forks.len() as u64,
    })
}

/// The outcomes of commands, in the order of their events. Together they cover the log, each event once.
struct Outcomes<'a> {
    reader: &'a Reader,
    page: VecDeque<Testimony>,
    /// The last event of the outcomes that were read.
    read_to: Position,
    /// The last event of the outcome before the first one of `page`.
    done: Position,
}

impl<'a> Outcomes<'a> {
    fn new(reader: &'a Reader) -> Self {
        Self { reader, page: VecDeque::new(), read_to: Position::ZERO, done: Position::ZERO }
    }

    /// Checks the next event against the outcome of the command that it claims to be of.
    async fn step(&mut self, event: &RecordedEvent) -> Result<(), VerifyError> {
        if self.page.is_empty() {
            self.page = self.reader.testimony(self.read_to).await?.into();
            self.read_to = self.page.back().map_or(self.read_to, |last| *last.positions.end());
        }
        let Some(outcome) = self.page.front().filter(|outcome| agree(outcome, self.done, event)) else {
            let defect = Defect::Outcome { command: event.command_id };
            return Err(VerifyError::Damaged { position: event.position, defect });
        };
        if *outcome.positions.end() == event.position {
            self.page.pop_front();
            self.done = event.position;
        }
        Ok(())
    }
}

fn agree(outcome: &Testimony, done: Position, event: &RecordedEvent) -> bool {
    *outcome.positions.start() == done.next()
        && outcome.positions.contains(&event.position)
        && outcome.command_id == event.command_id
        && outcome.epoch == event.epoch
        && outcome.recorded_at == event.recorded_at
}

/// What holds after the events seen so far.
struct Walk {
    position: Position,
    hash: EventHash,
    epoch: Epoch,
    recorded_at: UnixMicros,
    versions: BTreeMap<Box<str>, Version>,
    /// By position: the epochs opened there and the hash that they found.
    forks: BTreeMap<Position, Vec<(Epoch, EventHash)>>,
    /// Every epoch and the position after which it was open.
    opened: BTreeMap<Epoch, Position>,
}

impl Walk {
    fn new(forks: &[(Epoch, Position, EventHash)]) -> Result<Self, VerifyError> {
        let mut walk = Self {
            position: Position::ZERO,
            hash: EventHash::GENESIS,
            epoch: Epoch::ZERO,
            recorded_at: UnixMicros(i64::MIN),
            versions: BTreeMap::new(),
            forks: BTreeMap::new(),
            opened: BTreeMap::new(),
        };
        for (epoch, position, hash) in forks {
            walk.forks.entry(*position).or_default().push((*epoch, *hash));
            walk.opened.insert(*epoch, *position);
        }
        walk.check_forks().map_err(|defect| VerifyError::Damaged { position: Position::ZERO, defect })?;
        Ok(walk)
    }

    fn step(&mut self, event: &RecordedEvent) -> Result<(), (Position, Defect)> {
        let expected = self.position.next();
        if event.position != expected {
            return Err((expected, Defect::Missing { next: event.position }));
        }
        self.check(event).map_err(|defect| (event.position, defect))?;
        self.position = event.position;
        self.hash = event.hash;
        self.epoch = event.epoch;
        self.recorded_at = event.recorded_at;
        self.versions.insert(event.scope.as_str().into(), event.version);
        self.check_forks().map_err(|defect| (event.position, defect))
    }

    fn check(&self, event: &RecordedEvent) -> Result<(), Defect> {
        let computed = event.expected_hash(self.hash);
        if computed != event.hash {
            return Err(Defect::Hash { recorded: event.hash, computed });
        }
        let expected = self.versions.get(event.scope.as_str()).copied().unwrap_or_default().next();
        if event.version != expected {
            return Err(Defect::Version { scope: event.scope.clone(), expected, recorded: event.version });
        }
        let open = self.opened.get(&event.epoch).is_some_and(|opened| *opened < event.position);
        if event.epoch < self.epoch || !open {
            return Err(Defect::Epoch { recorded: event.epoch });
        }
        if event.recorded_at < self.recorded_at {
            return Err(Defect::Time { recorded: event.recorded_at, previous: self.recorded_at });
        }
        Ok(())
    }

    fn check_forks(&self) -> Result<(), Defect> {
        let here = self.forks.get(&self.position).into_iter().flatten();
        for (epoch, found) in here {
            if *found != self.hash {
                return Err(Defect::Rewritten { epoch: *epoch, found: *found });
            }
        }
        Ok(())
    }

    fn finish(&self, acknowledged: Position) -> Result<(), VerifyError> {
        if acknowledged > self.position {
            let defect = Defect::CutOff { end: self.position, acknowledged };
            return Err(VerifyError::Damaged { position: self.position.next(), defect });
        }
        Ok(())
    }
}
