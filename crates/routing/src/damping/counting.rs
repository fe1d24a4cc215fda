//! What a controller counts instead of recording it. Pure; the controller keeps one, and has recorded what is [`due`](Counting::due).
//!
//! Revisions rule here as they do in the log: a report that is older than what was recorded or counted is refused as stale,
//! whichever of the two it was, and a summary is recorded only if its last report is newer than what the log has. So counts
//! that two controllers have of one endpoint are recorded by the one that saw its last report; the other's are dropped. For
//! the same reason a report is recorded even if it says what the log says already: another controller may be about to record
//! an older one that does not.

use super::counts;
use crate::state::RoutingState;
use std::collections::BTreeMap;
use std::time::Duration;
use weft_model::health::{self, FlapsSummarized, Health, HealthCommand, HealthReported};
use weft_model::{InstanceId, Rejection, Timestamp};

/// How long counts are gathered before they are recorded.
pub const SUMMARY_EVERY: Duration = Duration::from_secs(10);

/// What was counted and is not in the log. Holds nothing but endpoints whose reports are [counted](counts), one entry each.
#[derive(Clone, Debug, Default)]
pub struct Counting {
    entries: BTreeMap<InstanceId, Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    downs: u32,
    ups: u32,
    since: Timestamp,
    last: HealthReported,
}

/// What became of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is counted, or was before.
    Counted,
    /// This is to be recorded, now, and to be told to [`Counting::settle`] then.
    Record(HealthCommand),
}

impl Counting {
    /// Takes a report in, or says what is to be recorded because of it.
    ///
    /// # Errors
    /// If the report is stale, or nothing that could be recorded.
    pub fn take(
        &mut self,
        state: &RoutingState,
        id: &InstanceId,
        report: HealthReported,
        now: Timestamp,
    ) -> Result<Taken, Rejection> {
        let counts = counts(state, id, now);
        if !counts && !self.entries.contains_key(id) {
            return Ok(Taken::Record(HealthCommand::Report(report)));
        }
        health::check(&report)?;
        let recorded = state.health(id).and_then(|entry| entry.state.as_ref());
        let newest = self.entries.get(id).map(|entry| &entry.last).into_iter().chain(recorded);
        let newest = newest.max_by_key(|newest| newest.revision);
        match newest {
            Some(newest) if *newest == report => return Ok(Taken::Counted),
            Some(newest) if newest.revision >= report.revision => {
                return Err(Rejection::StaleObservation { current: newest.revision });
            }
            Some(_) | None => {}
        }
        let before = state.health_reported(id);
        let entry = self.entries.entry(id.clone()).or_insert_with(|| Entry {
            downs: 0,
            ups: 0,
            since: now,
            last: HealthReported { health: before, ..report.clone() },
        });
        entry.count(report);
        Ok(if counts { Taken::Counted } else { Taken::Record(entry.command(now)) })
    }

    /// Everything that is due to be recorded: because it was gathered for long enough, or because the endpoint's reports are not counted
    /// any more. With `all`, the others too, as before an end.
    #[must_use]
    pub fn due(
        &mut self,
        state: &RoutingState,
        now: Timestamp,
        all: bool,
    ) -> Vec<(InstanceId, HealthCommand)> {
        // Of an instance that left there is nothing to say.
        self.entries
            .retain(|id, _| state.membership(id).is_some_and(|entry| entry.state.registration().is_some()));
        let due = self
            .entries
            .iter()
            .filter(|(id, entry)| all || now.since(entry.since) >= SUMMARY_EVERY || !counts(state, id, now));
        due.map(|(id, entry)| (id.clone(), entry.command(now))).collect()
    }

    /// Forgets what was recorded, or is older than what is.
    pub fn settle(&mut self, id: &InstanceId, command: &HealthCommand, now: Timestamp) {
        let (revision, downs, ups) = match command {
            HealthCommand::Summarize(summary) => (summary.last.revision, summary.downs, summary.ups),
            HealthCommand::Report(report) => (report.revision, 0, 0),
            HealthCommand::Reconsider => return,
        };
        let Some(entry) = self.entries.get_mut(id) else { return };
        if entry.last.revision <= revision {
            self.entries.remove(id);
        } else {
            entry.downs = entry.downs.saturating_sub(downs);
            entry.ups = entry.ups.saturating_sub(ups);
            entry.since = now;
        }
    }

    /// Whether nothing is counted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl Entry {
    fn count(&mut self, report: HealthReported) {
        match (self.last.health, report.health) {
            (Health::Healthy, Health::Unhealthy) => self.downs = self.downs.saturating_add(1),
            (Health::Unhealthy, Health::Healthy) => self.ups = self.ups.saturating_add(1),
            (Health::Unknown | Health::Healthy | Health::Unhealthy, _) => {}
        }
        self.last = report;
    }

    fn command(&self, now: Timestamp) -> HealthCommand {
        let Self { downs, ups, since, ref last } = *self;
        if downs == 0 && ups == 0 {
            return HealthCommand::Report(last.clone());
        }
        let over_ms = u32::try_from(now.since(since).as_millis()).unwrap_or(u32::MAX);
        HealthCommand::Summarize(FlapsSummarized { downs, ups, over_ms, last: last.clone() })
    }
}
