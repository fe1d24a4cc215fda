//! What must hold: a fold of its own, event by event, of every history that the log ever had, and what follows from it.
//!
//! A restored log has histories that its events' chain hashes tell apart. So what a controller has folded is known by the hash of its
//! last event, and what a sidecar runs must be what that version had in one of the histories: never a mix (I3).

use std::collections::{BTreeMap, BTreeSet};
use weft_eventlog::{EventHash, RecordedEvent};
use weft_model::{ConfigVersion, Fact, InstanceId};
use weft_projector::Decoder;
use weft_projector::rows::RowChanges;
use weft_routing::{Hash, Projection};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Oracle {
    /// The fold of the log as it is.
    pub(crate) projection: Projection,
    facts: Vec<Fact>,
    decoder: Decoder,
    /// What a projection is after the event with this hash.
    folds: BTreeMap<EventHash, Hash>,
    /// What each instance may run, of all histories.
    snapshots: BTreeSet<(InstanceId, ConfigVersion, Hash)>,
    /// Events that some checkpoint ever covered.
    covered: BTreeSet<EventHash>,
    /// The fold up to the checkpoint, and the hash of its last event.
    rows: (Projection, EventHash),
}

impl Oracle {
    pub(crate) fn new() -> Self {
        Self {
            projection: Projection::default(),
            facts: Vec::new(),
            decoder: Decoder::default(),
            folds: BTreeMap::new(),
            snapshots: BTreeSet::new(),
            covered: BTreeSet::new(),
            rows: (Projection::default(), EventHash::GENESIS),
        }
    }

    /// An event was appended.
    pub(crate) fn append(&mut self, event: &RecordedEvent) -> Result<(), String> {
        let fact = self.decoder.decode(&event.view()).map_err(|error| format!("I1: {error}"))?;
        self.projection.apply([&fact]).map_err(|error| format!("I1: the log is not in order: {error}"))?;
        self.facts.push(fact);
        self.folds.insert(event.hash, digest(&self.projection));
        for instance in self.projection.sidecars() {
            if let Some(wanted) = self.projection.wanted(instance) {
                self.snapshots.insert((instance.clone(), wanted.version, wanted.class.manifest.hash()));
            }
        }
        Ok(())
    }

    /// The log now has only so many events.
    pub(crate) fn rewind(&mut self, events: usize) -> Result<(), String> {
        self.facts.truncate(events);
        self.projection = Projection::default();
        self.projection
            .apply(&self.facts)
            .map_err(|error| format!("I1: the log is not in order: {error}"))?;
        Ok(())
    }

    /// What a controller has folded, up to the event with this hash.
    pub(crate) fn check_fold(&self, projection: &Projection, last: EventHash) -> Result<(), String> {
        match self.folds.get(&last) {
            Some(expected) if *expected == digest(projection) => Ok(()),
            Some(_) => Err(format!("I2: another fold at {}", projection.version())),
            None => Err(format!("I2: {} was folded and never was in the log", projection.version())),
        }
    }

    /// What an instance runs, or is told to run.
    pub(crate) fn check_snapshot(
        &self,
        of: &InstanceId,
        at: ConfigVersion,
        hash: Hash,
    ) -> Result<(), String> {
        if self.snapshots.contains(&(of.clone(), at, hash)) {
            return Ok(());
        }
        Err(format!("I3: {of} has at {at} what the log never had for it"))
    }

    /// The rows of these events were committed, and are these now.
    pub(crate) fn commit(&mut self, events: &[RecordedEvent], stored: &RowChanges) -> Result<(), String> {
        let (rows, last) = &mut self.rows;
        let mut from = usize::try_from(rows.version().position.0).unwrap_or(usize::MAX);
        let before = from.checked_sub(1).map_or(Some(EventHash::GENESIS), |at| Some(events.get(at)?.hash));
        if before != Some(*last) {
            // They were of a history that is no more.
            (*rows, from) = (Projection::default(), 0);
        }
        let folded = rows.apply(&self.facts[from..events.len()]);
        folded.map_err(|error| format!("I1: the log is not in order: {error}"))?;
        *last = events.last().map_or(EventHash::GENESIS, |event| event.hash);
        self.covered.extend(events[from..].iter().map(|event| event.hash));
        if !RowChanges::all(rows).since(stored).is_empty() {
            return Err(format!("I2: rows of {} are not what the log says", rows.version()));
        }
        Ok(())
    }

    /// Something is published up to this event.
    pub(crate) fn check_published(&self, last: EventHash) -> Result<(), String> {
        if self.covered.contains(&last) { Ok(()) } else { Err("published before it was committed".into()) }
    }
}

/// Stands for everything that follows from a fold.
fn digest(projection: &Projection) -> Hash {
    let mut bytes = projection.version().to_string().into_bytes();
    for (key, shard) in projection.shards() {
        bytes.extend(key.to_string().bytes());
        bytes.extend(shard.hash.0);
        bytes.extend(shard.position.0.to_be_bytes());
    }
    for (class, built) in projection.classes() {
        bytes.extend(class.to_string().bytes());
        bytes.extend(built.manifest.hash().0);
    }
    for instance in projection.sidecars() {
        bytes.extend(instance.to_string().bytes());
        bytes.extend(
            projection.wanted(instance).map(|wanted| wanted.version.to_string()).unwrap_or_default().bytes(),
        );
    }
    Hash::of(&bytes)
}
