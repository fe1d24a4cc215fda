//! Who writes, and what may be published: the decisions of the projector's task. Pure: it is told what the database answered and
//! what time it is, and says what to do next.
//!
//! Why these decisions are safe is argued in [`projector`](crate::projector). Two drive them: the projector's task, against
//! PostgreSQL, and the simulation of the control plane, against a database that loses answers, stalls and is rewound.

use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use weft_eventlog::{EventHash, Head, Point, Seen};
use weft_model::{ConfigVersion, Position};

use crate::fault::Fault;
use crate::published::Delta;
use crate::rows::RowChanges;
use crate::store::{Commit, Lease};
use crate::view::{Pending, Role, View};
use crate::window::Window;

/// How long a lease lasts: a leader that is paused or cut off is replaced after at most so long. One that stalls for longer (a
/// checkpoint of the database, a machine that swaps) loses it, which costs a comparison of all rows and nothing else.
pub const LEASE_TTL: Duration = Duration::from_secs(2);
/// The lease is prolonged three times before it would end.
pub const RENEW_EVERY: Duration = Duration::from_millis(500);

/// See the module's documentation. Begins as a follower, with nothing folded.
#[derive(Debug, Default)]
pub struct Leadership {
    pending: Pending,
    leading: Option<Leading>,
    window: Window,
    /// The checkpoint of a lost history that was reported.
    reported: Option<Point>,
}

#[derive(Clone, Copy, Debug)]
struct Leading {
    term: i64,
    /// Where this leader left the checkpoint.
    checkpoint: Position,
    /// When the lease was asked for, the last time.
    asked: Instant,
}

/// What to do with what is folded and not yet written.
#[derive(Debug)]
pub enum Write {
    /// Nothing: there is none, or another one writes it.
    Nothing,
    /// The lease ran out, and this projector follows again. Not needed for safety, the term is; but somebody else is likely
    /// to be at it.
    LeaseOver,
    /// Nothing before then: what there is waits for company, unless something urgent comes.
    Wait(Instant),
    /// To write this, and to tell [`Leadership::written`] what became of it.
    Commit(Box<Batch>),
}

/// What one transaction writes, on the condition that term and checkpoint are these.
#[derive(Debug)]
pub struct Batch {
    /// The writer's term.
    pub term: i64,
    /// Where the writer thinks that the checkpoint is.
    pub from: Position,
    /// Where it is afterwards, and the rows that change.
    pub delta: Delta,
}

/// Whether rows of a checkpoint may be gone on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Footing {
    /// Yes.
    Good,
    /// Not now.
    Wait,
    /// No: the log lost the checkpoint's event, and nobody was told yet. Tell [`Leadership::reported`] when it is recorded.
    Report,
}

/// What it means that a checkpoint is beyond this projector's fold, where the hash of its event is not known.
#[derive(Debug)]
pub enum Beyond {
    /// The fold is behind the log.
    Behind,
    /// The log lost its end and began a new epoch: its rows are brought back to it.
    Restarted,
    /// The log lost its end.
    Lost(Fault),
}

impl Leadership {
    /// Events were folded, and changed this.
    pub fn folded(&mut self, delta: Delta) {
        self.pending.push(delta);
    }

    /// The term in which this projector writes; none while it follows.
    #[must_use]
    pub fn term(&self) -> Option<i64> {
        self.leading.map(|leading| leading.term)
    }

    /// Whether the projector leads or follows.
    #[must_use]
    pub fn role(&self) -> Role {
        self.term().map_or(Role::Follower, |term| Role::Leader { term })
    }

    /// Whether something waits until another projector's checkpoint covers it.
    #[must_use]
    pub fn waits_for_checkpoint(&self) -> bool {
        self.leading.is_none() && !self.pending.is_empty()
    }

