//! The projector's task: it folds, and while it leads it writes. In the order of `projector.rs` in `weft-projector`.

use std::sync::Arc;
use std::time::Duration;
use weft_eventlog::{EventHash, RecordedEvent, first_stray};
use weft_model::{ConfigVersion, Position};
use weft_projector::leadership::{Batch, Beyond, Footing, Write};
use weft_projector::projector::CHECKPOINT_EVERY;
use weft_projector::rows::RowChanges;
use weft_projector::{Commit, Leadership};
use weft_routing::{Checkpoint, Projection};

use super::{POLL, Step, Then, Timer};
use crate::database::StoredFold;
use crate::plant::Plant;
use crate::world::{Answer, Ask, Link, World, say};

/// Events between two checkpoints of the fold: few, so that starts go on from them.
const FOLD_EVERY: u64 = 24;

impl World {
    pub(super) fn started(&mut self, controller: usize, fold: Option<StoredFold>, events: &[RecordedEvent]) {
        let decoded = fold.as_ref().map(|fold| Checkpoint::decode(&fold.body));
        let begin = match decoded.transpose() {
            Ok(checkpoint) => checkpoint.map(Checkpoint::into_projection).unwrap_or_default(),
            Err(error) => return self.complain(format!("a checkpoint of the fold cannot be read: {error}")),
        };
        let mut last = fold.map(|fold| (fold.version.position, fold.log_hash));
        self.controllers[controller].fold_kept = last.map(|(position, _)| position).unwrap_or_default();
        let mut bulk = begin.into_bulk();
        for event in events {
            let decoded = self.controllers[controller].decoder.decode(&event.view());
            let folded = decoded
                .map_err(|error| error.to_string())
                .and_then(|fact| bulk.apply([&fact]).map_err(|error| error.to_string()));
            if let Err(error) = folded {
                return self.complain(format!("I2: a start cannot fold the log: {error}"));
            }
            last = Some((event.position, event.hash));
        }
        let it = &mut self.controllers[controller];
        let mut delta = it.view.install(bulk.finish());
        it.folded = Some(last.unwrap_or((Position::ZERO, EventHash::GENESIS)));
        if let Some((position, hash)) = last {
            delta.hash = Some(hash);
            it.leadership.folded(delta);
            say!(self, "c{controller} has folded {position} event(s)");
        }
        self.check_fold(controller);
        self.timer(controller, Duration::ZERO, Timer::Tick);
        self.poll(controller, Duration::ZERO);
        self.look_soon(controller);
        self.announce();
    }

    fn check_fold(&mut self, controller: usize) {
        let it = &self.controllers[controller];
        let Some((position, hash)) = it.folded.filter(|(position, _)| *position > Position::ZERO) else {
            return;
        };
        let checked = it.view.read(|projection| {
            if projection.version().position == position {
                self.oracle.check_fold(projection, hash)
            } else {
                Err(format!("I2: the fold is at {} and should be at {position}", projection.version()))
            }
        });
        self.check(checked);
    }

    pub(super) fn poll(&mut self, controller: usize, wait: Duration) {
        let it = &mut self.controllers[controller];
        if !it.faulted {
            it.poll += 1;
            let wake = it.poll;
            self.timer(controller, wait, Timer::Poll { wake });
        }
    }

    /// Somebody appended: a hint, which may be lost.
    pub(in crate::world) fn hint(&mut self, controller: usize) {
        let it = &self.controllers[controller];
        if it.up && !it.asked && it.folded.is_some() && !self.is_lost(Link::Answer(controller)) {
            let wait = self.delay();
            self.poll(controller, wait);
        }
    }

    pub(super) fn ask_for_page(&mut self, controller: usize) {
        let it = &mut self.controllers[controller];
        if let Some((after, _)) = it.folded.filter(|_| !it.asked && it.page.is_none()) {
            it.asked = true;
            self.call(controller, Ask::Page(after), Then::Page);
        }
    }

    /// Takes in the page that came, unless the task is at something else.
    pub(super) fn take_in(&mut self, controller: usize) {
        let it = &mut self.controllers[controller];
        if it.busy || it.faulted || !it.up {
            return;
        }
        let Some((page, anchor)) = it.page.take() else { return };
        let Some((after, hash)) = it.folded else { return };
        let stray = first_stray(&page, after, hash);
        if anchor != Some(hash) && (page.is_empty() || stray.is_some()) {
            say!(self, "c{controller} finds that the log lost {after}, which it has read");
            let it = &mut self.controllers[controller];
            (it.faulted, it.lost) = (true, it.known());
            return self.fail_waiting(controller);
        }
        if let Some(stray) = stray {
            return self.complain(format!("I1: event {stray} does not follow the one before it"));
        }
        if page.is_empty() {
            it.pause = (it.pause * 2).min(POLL.1);
            let pause = it.pause;
            return self.poll(controller, pause);
        }
        it.pause = POLL.0;
        let facts: Result<Vec<_>, _> = page.iter().map(|event| it.decoder.decode(&event.view())).collect();
        let last = page.last().map(|last| (last.position, last.hash));
        let folded = match facts {
            Ok(facts) => {
                it.view.fold(&facts, last.map(|(_, hash)| hash)).map_err(|error| format!("{error:?}"))
            }
            Err(error) => Err(error.to_string()),
        };
        match folded {
            Ok(delta) => {
                let version = delta.version;
                it.folded = last;
                it.leadership.folded(delta);
                self.check_fold(controller);
                if self.planted(Plant::PublishFolded) {
                    self.publish(controller, version);
                }
            }
            Err(error) => return self.complain(format!("I2: a page cannot be folded: {error}")),
        }
        self.poll(controller, Duration::ZERO);
        self.write(controller);
        self.look_soon(controller);
        self.resume_commands(controller);
    }

