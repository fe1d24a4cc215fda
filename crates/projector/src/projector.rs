//! The projector's task: tail, fold, and, while it leads, write.
//!
//! **Who writes.** The lease decides who *tries*; the condition on (term, position) inside the writing transaction
//! decides who *succeeds*. Taking the lease raises the term and stores it beside the checkpoint in one transaction, so
//! from then on every transaction of an earlier term changes no row and is rolled back. Suppose a leader is paused
//! (a stopped process, a stalled machine), loses its lease, and wakes:
//! - It has not yet sent its transaction: the condition fails, it writes nothing and steps down.
//! - Its transaction was under way: it holds the checkpoint's row locked, so the new leader's term waits for it, and the
//!   new leader starts from what it wrote. Or the new term came first, and then the condition fails.
//! - It had committed but not published: then what it publishes late is covered by a checkpoint that exists. The new
//!   leader goes on from that checkpoint, so it is a prefix of what the new leader publishes, not a fork of it.
//!
//! **When it changes hands.** Its holder renews it twice a second. It is free when its holder gave it back, when its time is over
//! (a leader that is paused or cut off), or when the database session that it was taken with has ended (a leader that
//! was killed): `store/lease.rs`. All of this is liveness; safety is the term's.
//!
//! **What is published.** Both leader and follower publish a batch only when the checkpoint covers it: the leader when
//! its own transaction is done, a follower when it reads so. A batch that failed to be written stays pending. Because
//! the fold is a function of the log (I2), the pending batches of two controllers hold the same content, and it does
//! not matter which of them writes.
//!
//! **A commit without an answer** may or may not have taken place. The leader then steps down, takes the lease anew
//! (a new term) and goes on from the checkpoint that it finds.
//!
//! **Beginning to lead** compares all stored rows with the fold and writes the differences in the first transaction, so
//! rows and code converge whatever an older version, a crash or a person left there. Folding starts at a checkpoint of the
//! fold or at the first event (`catch_up.rs`), and while it leads this task writes such checkpoints (`checkpoint.rs`).

mod catch_up;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use weft_eventlog::{EventHash, Point, Reader, RecordedEvent, Seen, StoreError as LogError, report_rewind};
use weft_model::{Chain, ConfigVersion, Fact, Position};
use weft_routing::Checkpoint;

use crate::checkpoint::Keeper;
use crate::decode::Decoder;
use crate::fault::Fault;
use crate::published::Delta;
use crate::rows::RowChanges;
use crate::store::{Commit, Lease, LeaseSession, Store, StoreError};
use crate::view::{Pending, Role, View};

/// How long a lease lasts: a leader that is paused or cut off is replaced after at most so long. One that stalls for longer (a
/// checkpoint of the database, a machine that swaps) loses it, which costs a comparison of all rows and nothing else.
pub const LEASE_TTL: Duration = Duration::from_secs(2);
/// The lease is prolonged three times before it would end.
const RENEW_EVERY: Duration = Duration::from_millis(500);
/// How often others look whether it is free: when it was given back, or its holder was killed, nobody leads for so long. It is one
/// short query.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often a follower with something to publish looks whether it is covered.
const CHECKPOINT_EVERY: Duration = Duration::from_millis(20);
/// Pause after the log could not be read.
const READ_RETRY: Duration = Duration::from_millis(200);

/// See the module's documentation.
#[derive(Debug)]
pub struct Projector {
    reader: Reader,
    store: Store,
    view: View,
    name: String,
    id: Uuid,
    pending: Pending,
    leading: Option<Leading>,
    /// For the lease; none before it was first needed, and after it failed.
    session: Option<LeaseSession>,
    decoder: Decoder,
    /// Used again for every page.
    facts: Vec<Fact>,
    /// The last event that was folded and its hash.
    folded: Option<(Position, EventHash)>,
    keeper: Keeper,
    /// The checkpoint of a lost history that was reported.
    reported: Option<Point>,
}

