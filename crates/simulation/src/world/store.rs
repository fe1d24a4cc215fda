//! Questions to the database and their way: lost before it, lost behind it, late, or to a server that is down.

use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;
use weft_eventlog::decide::Outcome;
use weft_eventlog::{Adoption, AppendRequest, EventHash, Head, Point, RecordedEvent, Rewind, Seen};
use weft_model::{ConfigVersion, Position};
use weft_projector::leadership::LEASE_TTL;
use weft_projector::rows::RowChanges;
use weft_projector::{Commit, Lease};

use super::{CALL_TIMEOUT, Event, Link, World, say};
use crate::database::{Ahead, AppendFailure, Process, StoredFold, Written};

/// Events in a page of a tail.
const PAGE: usize = 16;

/// A question.
#[derive(Debug)]
pub(crate) enum Ask {
    /// What a start begins with.
    Start,
    /// The events after this one.
    Page(Position),
    LeaseIsFree,
    CheckpointPoint,
    CheckSeen(Point),
    Report(Point, String),
    Checkpoint,
    /// How far the log is projected, for a fold that ends with this event.
    Covered(Position, EventHash),
    Head,
    Acquire,
    Renew(i64),
    Release(i64),
    Rows,
    Commit {
        term: i64,
        from: Position,
        version: ConfigVersion,
        hash: Option<EventHash>,
        rows: Arc<RowChanges>,
    },
    PutFold(StoredFold),
    Append {
        requests: Vec<(AppendRequest, [u8; 32])>,
        ahead: Option<Box<Ahead>>,
        known: Vec<Point>,
    },
    Outcome(Uuid),
    Watch,
}

/// Its answer.
#[derive(Debug)]
pub(crate) enum Answer {
    Start {
        fold: Option<StoredFold>,
        events: Vec<RecordedEvent>,
    },
    /// The events, and the hash of the one before them.
    Page(Vec<RecordedEvent>, Option<EventHash>),
    LeaseIsFree(bool),
    CheckpointPoint(Option<Point>),
    Seen(Seen),
    Checkpoint(ConfigVersion),
    Covered(Option<ConfigVersion>),
    Head(Head),
    Acquired(Option<Lease>),
    Renewed(bool),
    Rows(ConfigVersion, RowChanges),
    Committed(Commit),
    Done,
    Appended(Result<Written, AppendFailure>),
    Outcome(Option<Outcome>),
    Watch(Vec<Rewind>, Option<Adoption>),
}

impl World {
    /// A controller asks the database.
    pub(super) fn ask(&mut self, of: Process, call: u64, ask: Ask) {
        if self.is_lost(Link::Ask(of.0)) {
            self.after(CALL_TIMEOUT, Event::Answer { to: of, call, answer: None });
        } else {
            let wait = self.delay();
            self.after(wait, Event::Ask { of, call, ask: Box::new(ask) });
        }
    }

    /// A question reaches the database.
    pub(super) fn asked(&mut self, of: Process, call: u64, ask: Ask) {
        if self.now < self.down {
            let wait = self.delay();
            return self.after(wait, Event::Answer { to: of, call, answer: None });
        }
        if let Some(wait) = self.stalled.checked_sub(self.now).filter(|wait| !wait.is_zero()) {
            return self.after(wait, Event::Ask { of, call, ask: Box::new(ask) });
        }
        if !self.controllers[of.0].lives(of) && matches!(ask, Ask::Acquire | Ask::Renew(_) | Ask::Release(_))
        {
            // Its session ended with its process.
            return;
        }
        let answer = self.answer(of, ask);
        let lost = self.is_lost(Link::Answer(of.0));
        let wait = if lost { CALL_TIMEOUT } else { self.delay() };
        self.after(wait, Event::Answer { to: of, call, answer: (!lost).then(|| Box::new(answer)) });
    }

