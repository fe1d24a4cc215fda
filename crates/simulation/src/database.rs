//! What only PostgreSQL does, as a small honest model. The decisions are the real ones: which requests of a batch are accepted
//! ([`weft_eventlog::decide`]), which epoch an adoption opens.
//!
//! Assumptions:
//! - A request takes effect at one moment, whole or not at all, after the moments of those before it: appends hold the log's lock to their
//!   commit, and so does a projector's transaction the row of its checkpoint.
//! - What is committed outlasts a crash (`fsync`, `synchronous_commit`). A restored backup has all tables as of one moment.
//! - The database's clock never goes back and is the simulation's.
//! - Each start of the server, and each restored backup, is another lineage; whoever appends next opens an epoch.
//! - A session's end is noticed when its process ends, and not when the network between is cut.
//!
//! Beside that it keeps watch: over fencing, over appends while a finding stands, over commands that are recorded twice.

use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;
use weft_eventlog::decide::{Ground, LogTail, Outcome, decide};
use weft_eventlog::{
    Adoption, AppendError, AppendRequest, Appended, EventHash, Head, Point, RecordedEvent, Rewind, Seen,
    UnixMicros, epoch_to_adopt,
};
use weft_model::{ConfigVersion, Epoch, Position, Version};
use weft_projector::rows::RowChanges;
use weft_projector::{Commit, Lease};

use crate::plant::Plant;

/// When every simulation begins: some day, for ids that tell when they were made.
const BEGAN: UnixMicros = UnixMicros(1_790_000_000_000_000);

/// A process: a controller, and which of its lives.
pub(crate) type Process = (usize, u64);

/// The tables.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tables {
    pub(crate) events: Vec<RecordedEvent>,
    outcomes: BTreeMap<Uuid, Outcome>,
    heads: BTreeMap<String, Version>,
    epochs: Vec<OpenedEpoch>,
    findings: Vec<Rewind>,
    adoptions: Vec<Adoption>,
    lease: LeaseRow,
    projection: ProjectionRow,
    rows: RowChanges,
    folds: Vec<StoredFold>,
}

#[derive(Clone, Copy, Debug)]
struct OpenedEpoch {
    epoch: Epoch,
    lineage: u64,
    fork: Position,
}