    fn then_project(&mut self, controller: usize, ask: Ask, step: Step) {
        self.controllers[controller].busy = true;
        self.call(controller, ask, Then::Project(step));
    }

    pub(super) fn write(&mut self, controller: usize) {
        let now = self.instant();
        match self.controllers[controller].leadership.write(now) {
            Write::Nothing => {}
            Write::Wait(then) => {
                let wait = then.saturating_duration_since(now);
                self.timer(controller, wait, Timer::Write);
            }
            Write::LeaseOver => {
                say!(self, "c{controller}'s lease ran out");
                self.stepped_down(controller);
            }
            Write::Commit(batch) => self.commit(controller, batch),
        }
    }

    fn commit(&mut self, controller: usize, batch: Box<Batch>) {
        let Batch { term, from, ref delta } = *batch;
        let ask = Ask::Commit {
            term,
            from,
            version: delta.version,
            hash: delta.hash,
            rows: Arc::clone(&delta.rows),
        };
        if self.planted(Plant::PublishBeforeCommit) {
            self.publish(controller, delta.version);
        }
        let asked = self.instant();
        self.then_project(controller, ask, Step::Commit(batch, asked));
    }

    /// Publishes what the checkpoint covers. Says how many subscribers were woken.
    fn publish(&mut self, controller: usize, checkpoint: ConfigVersion) -> usize {
        let it = &mut self.controllers[controller];
        let before = it.published();
        let told = it.leadership.publish(&it.view, checkpoint);
        if it.published() != before {
            self.published(controller);
        }
        told
    }

    /// What is published changed: it is checked, and who waits for it goes on.
    fn published(&mut self, controller: usize) {
        let (instances, oracle) = (self.sidecars.iter().map(|it| &it.instance), &self.oracle);
        let checked: Result<ConfigVersion, String> =
            self.controllers[controller].view.published(|published| {
                if let Some(point) = published.point() {
                    oracle.check_published(point.hash)?;
                }
                for instance in instances {
                    if let Some(wanted) = published.wanted(instance) {
                        oracle.check_snapshot(instance, wanted.version, wanted.class.manifest.hash())?;
                    }
                }
                Ok(published.version())
            });
        match checked {
            Ok(version) => say!(self, "c{controller} publishes {version}"),
            Err(wrong) => self.complain(format!("c{controller} publishes: {wrong}")),
        }
        self.resume_pulls(controller);
        let streams: Vec<u64> = self.controllers[controller].streams.keys().copied().collect();
        for stream in streams {
            let it = &self.controllers[controller].streams[&stream];
            let woken = it.feed.has_changed().unwrap_or(true) && !self.planted(Plant::SilentFeed);
            if woken {
                self.pump(controller, stream);
            }
        }
    }

    pub(super) fn stepped_down(&mut self, controller: usize) {
        if self.planted(Plant::DropPending) {
            self.controllers[controller].leadership = Leadership::default();
        }
        self.look_soon(controller);
    }

    fn look_soon(&mut self, controller: usize) {
        let it = &mut self.controllers[controller];
        if it.leadership.waits_for_checkpoint() && !it.looking && !it.faulted {
            it.looking = true;
            self.timer(controller, CHECKPOINT_EVERY, Timer::Look);
        }
    }

    pub(super) fn look(&mut self, controller: usize) {
        let it = &self.controllers[controller];
        if it.busy || it.faulted {
            self.look_soon(controller);
        } else if it.leadership.waits_for_checkpoint() {
            let (position, hash) = it.folded.unwrap_or((Position::ZERO, EventHash::GENESIS));
            self.then_project(controller, Ask::Covered(position, hash), Step::Look);
        }
    }

    pub(super) fn keep_lease(&mut self, controller: usize) {
        let now = self.instant();
        let it = &self.controllers[controller];
        match it.leadership.term() {
            Some(term) if it.leadership.must_renew(now) => {
                self.then_project(controller, Ask::Renew(term), Step::Renew(now));
            }
            Some(_) => self.keep_fold(controller),
            None => self.then_project(controller, Ask::LeaseIsFree, Step::IsFree),
        }
    }