#[derive(Clone, Copy, Debug)]
struct Leading {
    term: i64,
    /// Where this leader left the checkpoint.
    checkpoint: Position,
    /// When the lease was asked for, the last time.
    renewed: Instant,
}

impl Leading {
    /// When the lease ends unless it is renewed.
    fn until(&self) -> Instant {
        self.renewed + LEASE_TTL
    }
}

impl Projector {
    /// A projector of the controller called `name`; `id` tells it from another process of that name.
    #[must_use]
    pub fn new(reader: Reader, store: Store, view: View, name: impl Into<String>, id: Uuid) -> Self {
        Self {
            reader,
            store,
            view,
            name: name.into(),
            id,
            pending: Pending::default(),
            leading: None,
            session: None,
            decoder: Decoder::default(),
            facts: Vec::new(),
            folded: None,
            keeper: Keeper::new(),
            reported: None,
        }
    }

    /// Follows the log until `drain`, then gives the lease back.
    ///
    /// # Errors
    /// A [`Fault`], which the view keeps as well: this process cannot follow the log any further.
    pub async fn run(mut self, drain: CancellationToken) -> Result<(), Arc<Fault>> {
        let result = tokio::select! {
            biased;
            () = drain.cancelled() => Ok(()),
            Err(fault) = self.follow() => Err(fault),
        };
        self.step_down().await;
        result.map_err(|fault| {
            tracing::error!(error = %Chain(&fault), "the projector stopped: nothing new is published by this controller");
            self.view.stop(fault)
        })
    }

    async fn follow(&mut self) -> Result<std::convert::Infallible, Fault> {
        let folded = self.catch_up().await?;
        let mut tail = self.reader.tail(folded);
        let mut lease = interval(LOOK_EVERY);
        lease.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look = interval(CHECKPOINT_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let page = {
                // Kept while the others have their turn: a read that takes longer than they leave it would never end.
                let mut next = pin!(tail.next());
                loop {
                    let waits_for_checkpoint = self.leading.is_none() && !self.pending.is_empty();
                    tokio::select! {
                        biased;
                        _ = lease.tick() => {
                            self.keep_lease().await?;
                            self.keep_checkpoint();
                        }
                        // Before the log, which may never be quiet.
                        _ = look.tick(), if waits_for_checkpoint => self.look_at_checkpoint().await,
                        page = &mut next => break page,
                    }
                }
            };
            self.take_in(page).await?;
            self.write().await;
        }
    }

    /// Folds a page. What is wrong with it, or that it does not follow the last one, is a fault; that it could not be
    /// read is not.
    async fn take_in(&mut self, page: Result<Vec<RecordedEvent>, LogError>) -> Result<(), Fault> {
        let page = match page {
            Ok(page) => page,
            Err(error) if may_pass(&error) => {
                tracing::warn!(error = %Chain(&error), "the log cannot be read, trying again");
                sleep(READ_RETRY).await;
                return Ok(());
            }
            Err(error) => return Err(Fault::History(error)),
        };
        self.decoder.decode_into(page.iter().map(RecordedEvent::view), &mut self.facts)?;
        self.folded = page.last().map(|last| (last.position, last.hash)).or(self.folded);
        let delta = self.view.fold(&self.facts, self.hash())?;
        metrics::counter!("weft_projector_events_folded_total").increment(self.facts.len() as u64);
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        metrics::gauge!("weft_projector_folded_position").set(delta.version.position.0 as f64);
        self.pending.push(delta);
        Ok(())
    }

    /// Chain hash of the last event that was folded.
    fn hash(&self) -> Option<EventHash> {
        self.folded.map(|(_, hash)| hash)
    }

    /// Writes and publishes what is pending, if this projector leads.
    async fn write(&mut self) {
        let Some(leading) = self.leading else { return };
        let Some(delta) = self.pending.merged() else { return };
        if Instant::now() >= leading.until() {
            // Not needed for safety, the term is; but somebody else is likely to be at it.
            tracing::warn!(term = leading.term, "the projector's lease ran out");
            return self.follow_others();
        }
        self.commit(leading, &delta).await;
    }

