//! The mesh in memory, shared by everything in a controller: the fold of the log to its head, which commands are
//! decided against, and beside it what has been published.
//!
//! Fed by the projector's task only. Readers take the lock for as long as one look takes; nobody awaits under it.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use weft_eventlog::EventHash;
use weft_model::{ConfigVersion, Fact, Position};
use weft_routing::{Lane, Projection};

use crate::fault::Fault;
use crate::published::{Delta, Published};
use crate::rows::RowChanges;

/// Batches that wait for the checkpoint one by one. When more wait, the newest are merged, so that memory stays within
/// what the mesh itself takes; they are then published together.
const PENDING_MAX: usize = 64;

/// What this controller's projector does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It only folds; another one writes, or nobody does.
    Follower,
    /// It writes.
    Leader {
        /// The term of its lease.
        term: i64,
    },
}

/// See the module's documentation. Cheap to clone.
#[derive(Clone, Debug)]
pub struct View {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    projection: RwLock<Projection>,
    published: RwLock<Published>,
    folded: watch::Sender<ConfigVersion>,
    publication: watch::Sender<ConfigVersion>,
    fault: watch::Sender<Option<Arc<Fault>>>,
    role: watch::Sender<Role>,
}

impl Default for View {
    fn default() -> Self {
        Self::new()
    }
}

