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
//! its own transaction is done, a follower when it reads so, and if the log has both the checkpoint's event and the last one that
//! it has folded: else the two may be of different histories, which positions do not tell. A batch that failed to be written stays pending. Because
//! the fold is a function of the log (I2), the pending batches of two controllers hold the same content, and it does
//! not matter which of them writes.
//!
//! **A log that lost its end** may have been read further than it goes now, by a leader that has not noticed yet. Its rows would be of
//! events that are not there; so the same condition asks whether the log has the event that they end with.
//!
//! **A commit without an answer** may or may not have taken place. The leader then steps down, takes the lease anew
//! (a new term) and goes on from the checkpoint that it finds.
//!
//! **Beginning to lead** compares all stored rows with the fold and writes the differences in the first transaction, so
//! rows and code converge whatever an older version, a crash or a person left there. Folding starts at a checkpoint of the
//! fold or at the first event (`catch_up.rs`), and while it leads this task writes such checkpoints (`checkpoint.rs`).
//!
//! The decisions are in [`Leadership`], which is pure and is also what the simulation of the control plane runs; here is what they
//! are about: the log, the tables, the clock.

mod catch_up;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use weft_eventlog::{EventHash, Point, Reader, RecordedEvent, Seen, StoreError as LogError, report_rewind};
use weft_model::{Chain, ConfigVersion, Fact, Position};
use weft_routing::Checkpoint;

use crate::checkpoint::Keeper;
use crate::decode::Decoder;
use crate::fault::Fault;
use crate::leadership::{Batch, Beyond, Footing, Leadership, Write};
pub use crate::leadership::{LEASE_TTL, RENEW_EVERY};
use crate::rows::RowChanges;
use crate::store::{Commit, Lease, LeaseSession, Store, StoreError};
use crate::view::View;