    fn answer(&mut self, of: Process, ask: Ask) -> Answer {
        let now = self.now;
        let database = &mut self.database;
        match ask {
            Ask::Start => {
                let fold = database.fold_checkpoint().cloned();
                let from = fold.as_ref().map(|fold| fold.version.position).unwrap_or_default();
                Answer::Start { fold, events: database.page(from, usize::MAX) }
            }
            Ask::Page(after) => Answer::Page(database.page(after, PAGE), database.hash_at(after)),
            Ask::LeaseIsFree => Answer::LeaseIsFree(database.lease_is_free(of, now)),
            Ask::CheckpointPoint => Answer::CheckpointPoint(database.checkpoint_point()),
            Ask::CheckSeen(point) => Answer::Seen(database.check_seen(&point)),
            Ask::Report(point, who) => {
                let seen = database.report(&point, &who, now);
                say!(self, "db: {who} reports {}: {seen:?}", point.version());
                Answer::Seen(seen)
            }
            Ask::Checkpoint => Answer::Checkpoint(database.checkpoint()),
            Ask::Covered(position, hash) => Answer::Covered(database.covered(position, hash)),
            Ask::Head => Answer::Head(database.head()),
            Ask::Acquire => {
                let lease = database.acquire(of, LEASE_TTL, now);
                say!(self, "db: c{} takes the lease: {lease:?}", of.0);
                Answer::Acquired(lease)
            }
            Ask::Renew(term) => Answer::Renewed(database.renew(of, term, LEASE_TTL, now)),
            Ask::Release(term) => {
                database.release(of, term);
                Answer::Done
            }
            Ask::Rows => {
                let (version, rows) = database.rows();
                Answer::Rows(version, rows)
            }
            Ask::Commit { term, from, version, hash, rows } => {
                let commit = database.commit(of, (term, from), (version, hash), &rows);
                say!(self, "db: c{} commits {version} under term {term}: {commit:?}", of.0);
                if commit == Commit::Done {
                    self.check_commit(version);
                }
                Answer::Committed(commit)
            }
            Ask::PutFold(fold) => {
                database.put_fold(fold);
                Answer::Done
            }
            Ask::Append { requests, ahead, known } => {
                let before = database.tables.events.len();
                let written = database.append(&requests, ahead.as_deref(), &known, now);
                let recorded: Vec<RecordedEvent> = database.tables.events[before..].to_vec();
                let how = if ahead.is_some() { "ahead" } else { "under the lock" };
                match &written {
                    Ok(written) => say!(
                        self,
                        "db: c{} appends {} event(s) {how}, to {}.{}",
                        of.0,
                        recorded.len(),
                        written.epoch,
                        written.tail.position
                    ),
                    Err(failure) => say!(self, "db: c{} does not append {how}: {failure:?}", of.0),
                }
                for event in &recorded {
                    let checked = self.oracle.append(event);
                    self.check(checked);
                }
                if !recorded.is_empty() {
                    (0..self.controllers.len()).for_each(|controller| self.hint(controller));
                }
                Answer::Appended(written)
            }
            Ask::Outcome(id) => Answer::Outcome(database.outcome(id).cloned()),
            Ask::Watch => Answer::Watch(database.standing(), database.adoption().cloned()),
        }
    }

    /// The rows that were just committed.
    fn check_commit(&mut self, version: ConfigVersion) {
        let position = usize::try_from(version.position.0).unwrap_or(usize::MAX);
        let Some(events) = self.database.tables.events.get(..position) else {
            return self.complain(format!("rows of {version} were committed, which is not in the log"));
        };
        let (_, rows) = self.database.rows();
        let checked = self.oracle.commit(events, &rows);
        self.check(checked);
    }

    /// The server is killed, and is there again after `down`.
    pub(super) fn database_ends(&mut self, down: Duration) {
        self.down = self.now + down;
        self.database.restart();
        // What is under way to it, or from it, is lost.
        let mut lost = Vec::new();
        for event in self.queue.values_mut() {
            match event {
                Event::Answer { answer, .. } => *answer = None,
                Event::Ask { of, call, .. } => lost.push((*of, *call)),
                _ => {}
            }
        }
        self.queue.retain(|_, event| !matches!(event, Event::Ask { .. }));
        for (to, call) in lost {
            let wait = self.delay();
            self.after(wait, Event::Answer { to, call, answer: None });
        }
    }

    /// A backup takes the place of the tables: of all of them, or of the log's alone, whose end is lost then.
    pub(super) fn database_is_restored(&mut self, backup: usize, log_alone: bool) {
        let Some(tables) = self.backups.get(backup).cloned() else { return };
        self.database.restore(tables, log_alone);
        let checked = self.oracle.rewind(self.database.tables.events.len());
        self.check(checked);
        self.forget_lost();
    }
}