    async fn commit(&mut self, leading: Leading, delta: &Delta) {
        let Leading { term, checkpoint, .. } = leading;
        let started = Instant::now();
        match self.store.commit(term, checkpoint, (delta.version, delta.hash), &delta.rows).await {
            Ok(Commit::Done) => {
                metrics::histogram!("weft_projector_commit_seconds").record(started.elapsed().as_secs_f64());
                self.leading = Some(Leading { checkpoint: delta.version.position, ..leading });
                self.publish(delta.version);
            }
            Ok(Commit::Fenced) => {
                tracing::warn!(term, "another controller leads: nothing was written, nothing is published");
                metrics::counter!("weft_projector_fenced_total").increment(1);
                self.follow_others();
            }
            Err(error) => {
                tracing::warn!(term, error = %Chain(&error), "the projection could not be written");
                self.follow_others();
            }
        }
    }

    fn publish(&mut self, checkpoint: ConfigVersion) {
        self.view.publish(&mut self.pending, checkpoint);
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        metrics::gauge!("weft_projector_published_position").set(checkpoint.position.0 as f64);
    }

    fn follow_others(&mut self) {
        self.leading = None;
        self.view.set_role(Role::Follower);
        metrics::gauge!("weft_projector_leads").set(0.0);
    }

    /// Has a checkpoint of the fold written if one is due. Called between two reads, when nothing waits to be published.
    fn keep_checkpoint(&mut self) {
        let Some((position, hash)) =
            self.folded.filter(|_| self.leading.is_some() && self.pending.is_empty())
        else {
            return;
        };
        if !self.keeper.is_due(position) {
            return;
        }
        let checkpoint = self.view.read(Checkpoint::of);
        if checkpoint.version().position == position {
            self.keeper.write(self.store.clone(), checkpoint, hash);
        }
    }

    async fn look_at_checkpoint(&mut self) {
        match self.store.checkpoint().await {
            Ok(checkpoint) => self.publish(checkpoint),
            Err(error) => tracing::debug!(error = %Chain(&error), "the checkpoint cannot be read"),
        }
    }

    /// Prolongs the lease, or tries to get it. That the database cannot be asked changes nothing yet.
    async fn keep_lease(&mut self) -> Result<(), Fault> {
        let result = match self.leading {
            Some(leading) if leading.renewed.elapsed() < RENEW_EVERY => Ok(()),
            Some(leading) => self.renew(leading).await.map_err(LeaseError::Store),
            None => self.try_to_lead().await,
        };
        match result {
            Ok(()) => Ok(()),
            Err(LeaseError::Fault(fault)) => Err(fault),
            Err(LeaseError::Store(error)) => {
                tracing::warn!(error = %Chain(&error), "the projector's lease cannot be looked after");
                self.session = None;
                Ok(())
            }
        }
    }

    async fn renew(&mut self, leading: Leading) -> Result<(), StoreError> {
        let renewed = Instant::now();
        let id = self.id;
        if self.session().await?.renew(id, leading.term, LEASE_TTL).await? {
            self.leading = Some(Leading { renewed, ..leading });
        } else {
            tracing::warn!(term = leading.term, "another controller took the projector's lease");
            self.follow_others();
        }
        Ok(())
    }

    async fn session(&mut self) -> Result<&mut LeaseSession, StoreError> {
        let session = match self.session.take() {
            Some(session) => session,
            None => self.store.lease_session().await?,
        };
        Ok(self.session.insert(session))
    }

