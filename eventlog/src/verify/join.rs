//! What holds across the parts of the log, checked as they are joined in order.

use weft_model::version::{Epoch, Position, Version};

use super::part::Passed;
use super::{ByScope, Defect};
use crate::event::UnixMicros;
use crate::hash::EventHash;

/// The parts that were joined so far.
pub(super) struct Whole {
    position: Position,
    hash: EventHash,
    epoch: Epoch,
    recorded_at: UnixMicros,
    versions: ByScope<Version>,
}

impl Default for Whole {
    fn default() -> Self {
        Self {
            position: Position::ZERO,
            hash: EventHash::GENESIS,
            epoch: Epoch::ZERO,
            recorded_at: UnixMicros(i64::MIN),
            versions: ByScope::new(),
        }
    }
}

impl Whole {
    /// The last event of the parts that were joined.
    pub(super) const fn position(&self) -> Position {
        self.position
    }

    pub(super) fn scopes(&self) -> u64 {
        self.versions.len() as u64
    }

    /// Joins the next part, which passed in itself, and says where the log then ends.
    pub(super) fn join(&mut self, part: Passed) -> Result<Position, (Position, Defect)> {
        let Some(ends) = part.ends else { return Ok(self.position) };
        let first = self.position.next();
        if part.previous.is_some_and(|previous| previous != self.hash) {
            let computed = part.previous.unwrap_or(EventHash::GENESIS);
            return Err((first, Defect::Hash { recorded: self.hash, computed }));
        }
        if ends.first_epoch < self.epoch {
            return Err((first, Defect::Epoch { recorded: ends.first_epoch }));
        }
        if ends.first_time < self.recorded_at {
            return Err((first, Defect::Time { recorded: ends.first_time, previous: self.recorded_at }));
        }
        let mut wrong: Option<(Position, Defect)> = None;
        for (scope, seen) in part.scopes {
            let expected = self.versions.get(&scope).copied().unwrap_or_default().next();
            if seen.first == expected {
                self.versions.insert(scope, seen.last);
            } else if wrong.as_ref().is_none_or(|(position, _)| seen.at < *position) {
                let defect = Defect::Version { scope: scope.into_string(), expected, recorded: seen.first };
                wrong = Some((seen.at, defect));
            }
        }
        self.position = ends.position;
        self.hash = ends.hash;
        self.epoch = ends.epoch;
        self.recorded_at = ends.time;
        wrong.map_or(Ok(self.position), Err)
    }
}