    /// Has a checkpoint of the fold written if one is due.
    fn keep_fold(&mut self, controller: usize) {
        let it = &mut self.controllers[controller];
        let Some((position, log_hash)) = it.folded.filter(|_| it.leadership.is_settled()) else { return };
        if position.0.saturating_sub(it.fold_kept.0) < FOLD_EVERY {
            return;
        }
        it.fold_kept = position;
        let checkpoint = it.view.read(Checkpoint::of);
        let fold = StoredFold { version: checkpoint.version(), log_hash, body: checkpoint.encode() };
        self.call(controller, Ask::PutFold(fold), Then::FoldKept);
    }

    /// The task's next step; without an answer it begins anew at the next tick.
    pub(super) fn project(&mut self, controller: usize, step: Step, answer: Option<Answer>) {
        let now = self.instant();
        match (step, answer) {
            (Step::IsFree, Some(Answer::LeaseIsFree(true))) => {
                self.then_project(controller, Ask::CheckpointPoint, Step::Point);
            }
            (Step::Point, Some(Answer::CheckpointPoint(Some(point)))) => {
                self.then_project(controller, Ask::CheckSeen(point), Step::Seen(point));
            }
            (Step::Point, Some(Answer::CheckpointPoint(None))) => {
                self.then_project(controller, Ask::Checkpoint, Step::Checkpoint);
            }
            (Step::Seen(point), Some(Answer::Seen(seen))) => {
                match self.controllers[controller].leadership.footing(&point, seen) {
                    Footing::Good => self.then_project(controller, Ask::Checkpoint, Step::Checkpoint),
                    Footing::Wait => {}
                    Footing::Report => {
                        let ask = Ask::Report(point, "projector".into());
                        self.then_project(controller, ask, Step::Reported(point));
                    }
                }
            }
            (Step::Reported(point), Some(Answer::Seen(_))) => {
                self.controllers[controller].leadership.reported(point);
            }
            (Step::Checkpoint, Some(Answer::Checkpoint(checkpoint))) => {
                let folded = self.controllers[controller].view.read(Projection::version);
                if checkpoint.position > folded.position {
                    self.then_project(controller, Ask::Head, Step::Head(checkpoint, folded));
                } else {
                    self.then_project(controller, Ask::Acquire, Step::Acquire(now, checkpoint, folded));
                }
            }
            (Step::Head(checkpoint, folded), Some(Answer::Head(head))) => {
                match Leadership::beyond(checkpoint, &head) {
                    Beyond::Behind => {}
                    Beyond::Restarted => {
                        self.then_project(controller, Ask::Acquire, Step::Acquire(now, checkpoint, folded));
                    }
                    Beyond::Lost(_) => self.controllers[controller].faulted = true,
                }
            }
            (Step::Acquire(asked, looked_at, folded), Some(Answer::Acquired(Some(lease)))) => {
                if Leadership::may_begin(&lease, looked_at, folded) {
                    self.then_project(controller, Ask::Rows, Step::Rows(lease, asked));
                } else {
                    self.then_project(controller, Ask::Release(lease.term), Step::Released);
                }
            }
            (Step::Rows(lease, asked), Some(Answer::Rows(checkpoint, stored))) => {
                let it = &mut self.controllers[controller];
                let hash = it.folded.map(|(_, hash)| hash).filter(|hash| *hash != EventHash::GENESIS);
                let (version, rows) =
                    it.view.read(|projection| (projection.version(), RowChanges::all(projection)));
                let fold = (version, hash, &rows);
                if let Some(batch) = it.leadership.begin(lease, asked, (checkpoint, &stored), fold) {
                    say!(self, "c{controller} leads, term {}", lease.term);
                    self.commit(controller, Box::new(batch));
                }
            }
            (Step::Commit(batch, asked), answer) => {
                let commit = match answer {
                    Some(Answer::Committed(commit)) => Some(commit),
                    _ => None,
                };
                if commit != Some(Commit::Done) {
                    say!(self, "c{controller} does not lead: {commit:?}");
                }
                match self.controllers[controller].leadership.written(&batch, commit) {
                    Some(checkpoint) => {
                        let told = self.publish(controller, checkpoint);
                        let leadership = &mut self.controllers[controller].leadership;
                        leadership.paid(now.duration_since(asked), told, now);
                    }
                    None => self.stepped_down(controller),
                }
            }
            (Step::Renew(asked), Some(Answer::Renewed(held))) => {
                self.controllers[controller].leadership.renewed(asked, held);
                if !held {
                    say!(self, "c{controller} lost the lease");
                    self.stepped_down(controller);
                }
            }
            (Step::Look, Some(Answer::Covered(Some(checkpoint)))) => {
                self.publish(controller, checkpoint);
                self.look_soon(controller);
            }
            (Step::Look, _) => self.look_soon(controller),
            // The database did not answer, or another one leads.
            (
                Step::IsFree
                | Step::Point
                | Step::Seen(_)
                | Step::Reported(_)
                | Step::Checkpoint
                | Step::Head(..)
                | Step::Acquire(..)
                | Step::Released
                | Step::Rows(..)
                | Step::Renew(_),
                _,
            ) => {}
        }
    }
}