    async fn try_to_lead(&mut self) -> Result<(), LeaseError> {
        let id = self.id;
        if !self.session().await?.is_free(id).await? {
            return Ok(());
        }
        if let Some(point) = self.store.checkpoint_point().await?
            && !self.may_follow(&point).await?
        {
            return Ok(());
        }
        let checkpoint = self.store.checkpoint().await?;
        let folded = self.view.read(weft_routing::Projection::version);
        if checkpoint.position > folded.position {
            let head = self.reader.head().await.map_err(LeaseError::from)?;
            if head.position >= checkpoint.position {
                return Ok(());
            }
            // Its hash is not known: an earlier version of Weft wrote it.
            if head.epoch <= checkpoint.epoch {
                return Err(Fault::Rewound { projected: checkpoint, head: head.position }.into());
            }
            tracing::error!(
                projected = %checkpoint, head = %head.position, epoch = %head.epoch,
                "LOG_REWOUND: the log lost events and began a new epoch; its rows are brought back to it"
            );
        }
        let (asked, name) = (Instant::now(), self.name.clone());
        let Some(lease) = self.session().await?.acquire(&name, id, LEASE_TTL).await? else {
            return Ok(());
        };
        self.begin_to_lead(lease, asked).await
    }

    /// Whether the checkpoint is one of this log, or of a history that was given up. One of a log that lost its end is
    /// reported, and left as it is: it tells what was lost.
    async fn may_follow(&mut self, point: &Point) -> Result<bool, LogError> {
        match self.reader.check_seen(point).await? {
            Seen::Stands => Ok(true),
            Seen::NotYet => Ok(false),
            Seen::GivenUp => {
                tracing::warn!(projected = %point.version(), "rows of a history that was given up are brought back to the log");
                Ok(true)
            }
            Seen::Lost { found } => {
                if self.reported != Some(*point) {
                    tracing::error!(projected = %point.version(), head = %found,
                        "LOG_REWOUND: what was projected is not in the log; nothing is projected until an operator decides");
                    report_rewind(&self.reader, point, "projector").await?;
                    self.reported = Some(*point);
                }
                Ok(false)
            }
        }
    }

    /// Brings the rows to the fold, and leads from there.
    async fn begin_to_lead(&mut self, lease: Lease, renewed: Instant) -> Result<(), LeaseError> {
        let (checkpoint, stored) = match self.store.rows().await {
            Ok(read) => read,
            Err(StoreError::Row { table, key }) => {
                tracing::warn!(table, key, "a row that no projector writes; all rows are written anew");
                (lease.checkpoint, RowChanges::default())
            }
            Err(error) => return Err(error.into()),
        };
        let (version, rows) =
            self.view.read(|projection| (projection.version(), RowChanges::all(projection)));
        let changes = rows.since(&stored);
        if checkpoint == version && !changes.is_empty() {
            tracing::warn!(rows = changes.len(), %checkpoint, "stored rows were not what the log says, and are corrected");
        }
        let delta = Delta { version, hash: self.hash(), rows: changes, ..Delta::default() };
        self.leading = Some(Leading { term: lease.term, checkpoint: checkpoint.position, renewed });
        self.view.set_role(Role::Leader { term: lease.term });
        metrics::gauge!("weft_projector_leads").set(1.0);
        tracing::info!(term = lease.term, from = %checkpoint, to = %version, rows = delta.rows.len(), "leading the projection");
        if let Some(leading) = self.leading {
            self.commit(leading, &delta).await;
        }
        Ok(())
    }

    async fn step_down(&mut self) {
        let Some(leading) = self.leading else { return };
        let id = self.id;
        let released = async { self.session().await?.release(id, leading.term).await };
        match released.await {
            Ok(()) => tracing::info!(term = leading.term, "gave the projector's lease back"),
            Err(error) => tracing::warn!(error = %Chain(&error), "the projector's lease ends by itself"),
        }
        self.follow_others();
    }
}

/// Whether the log may well be readable soon. What is wrong with its content does not pass.
fn may_pass(error: &LogError) -> bool {
    use LogError::{Connect, Statement, Unanswered, Unfit};
    matches!(error, Connect(_) | Statement { .. } | Unanswered | Unfit(_))
}

/// Why the lease could not be looked after.
enum LeaseError {
    Store(StoreError),
    Fault(Fault),
}

impl From<StoreError> for LeaseError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<Fault> for LeaseError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<LogError> for LeaseError {
    fn from(error: LogError) -> Self {
        Self::Store(StoreError::Log(error))
    }
}

#[cfg(test)]
mod tests;