#[derive(Clone, Copy, Debug, Default)]
struct LeaseRow {
    term: i64,
    holder: Option<Process>,
    expires: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct ProjectionRow {
    term: i64,
    version: ConfigVersion,
    hash: Option<EventHash>,
}

/// A checkpoint of the fold.
#[derive(Clone, Debug)]
pub(crate) struct StoredFold {
    pub(crate) version: ConfigVersion,
    pub(crate) log_hash: EventHash,
    pub(crate) body: Vec<u8>,
}

/// Why a batch was not appended.
#[derive(Clone, Debug)]
pub(crate) enum AppendFailure {
    /// An event that this process knows is gone.
    Lost(Point),
    /// A finding stands.
    Standing,
    /// What was assumed does not hold.
    Unexpected,
}

/// What a batch was decided on ahead, and how.
#[derive(Clone, Debug)]
pub(crate) struct Ahead {
    pub(crate) epoch: Epoch,
    pub(crate) tail: LogTail,
    pub(crate) answers: Vec<Result<Appended, AppendError>>,
    pub(crate) recorded: Vec<Uuid>,
    pub(crate) end: LogTail,
}

/// What an append is told.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    pub(crate) epoch: Epoch,
    pub(crate) answers: Vec<Result<Appended, AppendError>>,
    pub(crate) tail: LogTail,
    /// The versions of the batch's scopes.
    pub(crate) heads: BTreeMap<String, Version>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Database {
    pub(crate) tables: Tables,
    pub(crate) plant: Option<Plant>,
    lineage: u64,
    /// Processes whose sessions have ended.
    ended: Vec<Process>,
    /// Whether the lease's session ended with the server.
    session_ended: bool,
    /// A backup took the tables' place.
    restored: bool,
    /// What was found wrong.
    pub(crate) wrong: Option<String>,
}

pub(crate) fn clock(now: Duration) -> UnixMicros {
    UnixMicros(BEGAN.0 + i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

impl Database {
    pub(crate) fn new(plant: Option<Plant>) -> Self {
        Self {
            tables: Tables::default(),
            plant,
            lineage: 1,
            ended: Vec::new(),
            session_ended: false,
            restored: false,
            wrong: None,
        }
    }

    fn planted(&self, plant: Plant) -> bool {
        self.plant == Some(plant)
    }

    fn complain(&mut self, what: String) {
        self.wrong.get_or_insert(what);
    }

    // Life.

    /// The server was killed and starts again.
    pub(crate) fn restart(&mut self) {
        self.lineage += 1;
        self.session_ended = true;
    }

    /// A backup takes the place of the tables, or of the log's alone.
    pub(crate) fn restore(&mut self, backup: Tables, log_alone: bool) {
        let before = std::mem::replace(&mut self.tables, backup);
        if log_alone {
            let Tables { lease, projection, rows, folds, .. } = before;
            self.tables = Tables { lease, projection, rows, folds, ..std::mem::take(&mut self.tables) };
        }
        self.restored = true;
        self.restart();
    }

    /// A process ended, and its sessions with it.
    pub(crate) fn process_ended(&mut self, process: Process) {
        self.ended.push(process);
    }

    // The log.

    pub(crate) fn tail(&self) -> LogTail {
        self.tables.events.last().map_or(LogTail::EMPTY, |last| LogTail {
            position: last.position,
            hash: last.hash,
            recorded_at: last.recorded_at,
        })
    }

    fn epoch(&self) -> Epoch {
        self.tables.epochs.iter().map(|opened| opened.epoch).max().unwrap_or_default()
    }

    pub(crate) fn head(&self) -> Head {
        let LogTail { position, hash, recorded_at } = self.tail();
        Head { epoch: self.epoch(), position, hash, recorded_at: Some(recorded_at) }
    }

    /// The hash of an event; none if there is no such event.
    pub(crate) fn hash_at(&self, position: Position) -> Option<EventHash> {
        match position.0.checked_sub(1) {
            None => Some(EventHash::GENESIS),
            Some(index) => self.tables.events.get(usize::try_from(index).ok()?).map(|event| event.hash),
        }
    }

    /// The events after a position, at most so many.
    pub(crate) fn page(&self, after: Position, limit: usize) -> Vec<RecordedEvent> {
        let from = usize::try_from(after.0).unwrap_or(usize::MAX).min(self.tables.events.len());
        self.tables.events[from..].iter().take(limit).cloned().collect()
    }

    /// What a command recorded.
    pub(crate) fn outcome(&self, command: Uuid) -> Option<&Outcome> {
        self.tables.outcomes.get(&command)
    }

    fn establish(&mut self) {
        if self.tables.epochs.last().is_some_and(|last| last.lineage == self.lineage) {
            return;
        }
        let (epoch, fork) = (self.epoch().next(), self.tail().position);
        self.tables.epochs.push(OpenedEpoch { epoch, lineage: self.lineage, fork });
    }

    /// Appends a batch: decided under the lock, or ahead of it. `known` are the events that the process read or appended last.
    pub(crate) fn append(
        &mut self,
        requests: &[(AppendRequest, [u8; 32])],
        ahead: Option<&Ahead>,
        known: &[Point],
        now: Duration,
    ) -> Result<Written, AppendFailure> {
        let stale = self.tables.epochs.last().is_none_or(|last| last.lineage != self.lineage);
        if ahead.is_some() && stale {
            return Err(AppendFailure::Unexpected);
        }
        self.establish();
        if let Some(lost) = known.iter().find(|point| self.hash_at(point.position) != Some(point.hash)) {
            return Err(AppendFailure::Lost(*lost));
        }
        let stands = !self.standing().is_empty();
        if stands && !self.planted(Plant::AppendWhileRewound) {
            return Err(AppendFailure::Standing);
        }
        let (epoch, tail) = (self.epoch(), self.tail());
        let written = match ahead {
            Some(ahead) => {
                let recorded = ahead.recorded.iter().any(|id| self.tables.outcomes.contains_key(id));
                let holds = ahead.tail == tail && ahead.epoch == epoch && !recorded;
                if !holds && !self.planted(Plant::SkipGround) {
                    return Err(AppendFailure::Unexpected);
                }
                Written {
                    epoch: ahead.epoch,
                    answers: ahead.answers.clone(),
                    tail: ahead.end,
                    heads: BTreeMap::new(),
                }
            }
            None => {
                let scopes = requests.iter().flat_map(|(request, _)| &request.scopes);
                let mut heads: BTreeMap<&str, Version> = scopes
                    .map(|part| {
                        let version = self.tables.heads.get(&part.scope).copied().unwrap_or_default();
                        (part.scope.as_str(), version)
                    })
                    .collect();
                let ids = requests.iter().map(|(request, _)| request.command_id);
                let known = ids.filter_map(|id| Some((id, self.tables.outcomes.get(&id)?.clone())));
                let outcomes =
                    if self.planted(Plant::ForgetOutcomes) { BTreeMap::new() } else { known.collect() };
                let ground = Ground { epoch, tail, now: clock(now), outcomes };
                let decided =
                    decide(ground, &mut heads, requests.iter().map(|(request, print)| (request, *print)));
                let heads = heads.into_iter().map(|(scope, version)| (scope.to_owned(), version)).collect();
                Written { epoch, answers: decided.answers, tail: decided.tail, heads }
            }
        };
        if stands && written.tail.position > tail.position {
            self.complain("an event was appended while a finding stands".into());
        }
        self.write(requests, &written);
        Ok(written)
    }

    /// Records what was decided. Events are what the answers say.
    fn write(&mut self, requests: &[(AppendRequest, [u8; 32])], written: &Written) {
        for ((request, fingerprint), answer) in requests.iter().zip(&written.answers) {
            let Ok(appended) = answer else { continue };
            let Some(positions) = appended.positions.as_ref().filter(|_| !appended.repeated) else {
                continue;
            };
            let mut position = *positions.start();
            for part in request.scopes.iter().filter(|part| !part.events.is_empty()) {
                let last = appended.versions.get(&part.scope).copied().unwrap_or_default();
                let first = last.0.saturating_sub(part.events.len() as u64);
                for (event, version) in part.events.iter().zip(first + 1..) {
                    let mut event = RecordedEvent {
                        position,
                        epoch: appended.epoch,
                        scope: part.scope.clone(),
                        version: Version(version),
                        event_type: event.event_type.clone(),
                        schema: event.schema,
                        actor: request.actor.clone(),
                        reason: request.reason.clone(),
                        cause: request.cause,
                        command_id: request.command_id,
                        recorded_at: appended.recorded_at,
                        payload: event.payload.clone(),
                        hash: EventHash::GENESIS,
                    };
                    event.hash = event.expected_hash(self.tail().hash);
                    if event.position != self.tail().position.next() {
                        self.complain(format!("I1: position {position} follows {}", self.tail().position));
                    }
                    self.tables.events.push(event);
                    position = position.next();
                }
                self.tables.heads.insert(part.scope.clone(), last);
            }
            let outcome = Outcome { fingerprint: *fingerprint, appended: appended.clone() };
            if self.tables.outcomes.insert(request.command_id, outcome).is_some() {
                self.complain(format!("I1: command {} was recorded twice", request.command_id));
            }
        }
        if self.tail().hash != written.tail.hash && self.wrong.is_none() {
            self.complain("I2: what was decided is not what its answers say".into());
        }
    }

    // Rewinds.

    /// The findings that stand.
    pub(crate) fn standing(&self) -> Vec<Rewind> {
        let settled =
            self.tables.adoptions.iter().map(|adoption| adoption.rewind_upto).max().unwrap_or_default();
        self.tables.findings.iter().filter(|finding| finding.id > settled).cloned().collect()
    }

    pub(crate) fn adoption(&self) -> Option<&Adoption> {
        self.tables.adoptions.last()
    }

    pub(crate) fn check_seen(&self, seen: &Point) -> Seen {
        if self.hash_at(seen.position) == Some(seen.hash) {
            return Seen::Stands;
        }
        let given_up = self.tables.adoptions.iter().any(|adoption| {
            let settled = |finding: &&Rewind| finding.id <= adoption.rewind_upto;
            seen.epoch < adoption.epoch
                && (seen.position > adoption.fork_position
                    || self
                        .tables
                        .findings
                        .iter()
                        .filter(settled)
                        .any(|it| it.seen.version() >= seen.version()))
        });
        if given_up { Seen::GivenUp } else { Seen::Lost { found: self.tail().position } }
    }

    /// Records a finding, unless it is none.
    pub(crate) fn report(&mut self, seen: &Point, witness: &str, now: Duration) -> Seen {
        let checked = self.check_seen(seen);
        if let Seen::Lost { .. } = checked {
            let said = self.standing().iter().any(|finding| {
                finding.seen.version() >= seen.version()
                    && (finding.witness == witness || finding.seen.hash == seen.hash)
            });
            if !said {
                let id = self.tables.findings.iter().map(|finding| finding.id).max().unwrap_or_default() + 1;
                self.tables.findings.push(Rewind {
                    id,
                    seen: *seen,
                    found: ConfigVersion::new(self.epoch(), self.tail().position),
                    found_hash: self.hash_at(seen.position),
                    witness: witness.into(),
                    reported_at: clock(now),
                });
            }
        }
        checked
    }

    /// Goes on without what was lost, if nobody saw more of it than what was looked at. Says whether it did.
    pub(crate) fn adopt(&mut self, upto: u64, now: Duration) -> bool {
        let standing = self.standing();
        let newest =
            |looked: u64| standing.iter().filter(|it| it.id <= looked).map(|it| it.seen.version()).max();
        let (Some(_), Some(first)) = (newest(u64::MAX), standing.iter().map(|it| it.seen.version()).min())
        else {
            return false;
        };
        if newest(upto) < newest(u64::MAX) {
            return false;
        }
        let last = self.tables.events.last().map(|event| event.epoch).unwrap_or_default();
        let adopted = self.tables.adoptions.iter().map(|adoption| adoption.epoch).max().unwrap_or_default();
        let known = self.epoch().max(last).max(adopted);
        let epoch = epoch_to_adopt(known, &standing);
        let epoch = if self.planted(Plant::KeepEpoch) { self.epoch() } else { epoch };
        let seen_first = standing.iter().map(|it| it.seen.position.0).min().unwrap_or_default();
        let forks = self.tables.epochs.iter().filter(|it| it.epoch > first.epoch && it.epoch < epoch);
        let common = self.tail().position.0.min(seen_first.saturating_sub(1));
        let fork = forks.map(|it| it.fork.0).min().map_or(common, |fork| fork.min(common));
        self.tables.epochs.push(OpenedEpoch { epoch, lineage: self.lineage, fork: self.tail().position });
        self.tables.adoptions.push(Adoption {
            id: self.tables.adoptions.len() as u64 + 1,
            rewind_upto: standing.iter().map(|it| it.id).max().unwrap_or_default(),
            epoch,
            fork_position: Position(fork),
            actor: "operator".into(),
            reason: "the backup is what there is".into(),
            adopted_at: clock(now),
        });
        true
    }

    // The projection.

    pub(crate) fn lease_is_free(&self, process: Process, now: Duration) -> bool {
        let LeaseRow { holder, expires, .. } = self.tables.lease;
        let Some(holder) = holder else { return true };
        expires < now || holder == process || self.session_ended || self.ended.contains(&holder)
    }

    pub(crate) fn acquire(&mut self, process: Process, ttl: Duration, now: Duration) -> Option<Lease> {
        if !self.lease_is_free(process, now) {
            return None;
        }
        let term = self.tables.lease.term + 1;
        if self.tables.projection.term >= term {
            return None;
        }
        self.tables.lease = LeaseRow { term, holder: Some(process), expires: now + ttl };
        self.tables.projection.term = term;
        self.session_ended = false;
        Some(Lease { term, checkpoint: self.tables.projection.version })
    }

    pub(crate) fn renew(&mut self, process: Process, term: i64, ttl: Duration, now: Duration) -> bool {
        let lease = &mut self.tables.lease;
        let held = lease.holder == Some(process) && lease.term == term;
        if held {
            lease.expires = now + ttl;
            self.session_ended = false;
        }
        held
    }

    pub(crate) fn release(&mut self, process: Process, term: i64) {
        let lease = &mut self.tables.lease;
        if lease.holder == Some(process) && lease.term == term {
            lease.holder = None;
        }
    }

    pub(crate) const fn checkpoint(&self) -> ConfigVersion {
        self.tables.projection.version
    }

    /// The checkpoint, if the log has both its event and this one.
    pub(crate) fn covered(&self, position: Position, hash: EventHash) -> Option<ConfigVersion> {
        let ProjectionRow { version, hash: last, .. } = self.tables.projection;
        let stands = last.is_none_or(|last| self.hash_at(version.position) == Some(last));
        let folded = self.hash_at(position) == Some(hash);
        (stands && folded || self.planted(Plant::TrustCheckpoint)).then_some(version)
    }

    pub(crate) fn checkpoint_point(&self) -> Option<Point> {
        let ProjectionRow { version, hash, .. } = self.tables.projection;
        Some(Point { epoch: version.epoch, position: version.position, hash: hash? })
    }

    pub(crate) fn rows(&self) -> (ConfigVersion, RowChanges) {
        (self.checkpoint(), self.tables.rows.clone())
    }

    /// The projector's transaction.
    pub(crate) fn commit(
        &mut self,
        process: Process,
        (term, from): (i64, Position),
        (version, hash): (ConfigVersion, Option<EventHash>),
        rows: &RowChanges,
    ) -> Commit {
        let row = self.tables.projection;
        let holds = row.term == term || self.planted(Plant::SkipTermCheck);
        let in_log = hash.is_none_or(|hash| self.hash_at(version.position) == Some(hash));
        if !holds || row.version.position != from || !in_log && !self.planted(Plant::ProjectLost) {
            return Commit::Fenced;
        }
        // A backup repeats terms. Then a former holder may write under a number that is another's: right rows of the log that there is,
        // on the very checkpoint that it left, or the comparison of rows tells.
        let foreign = self.tables.lease.holder != Some(process) && !self.restored;
        if foreign || self.tables.lease.term != term {
            let LeaseRow { term: newest, .. } = self.tables.lease;
            self.complain(format!(
                "fencing: rows were written under term {term}, and the lease has term {newest}"
            ));
        }
        let stands = row.hash.is_some() && self.hash_at(row.version.position) == row.hash;
        if stands && version.position < row.version.position {
            self.complain(format!("I2: the checkpoint went back from {} to {version}", row.version));
        }
        self.tables.projection = ProjectionRow { term: row.term, version, hash };
        self.tables.rows.write(rows.clone());
        Commit::Done
    }

    pub(crate) fn put_fold(&mut self, fold: StoredFold) {
        self.tables.folds.retain(|stored| stored.version.position < fold.version.position);
        self.tables.folds.push(fold);
        while self.tables.folds.len() > 3 {
            self.tables.folds.remove(0);
        }
    }

    /// The newest checkpoint of the fold whose last event is in the log.
    pub(crate) fn fold_checkpoint(&self) -> Option<&StoredFold> {
        let in_log = |fold: &&StoredFold| {
            self.hash_at(fold.version.position) == Some(fold.log_hash) || self.planted(Plant::TrustFold)
        };
        self.tables.folds.iter().rev().find(in_log)
    }
}