impl View {
    /// An empty mesh, nothing folded.
    #[must_use]
    pub fn new() -> Self {
        let shared = Shared {
            projection: RwLock::default(),
            published: RwLock::default(),
            folded: watch::Sender::new(ConfigVersion::default()),
            publication: watch::Sender::new(ConfigVersion::default()),
            fault: watch::Sender::new(None),
            role: watch::Sender::new(Role::Follower),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Looks at the fold's head.
    pub fn read<R>(&self, look: impl FnOnce(&Projection) -> R) -> R {
        look(&self.shared.projection.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at what has been published.
    pub fn published<R>(&self, look: impl FnOnce(&Published) -> R) -> R {
        look(&self.shared.published.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Follows the last event that was folded.
    #[must_use]
    pub fn folded(&self) -> watch::Receiver<ConfigVersion> {
        self.shared.folded.subscribe()
    }

    /// Follows the last event that was published. Only the newest value counts; those between are skipped.
    #[must_use]
    pub fn publications(&self) -> watch::Receiver<ConfigVersion> {
        self.shared.publication.subscribe()
    }

    /// Why the fold stopped; none while it runs.
    #[must_use]
    pub fn fault(&self) -> Option<Arc<Fault>> {
        self.shared.fault.borrow().clone()
    }

    /// What the projector does now, and changes of it.
    #[must_use]
    pub fn role(&self) -> watch::Receiver<Role> {
        self.shared.role.subscribe()
    }

    /// Whether the projector leads.
    #[must_use]
    pub fn leads(&self) -> bool {
        matches!(*self.shared.role.borrow(), Role::Leader { .. })
    }

    /// Waits until an event is folded. False if it was not within `limit`, or the fold has stopped.
    pub async fn wait_folded(&self, position: Position, limit: Duration) -> bool {
        let mut folded = self.folded();
        let mut fault = self.shared.fault.subscribe();
        tokio::select! {
            reached = folded.wait_for(|version| version.position >= position) => reached.is_ok(),
            _ = fault.wait_for(Option::is_some) => false,
            () = tokio::time::sleep(limit) => false,
        }
    }

    pub(crate) fn stop(&self, fault: Fault) -> Arc<Fault> {
        let fault = Arc::new(fault);
        self.shared.fault.send_replace(Some(Arc::clone(&fault)));
        fault
    }

    pub(crate) fn set_role(&self, role: Role) {
        self.shared.role.send_if_modified(|current| std::mem::replace(current, role) != role);
    }

    /// Folds the next events, the last of which has this chain hash, and says what they change.
    ///
    /// # Errors
    /// If they do not follow each other.
    pub fn fold(&self, facts: &[Fact], hash: Option<EventHash>) -> Result<Delta, Fault> {
        let delta = {
            let mut projection = self.shared.projection.write().unwrap_or_else(PoisonError::into_inner);
            let changes = projection.apply(facts).map_err(Fault::Fold)?;
            let scopes: BTreeSet<_> = facts.iter().map(|fact| &fact.scope).collect();
            let urgent = facts.iter().any(|fact| Lane::of(&fact.event) == Lane::Urgent);
            let folded_at = Some(Instant::now());
            Delta { hash, urgent, folded_at, ..Delta::new(&projection, &changes, scopes) }
        };
        self.shared.folded.send_replace(delta.version);
        Ok(delta)
    }

    /// Takes over a projection that was folded elsewhere, and says what follows from it, but for rows: who begins to lead
    /// compares all of them.
    #[must_use]
    pub fn install(&self, projection: Projection) -> Delta {
        let delta = Delta::everything(&projection);
        *self.shared.projection.write().unwrap_or_else(PoisonError::into_inner) = projection;
        self.shared.folded.send_replace(delta.version);
        delta
    }

    /// Publishes everything in `pending` that the checkpoint covers. Says how many subscribers were woken.
    pub(crate) fn publish(&self, pending: &mut Pending, checkpoint: ConfigVersion) -> usize {
        let ready = pending.take_until(checkpoint);
        let Some(version) = ready.last().map(|delta| delta.version) else { return 0 };
        let told = {
            let mut published = self.shared.published.write().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            // Who is woken twice looks once.
            ready.into_iter().map(|delta| published.take_in(delta, now)).max().unwrap_or(0)
        };
        self.shared.publication.send_replace(version);
        told
    }
}

/// Folded, and not yet known to be committed.
#[derive(Debug, Default)]
pub(crate) struct Pending(VecDeque<Delta>);

impl Pending {
    pub(crate) fn push(&mut self, delta: Delta) {
        let full = self.0.len() >= PENDING_MAX;
        match self.0.back_mut() {
            Some(last) if full => last.merge(delta),
            Some(_) | None => self.0.push_back(delta),
        }
    }

    /// Whether something in it cannot wait.
    pub(crate) fn is_urgent(&self) -> bool {
        self.0.iter().any(|delta| delta.urgent)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Its end and the rows of all of it, to be written at once; it stays pending.
    pub(crate) fn to_write(&self) -> Option<Delta> {
        let (first, last) = (self.0.front()?, self.0.back()?);
        let mut rows = Arc::clone(&first.rows);
        for next in self.0.iter().skip(1) {
            Arc::make_mut(&mut rows).merge(RowChanges::clone(&next.rows));
        }
        Some(Delta { version: last.version, hash: last.hash, rows, ..Delta::default() })
    }

    /// A checkpoint speaks of its own epoch: positions of another one may be of events that it does not cover, as when
    /// the log lost its end and the checkpoint is still that of the lost events. What is pending of an earlier epoch goes
    /// with the first of the checkpoint's own.
    fn take_until(&mut self, checkpoint: ConfigVersion) -> Vec<Delta> {
        let covered = |delta: &Delta| {
            delta.version.epoch == checkpoint.epoch && delta.version.position <= checkpoint.position
        };
        let ready = self.0.iter().rposition(covered).map_or(0, |last| last + 1);
        self.0.drain(..ready).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::Epoch;

    fn at(epoch: u64, position: u64) -> ConfigVersion {
        ConfigVersion::new(Epoch(epoch), Position(position))
    }

    fn delta(position: u64) -> Delta {
        Delta { version: at(1, position), ..Delta::default() }
    }

    #[test]
    fn only_what_the_checkpoint_covers_is_published() {
        let (view, mut pending) = (View::new(), Pending::default());
        [3, 7, 9].into_iter().for_each(|position| pending.push(delta(position)));
        let published = |view: &View| view.published(|published| published.version().position.0);
        for (checkpoint, expected) in [(2, 0), (3, 3), (8, 7), (7, 7), (9, 9)] {
            view.publish(&mut pending, at(1, checkpoint));
            assert_eq!(published(&view), expected, "checkpoint {checkpoint}");
        }
        assert!(pending.is_empty());
    }

    #[test]
    fn a_checkpoint_of_another_epoch_covers_nothing() {
        let (view, mut pending) = (View::new(), Pending::default());
        pending.push(delta(3));
        pending.push(Delta { version: at(2, 5), ..Delta::default() });
        for (checkpoint, expected) in
            [(at(1, 2), at(0, 0)), (at(3, 9), at(0, 0)), (at(1, 9), at(1, 3)), (at(2, 5), at(2, 5))]
        {
            view.publish(&mut pending, checkpoint);
            assert_eq!(view.published(Published::version), expected, "checkpoint {checkpoint}");
        }
        pending.push(Delta { version: at(2, 6), ..Delta::default() });
        pending.push(Delta { version: at(3, 7), ..Delta::default() });
        view.publish(&mut pending, at(3, 7));
        assert!(pending.is_empty(), "what is before the checkpoint's epoch goes with it");
    }

    #[test]
    fn a_checkpoint_that_does_not_move_does_not_make_memory_grow() {
        let mut pending = Pending::default();
        (1..=1_000).for_each(|position| pending.push(delta(position)));
        assert_eq!(pending.0.len(), PENDING_MAX);
        assert_eq!(pending.to_write().map(|all| all.version.position), Some(Position(1_000)));
        // The merged ones are published together, not before the last of them is covered.
        assert_eq!(pending.take_until(at(1, 999)).len(), PENDING_MAX - 1);
        assert_eq!(pending.take_until(at(1, 1_000)).len(), 1);
    }
}