/// How often others look whether it is free: when it was given back, or its holder was killed, nobody leads for so long. It is one
/// short query.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often a follower with something to publish looks whether it is covered.
pub const CHECKPOINT_EVERY: Duration = Duration::from_millis(20);
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
    leadership: Leadership,
    /// For the lease; none before it was first needed, and after it failed.
    session: Option<LeaseSession>,
    decoder: Decoder,
    /// Used again for every page.
    facts: Vec<Fact>,
    /// The last event that was folded and its hash.
    folded: Option<(Position, EventHash)>,
    keeper: Keeper,
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
            leadership: Leadership::default(),
            session: None,
            decoder: Decoder::default(),
            facts: Vec::new(),
            folded: None,
            keeper: Keeper::new(),
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
        // When what waits for company is to be written.
        let mut due = None;
        loop {
            let page = {
                // Kept while the others have their turn: a read that takes longer than they leave it would never end.
                let mut next = pin!(tail.next());
                loop {
                    let waits_for_checkpoint = self.leadership.waits_for_checkpoint();
                    tokio::select! {
                        biased;
                        _ = lease.tick() => {
                            self.keep_lease().await?;
                            self.keep_checkpoint();
                        }
                        // Before the log, which may never be quiet.
                        () = until(due) => due = self.write().await,
                        _ = look.tick(), if waits_for_checkpoint => self.look_at_checkpoint().await,
                        page = &mut next => break page,
                    }
                }
            };
            self.take_in(page).await?;
            due = self.write().await;
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
        metrics::counter!("weft_projector_shards_rebuilt_total").increment(delta.work.shards as u64);
        metrics::counter!("weft_projector_manifests_rebuilt_total").increment(delta.work.manifests as u64);
        metrics::counter!("weft_projector_rows_total").increment(delta.rows.len() as u64);
        self.leadership.folded(delta);
        Ok(())
    }

    /// Chain hash of the last event that was folded.
    fn hash(&self) -> Option<EventHash> {
        self.folded.map(|(_, hash)| hash)
    }

    /// Writes and publishes what is pending, if this projector leads. Says until when it waits for company, if it does.
    async fn write(&mut self) -> Option<Instant> {
        match self.leadership.write(Instant::now()) {
            Write::Nothing => {}
            Write::Wait(then) => return Some(then),
            Write::LeaseOver => {
                tracing::warn!("the projector's lease ran out");
                self.show_role();
            }
            Write::Commit(batch) => self.commit(&batch).await,
        }
        None
    }

    async fn commit(&mut self, batch: &Batch) {
        let Batch { term, from, delta } = batch;
        let (term, started) = (*term, Instant::now());
        let commit = self.store.commit(term, *from, (delta.version, delta.hash), &delta.rows).await;
        match &commit {
            Ok(Commit::Done) => {
                metrics::histogram!("weft_projector_commit_seconds").record(started.elapsed().as_secs_f64());
            }
            Ok(Commit::Fenced) => {
                tracing::warn!(term, "another controller leads: nothing was written, nothing is published");
                metrics::counter!("weft_projector_fenced_total").increment(1);
            }
            Err(error) => {
                tracing::warn!(term, error = %Chain(error), "the projection could not be written");
            }
        }
        match self.leadership.written(batch, commit.ok()) {
            Some(checkpoint) => {
                let told = self.publish(checkpoint);
                self.leadership.paid(started.elapsed(), told, Instant::now());
            }
            None => self.show_role(),
        }
    }

    /// Publishes what the checkpoint covers. Says how many subscribers were woken.
    fn publish(&mut self, checkpoint: ConfigVersion) -> usize {
        let told = self.leadership.publish(&self.view, checkpoint);
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        metrics::gauge!("weft_projector_published_position").set(checkpoint.position.0 as f64);
        told
    }

    /// Tells whoever asks whether this projector leads.
    fn show_role(&self) {
        self.view.set_role(self.leadership.role());
        metrics::gauge!("weft_projector_leads").set(if self.leadership.term().is_some() { 1.0 } else { 0.0 });
    }

    /// Has a checkpoint of the fold written if one is due. Called between two reads, when nothing waits to be published.
    fn keep_checkpoint(&mut self) {
        let Some((position, hash)) = self.folded.filter(|_| self.leadership.is_settled()) else {
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
        match self.store.covered(self.folded).await {
            Ok(Some(checkpoint)) => {
                self.publish(checkpoint);
            }
            // Of another history than what was folded: one of the two was lost, as the tail will find, or an operator.
            Ok(None) => {}
            Err(error) => tracing::debug!(error = %Chain(&error), "the checkpoint cannot be read"),
        }
    }

    /// Prolongs the lease, or tries to get it. That the database cannot be asked changes nothing yet.
    async fn keep_lease(&mut self) -> Result<(), Fault> {
        let result = match self.leadership.term() {
            Some(_) if !self.leadership.must_renew(Instant::now()) => Ok(()),
            Some(term) => self.renew(term).await.map_err(LeaseError::Store),
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

    async fn renew(&mut self, term: i64) -> Result<(), StoreError> {
        let (asked, id) = (Instant::now(), self.id);
        let held = self.session().await?.renew(id, term, LEASE_TTL).await?;
        if !held {
            tracing::warn!(term, "another controller took the projector's lease");
        }
        self.leadership.renewed(asked, held);
        self.show_role();
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
            match Leadership::beyond(checkpoint, &head) {
                Beyond::Behind => return Ok(()),
                // Its hash is not known: an earlier version of Weft wrote it.
                Beyond::Lost(fault) => return Err(fault.into()),
                Beyond::Restarted => tracing::error!(
                    projected = %checkpoint, head = %head.position, epoch = %head.epoch,
                    "LOG_REWOUND: the log lost events and began a new epoch; its rows are brought back to it"
                ),
            }
        }
        let (asked, name) = (Instant::now(), self.name.clone());
        let Some(lease) = self.session().await?.acquire(&name, id, LEASE_TTL).await? else {
            return Ok(());
        };
        if !Leadership::may_begin(&lease, checkpoint, folded) {
            // Whoever has folded as far takes it; nobody moves the checkpoint meanwhile.
            tracing::info!(term = lease.term, checkpoint = %lease.checkpoint, %folded, "gave the lease back: not folded as far");
            return Ok(self.session().await?.release(id, lease.term).await?);
        }
        self.begin_to_lead(lease, asked).await
    }

    /// Whether the checkpoint is one of this log, or of a history that was given up. One of a log that lost its end is
    /// reported, and left as it is: it tells what was lost.
    async fn may_follow(&mut self, point: &Point) -> Result<bool, LogError> {
        let seen = self.reader.check_seen(point).await?;
        if seen == Seen::GivenUp {
            tracing::warn!(projected = %point.version(), "rows of a history that was given up are brought back to the log");
        }
        match self.leadership.footing(point, seen) {
            Footing::Good => Ok(true),
            Footing::Wait => Ok(false),
            Footing::Report => {
                tracing::error!(projected = %point.version(), ?seen,
                    "LOG_REWOUND: what was projected is not in the log; nothing is projected until an operator decides");
                report_rewind(&self.reader, point, "projector").await?;
                self.leadership.reported(*point);
                Ok(false)
            }
        }
    }

    /// Brings the rows to the fold, and leads from there.
    async fn begin_to_lead(&mut self, lease: Lease, asked: Instant) -> Result<(), LeaseError> {
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
        let fold = (version, self.hash(), &rows);
        let Some(batch) = self.leadership.begin(lease, asked, (checkpoint, &stored), fold) else {
            tracing::warn!(term = lease.term, %checkpoint, "the rows are not those that came with the lease; trying again");
            return Ok(());
        };
        let changes = batch.delta.rows.len();
        if checkpoint == version && changes > 0 {
            tracing::warn!(rows = changes, %checkpoint, "stored rows were not what the log says, and are corrected");
        }
        self.show_role();
        tracing::info!(term = lease.term, from = %checkpoint, to = %version, rows = changes, "leading the projection");
        self.commit(&batch).await;
        Ok(())
    }

    async fn step_down(&mut self) {
        let Some(term) = self.leadership.term() else { return };
        let id = self.id;
        let released = async { self.session().await?.release(id, term).await };
        match released.await {
            Ok(()) => tracing::info!(term, "gave the projector's lease back"),
            Err(error) => tracing::warn!(error = %Chain(&error), "the projector's lease ends by itself"),
        }
        self.leadership.follow();
        self.show_role();
    }
}

/// Waits until then; for ever if there is no time.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
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