    /// Whether this projector leads, and everything that was folded is written and published.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.leading.is_some() && self.pending.is_empty()
    }

    /// What to do with what is pending.
    pub fn write(&mut self, now: Instant) -> Write {
        let Some(Leading { term, checkpoint, asked }) = self.leading else { return Write::Nothing };
        if self.pending.is_empty() {
            return Write::Nothing;
        }
        if now >= asked + LEASE_TTL {
            self.follow();
            return Write::LeaseOver;
        }
        if let Some(opens) = self.window.opens(now).filter(|_| !self.pending.is_urgent()) {
            return Write::Wait(opens);
        }
        let Some(delta) = self.pending.to_write() else { return Write::Nothing };
        Write::Commit(Box::new(Batch { term, from: checkpoint, delta }))
    }

    /// What became of a batch; none if nobody knows. Says what may be published now.
    pub fn written(&mut self, batch: &Batch, commit: Option<Commit>) -> Option<ConfigVersion> {
        let leading = self.leading.filter(|leading| leading.term == batch.term);
        match (commit, leading) {
            (Some(Commit::Done), leading) => {
                let checkpoint = batch.delta.version;
                if let Some(leading) = leading {
                    self.leading = Some(Leading { checkpoint: checkpoint.position, ..leading });
                }
                Some(checkpoint)
            }
            (Some(Commit::Fenced) | None, _) => {
                self.follow();
                None
            }
        }
    }

    /// Publishes what a checkpoint covers that was written, here or elsewhere. Says how many subscribers were woken.
    pub fn publish(&mut self, view: &View, checkpoint: ConfigVersion) -> usize {
        view.publish(&mut self.pending, checkpoint)
    }

    /// What was just published took so long to write and told so many: what is not urgent waits for that.
    pub fn paid(&mut self, took: Duration, told: usize, now: Instant) {
        self.window.published(took, told, now);
    }

    /// Whether the lease is to be prolonged.
    #[must_use]
    pub fn must_renew(&self, now: Instant) -> bool {
        self.leading.is_some_and(|leading| now.duration_since(leading.asked) >= RENEW_EVERY)
    }

    /// The lease was prolonged, which was asked for then, or is another one's.
    pub fn renewed(&mut self, asked: Instant, held: bool) {
        if held {
            self.leading = self.leading.map(|leading| Leading { asked, ..leading });
        } else {
            self.follow();
        }
    }

    /// Writes no more.
    pub fn follow(&mut self) {
        self.leading = None;
    }

    /// Whether rows of the checkpoint `point` may be gone on from, given what became of its event. Those of a log that lost
    /// its end are left as they are: they tell what was lost.
    #[must_use]
    pub fn footing(&self, point: &Point, seen: Seen) -> Footing {
        match seen {
            Seen::Stands | Seen::GivenUp => Footing::Good,
            Seen::NotYet => Footing::Wait,
            Seen::Lost { .. } if self.reported == Some(*point) => Footing::Wait,
            Seen::Lost { .. } => Footing::Report,
        }
    }

    /// The loss of a checkpoint's event is recorded.
    pub fn reported(&mut self, point: Point) {
        self.reported = Some(point);
    }

    /// What it means that `checkpoint` is beyond the fold while the log ends at `head`.
    #[must_use]
    pub fn beyond(checkpoint: ConfigVersion, head: &Head) -> Beyond {
        if head.position >= checkpoint.position {
            Beyond::Behind
        } else if head.epoch <= checkpoint.epoch {
            Beyond::Lost(Fault::Rewound { projected: checkpoint, head: head.position })
        } else {
            Beyond::Restarted
        }
    }

    /// Whether to lead from the checkpoint that came with the lease. It may have moved on after it was looked at: the former leader
    /// wrote until its term ended. Then it counts only if the fold covers it; else the rows would be taken back.
    #[must_use]
    pub fn may_begin(lease: &Lease, looked_at: ConfigVersion, folded: ConfigVersion) -> bool {
        lease.checkpoint == looked_at || lease.checkpoint <= folded
    }

    /// Leads from here on, under a lease that was asked for at `asked`. The first batch brings the `stored` rows, which belong to
    /// `checkpoint`, to the fold's. None if they are not those that came with the lease: then a backup took the tables' place meanwhile,
    /// in which the term may be somebody else's.
    pub fn begin(
        &mut self,
        lease: Lease,
        asked: Instant,
        (checkpoint, stored): (ConfigVersion, &RowChanges),
        (version, hash, rows): (ConfigVersion, Option<EventHash>, &RowChanges),
    ) -> Option<Batch> {
        if checkpoint != lease.checkpoint {
            return None;
        }
        self.leading = Some(Leading { term: lease.term, checkpoint: checkpoint.position, asked });
        let delta = Delta { version, hash, rows: Arc::new(rows.since(stored)), ..Delta::default() };
        Some(Batch { term: lease.term, from: checkpoint.position, delta })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::window::WINDOW_MAX;
    use weft_model::Epoch;

    fn at(position: u64) -> ConfigVersion {
        ConfigVersion::new(Epoch(1), Position(position))
    }

    fn delta(position: u64) -> Delta {
        Delta { version: at(position), ..Delta::default() }
    }

    fn leading(term: i64, from: u64, now: Instant) -> Leadership {
        let mut leadership = Leadership::default();
        let rows = RowChanges::default();
        let lease = Lease { term, checkpoint: at(from) };
        assert!(leadership.begin(lease, now, (at(from + 1), &rows), (at(from), None, &rows)).is_none());
        let batch = leadership.begin(lease, now, (at(from), &rows), (at(from), None, &rows)).unwrap();
        assert_eq!((batch.term, batch.from), (term, Position(from)));
        leadership
    }

    fn batch(leadership: &mut Leadership, now: Instant) -> Batch {
        match leadership.write(now) {
            Write::Commit(batch) => *batch,
            Write::Nothing | Write::LeaseOver | Write::Wait(_) => panic!("nothing is to be written"),
        }
    }

    #[test]
    fn a_leader_writes_on_from_where_it_left_the_checkpoint() {
        let (now, view) = (Instant::now(), View::new());
        let mut leader = leading(3, 7, now);
        assert!(matches!(leader.write(now), Write::Nothing) && leader.is_settled());
        leader.folded(delta(8));
        let first = batch(&mut leader, now);
        assert_eq!((first.term, first.from, first.delta.version), (3, Position(7), at(8)));
        let covered = leader.written(&first, Some(Commit::Done)).unwrap();
        leader.publish(&view, covered);
        assert_eq!(view.published(crate::Published::version), at(8));
        leader.folded(delta(9));
        assert_eq!(batch(&mut leader, now).from, Position(8));
    }

    #[test]
    fn what_is_not_urgent_waits_for_company_and_what_is_takes_it_along() {
        let now = Instant::now();
        let mut leader = leading(3, 7, now);
        leader.folded(delta(8));
        let first = batch(&mut leader, now);
        let covered = leader.written(&first, Some(Commit::Done)).unwrap();
        assert_eq!(leader.publish(&View::new(), covered), 0);
        let took = Duration::from_millis(30);
        leader.paid(took, 0, now);
        leader.folded(delta(9));
        assert!(matches!(leader.write(now), Write::Wait(then) if then == now + took));
        leader.folded(Delta { urgent: true, ..delta(10) });
        leader.folded(delta(11));
        let all = batch(&mut leader, now);
        assert_eq!((all.from, all.delta.version), (Position(8), at(11)));
        // What could not be written waits no longer than it would have, and nobody waits long.
        let mut leader = leading(3, 7, now);
        leader.paid(Duration::from_secs(9), 9, now);
        leader.folded(delta(8));
        assert!(matches!(leader.write(now), Write::Wait(then) if then == now + WINDOW_MAX));
        assert_eq!(batch(&mut leader, now + WINDOW_MAX).delta.version, at(8));
    }

    #[test]
    fn who_is_fenced_or_does_not_know_follows_and_keeps_what_is_pending() {
        let now = Instant::now();
        for commit in [Some(Commit::Fenced), None] {
            let mut leader = leading(3, 7, now);
            leader.folded(delta(8));
            let lost = batch(&mut leader, now);
            assert_eq!(leader.written(&lost, commit), None);
            assert!(leader.term().is_none() && leader.waits_for_checkpoint());
        }
    }

    #[test]
    fn a_lease_that_ran_out_is_not_written_under() {
        let now = Instant::now();
        let mut leader = leading(3, 7, now);
        leader.folded(delta(8));
        assert!(matches!(leader.write(now + LEASE_TTL), Write::LeaseOver));
        assert_eq!(leader.role(), Role::Follower);
        let mut leader = leading(3, 7, now);
        let later = now + RENEW_EVERY;
        assert!(leader.must_renew(later) && !leader.must_renew(now));
        leader.renewed(later, true);
        leader.folded(delta(8));
        assert!(matches!(leader.write(now + LEASE_TTL), Write::Commit(_)));
        leader.renewed(later, false);
        assert_eq!(leader.term(), None);
    }

    #[test]
    fn nobody_leads_from_a_checkpoint_that_it_neither_looked_at_nor_folded() {
        let begins = |checkpoint, looked_at, folded| {
            Leadership::may_begin(&Lease { term: 2, checkpoint: at(checkpoint) }, at(looked_at), at(folded))
        };
        assert!(begins(7, 7, 9) && begins(8, 7, 9) && begins(9, 7, 9));
        assert!(!begins(10, 7, 9));
        // Of a log that began a new epoch after it lost its end: looked at, and found to be beyond it.
        assert!(begins(10, 10, 9));
    }

    #[test]
    fn a_lost_checkpoint_is_reported_once_and_left_alone() {
        let mut follower = Leadership::default();
        let point = Point { epoch: Epoch(1), position: Position(7), hash: EventHash([7; 32]) };
        let lost = Seen::Lost { found: Position(5) };
        assert_eq!(follower.footing(&point, lost), Footing::Report);
        follower.reported(point);
        assert_eq!(follower.footing(&point, lost), Footing::Wait);
        assert_eq!(follower.footing(&Point { position: Position(8), ..point }, lost), Footing::Report);
        assert_eq!(follower.footing(&point, Seen::NotYet), Footing::Wait);
        for seen in [Seen::Stands, Seen::GivenUp] {
            assert_eq!(follower.footing(&point, seen), Footing::Good);
        }
    }
}
