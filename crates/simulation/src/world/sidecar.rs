//! A sidecar: what it follows, what it runs, and its disk. What it makes of what it is told is the production's
//! ([`weft_client::follow`], [`weft_client::take`], [`weft_client::stored`]); what stands here in the place of its task is the order of
//! `subscribe.rs`: one thing at a time, and notices wait meanwhile.

use rand::RngExt;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use weft_client::follow::{Ask, Follower, Heard, Kept, Pulled, Session, Taken};
use weft_client::{Backoff, stored, take};
use weft_eventlog::{EventHash, Point};
use weft_model::{Command, ConfigVersion, Epoch, InstanceId, Position};
use weft_proto::v1 as pb;
use weft_routing::{Hash, Manifest, Snapshot};

use super::wishes::trust_domain;
use super::{CALL_TIMEOUT, Caller, Event, Failure, Reply, Request, World, say};
use crate::plant::Plant;

/// How long a snapshot waits for the disk before it counts all the same.
const DISK_WAIT: Duration = Duration::from_millis(250);
/// How often a write that failed is tried again.
const DISK_RETRY: Duration = Duration::from_secs(10);
/// Shortest time between pulls because a peer runs something newer.
const MISS_INTERVAL: Duration = Duration::from_millis(200);

/// What it is at.
#[derive(Debug)]
enum Doing {
    /// It waits before it tries another controller.
    Waiting {
        until: Instant,
    },
    Registering,
    Subscribing,
    Idle,
    /// It registers again, as a notice told it to.
    Reregistering(Box<pb::Notice>),
    Pulling {
        ask: Ask,
        since: Instant,
    },
    /// The disk is to take a snapshot, until then at the latest.
    Keeping {
        taken: Taken,
        since: Instant,
        until: Instant,
    },
    Acking {
        kept: bool,
    },
}

/// Its disk: one write at a time, the newest next.
#[derive(Debug, Default)]
struct Disk {
    /// What is on it, and of which version that is.
    file: Option<(ConfigVersion, Vec<u8>)>,
    writing: Option<(ConfigVersion, Vec<u8>)>,
    next: Option<(ConfigVersion, Vec<u8>)>,
    writes: u64,
    /// The last write that ended, and whether the disk took it.
    written: Option<(ConfigVersion, bool)>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Sidecar {
    pub(crate) instance: InstanceId,
    pub(crate) up: bool,
    pub(crate) life: u64,
    /// What it registers as.
    registration: Option<Command>,
    registered: bool,
    /// What is in force.
    pub(crate) snapshot: Option<Arc<Snapshot>>,
    disk: Disk,
    /// Until when the disk is slow, and until when it fails.
    pub(super) disk_slow: Duration,
    pub(super) disk_fails: Duration,
    /// The newest that it counted as on its disk.
    durable: Option<ConfigVersion>,
    controller: usize,
    session: Option<Session>,
    stream: Option<u64>,
    inbox: VecDeque<pb::Notice>,
    doing: Doing,
    called: u64,
    wake: u64,
    backoff: Backoff,
    witness: Option<(ConfigVersion, Point)>,
    /// What a peer runs, if that is news.
    missed: bool,
    last_miss: Option<Instant>,
}

impl Sidecar {
    pub(crate) fn new(instance: InstanceId, now: Instant) -> Self {
        Self {
            instance,
            up: false,
            life: 0,
            registration: None,
            registered: false,
            snapshot: None,
            disk: Disk::default(),
            disk_slow: Duration::ZERO,
            disk_fails: Duration::ZERO,
            durable: None,
            controller: 0,
            session: None,
            stream: None,
            inbox: VecDeque::new(),
            doing: Doing::Waiting { until: now },
            called: 0,
            wake: 0,
            backoff: Backoff::new(),
            witness: None,
            missed: false,
            last_miss: None,
        }
    }

    pub(crate) fn version(&self) -> Option<ConfigVersion> {
        self.snapshot.as_ref().map(|snapshot| snapshot.version)
    }

    /// One line of where it is.
    pub(crate) fn describe(&self) -> String {
        let runs = self.version().map(|version| version.to_string()).unwrap_or_default();
        let doing = match self.doing {
            _ if !self.up => "down",
            Doing::Waiting { .. } => "waiting",
            Doing::Registering | Doing::Reregistering(_) => "registering",
            Doing::Subscribing => "subscribing",
            Doing::Idle => "idle",
            Doing::Pulling { .. } => "pulling",
            Doing::Keeping { .. } => "keeping",
            Doing::Acking { .. } => "acknowledging",
        };
        format!("{} runs {runs:?} and is {doing}", self.instance)
    }
}

impl World {
    // Life.

    pub(super) fn start_sidecar(&mut self, sidecar: usize) {
        let again = self.sidecars[sidecar].registration.is_none() || self.chance(0.3);
        let registration = if again { Some(self.register(sidecar)) } else { None };
        let controller = self.rng.random_range(0..self.controllers.len());
        let forgets = self.planted(Plant::ForgetDisk);
        let it = &mut self.sidecars[sidecar];
        it.registration = registration.or(it.registration.take());
        (it.up, it.life, it.controller) = (true, it.life + 1, controller);
        (it.registered, it.session, it.stream) = (false, None, None);
        it.inbox.clear();
        it.backoff = Backoff::new();
        it.missed = false;
        let file = it.disk.file.as_ref().map(|(_, bytes)| stored::decode(bytes, &it.instance));
        it.snapshot = match file.transpose() {
            Ok(snapshot) => snapshot.filter(|_| !forgets).map(Arc::new),
            Err(error) => {
                say!(self, "s{sidecar} refuses its disk: {error}");
                None
            }
        };
        let it = &self.sidecars[sidecar];
        let (runs, durable) = (it.version(), it.durable);
        say!(self, "s{sidecar} starts with {runs:?}");
        if let Some(durable) = durable
            && runs.is_none_or(|runs| runs < durable)
        {
            return self
                .complain(format!("I4, I5: s{sidecar} starts with {runs:?}, and {durable} was on its disk"));
        }
        self.connect(sidecar);
    }

    pub(super) fn end_sidecar(&mut self, sidecar: usize) {
        say!(self, "s{sidecar} ends");
        // A write under way may be whole or not there; never a part of it.
        let took = self.chance(0.5);
        let it = &mut self.sidecars[sidecar];
        let writing = it.disk.writing.take();
        if let Some(writing) = writing.filter(|_| took) {
            it.disk.file = Some(writing);
        }
        (it.disk.next, it.disk.written, it.up) = (None, None, false);
        self.hang_up(sidecar);
    }

    /// Bytes of the file change while nobody looks. A sidecar that finds that begins with nothing (I6).
    pub(super) fn spoil_disk(&mut self, sidecar: usize) {
        let roll: u64 = self.rng.random();
        let it = &mut self.sidecars[sidecar];
        if let Some((_, bytes)) = it.disk.file.as_mut().filter(|_| !it.up) {
            let at = usize::try_from(roll).unwrap_or(0) % bytes.len();
            bytes[at] ^= 0x20;
            it.durable = None;
            say!(self, "s{sidecar}'s disk is spoiled at {at}");
        }
    }

    /// Its end of the stream is gone; the controller finds out, or its messages lead nowhere.
    fn hang_up(&mut self, sidecar: usize) {
        let it = &mut self.sidecars[sidecar];
        it.session = None;
        it.inbox.clear();
        if let Some(stream) = it.stream.take() {
            let controller = it.controller;
            self.drop_stream(controller, stream);
        }
    }

    /// A controller's process ended, and with it this stream.
    pub(super) fn stream_ends(&mut self, to: (usize, u64), controller: usize, stream: u64) {
        let it = &self.sidecars[to.0];
        if it.up && it.life == to.1 && it.controller == controller && it.stream == Some(stream) {
            self.disconnect(to.0, "the stream ended");
        }
    }

    // Calls.

    fn sidecar_calls(&mut self, sidecar: usize, request: Request, doing: Doing) {
        let it = &mut self.sidecars[sidecar];
        it.called += 1;
        it.doing = doing;
        let (from, to) = (Caller::Sidecar { sidecar, life: it.life, call: it.called }, it.controller);
        self.request(to, from, request);
    }

    fn connect(&mut self, sidecar: usize) {
        let it = &self.sidecars[sidecar];
        if it.registered {
            self.subscribe(sidecar);
        } else if let Some(registration) = it.registration.clone() {
            let id = self.command_id();
            let request = Request::Command { id, changes: vec![registration] };
            self.sidecar_calls(sidecar, request, Doing::Registering);
        }
    }

    fn subscribe(&mut self, sidecar: usize) {
        let it = &self.sidecars[sidecar];
        let have = it.snapshot.as_deref().map(take::header);
        let witness = it.witness.map(|(_, point)| point);
        self.sidecar_calls(sidecar, Request::Subscribe { have, witness }, Doing::Subscribing);
    }

    fn disconnect(&mut self, sidecar: usize, why: &str) {
        say!(self, "s{sidecar} is on its own: {why}");
        self.hang_up(sidecar);
        let now = self.instant();
        let wait = self.sidecars[sidecar].backoff.next(&mut self.rng);
        let controllers = self.controllers.len();
        let it = &mut self.sidecars[sidecar];
        it.controller = (it.controller + 1) % controllers;
        it.doing = Doing::Waiting { until: now + wait };
        self.go_idle(sidecar);
    }

    pub(super) fn sidecar_reply(
        &mut self,
        sidecar: usize,
        life: u64,
        call: u64,
        reply: Result<Reply, Failure>,
    ) {
        let now = self.instant();
        let it = &mut self.sidecars[sidecar];
        if !it.up || it.life != life || it.called != call {
            return;
        }
        let doing = std::mem::replace(&mut it.doing, Doing::Idle);
        match (doing, reply) {
            (Doing::Registering, Ok(Reply::Done { .. })) => {
                it.registered = true;
                self.subscribe(sidecar);
            }
            // What it has seen may be why nothing is recorded now.
            (Doing::Registering, Err(Failure::Rewound)) => self.subscribe(sidecar),
            (Doing::Reregistering(notice), Ok(Reply::Done { .. })) => {
                it.registered = true;
                self.reregistered(sidecar, &notice, now);
            }
            (Doing::Reregistering(notice), Err(Failure::Rewound)) => {
                it.registered = false;
                self.reregistered(sidecar, &notice, now);
            }
            (Doing::Subscribing, Ok(Reply::Subscribed { stream })) => {
                it.stream = Some(stream);
                it.session = Some(Session::new(now));
                it.last_miss = None;
                self.go_idle(sidecar);
            }
            (Doing::Pulling { ask, since }, Ok(Reply::Pulled(pulled))) => {
                self.pulled(sidecar, ask, since, &pulled);
            }
            (Doing::Pulling { .. }, Err(Failure::Unavailable)) => {
                let wait = it.backoff.next(&mut self.rng);
                if let Some(session) = &mut it.session {
                    session.ask_again(now + wait);
                }
                self.go_idle(sidecar);
            }
            (Doing::Acking { kept }, Ok(Reply::Acked)) => {
                if let Some(session) = it.session.as_mut().filter(|_| kept) {
                    session.kept();
                }
                self.go_idle(sidecar);
            }
            (doing @ (Doing::Waiting { .. } | Doing::Idle | Doing::Keeping { .. }), _) => it.doing = doing,
            (_, reply) => self.disconnect(sidecar, &format!("{:?}", reply.err())),
        }
    }

    /// Says what it runs, and what it swapped since it last said so; `kept`, that what was not on its disk is there.
    fn acknowledge(
        &mut self,
        sidecar: usize,
        applied: Option<&Snapshot>,
        took: Duration,
        error: String,
        kept: bool,
    ) {
        let now = self.instant();
        let mut none = Session::new(now);
        let session = self.sidecars[sidecar].session.as_mut().unwrap_or(&mut none);
        let ack = session.acknowledge(applied, took, error, now);
        self.sidecar_calls(sidecar, Request::Ack(ack), Doing::Acking { kept });
    }

    fn reregistered(&mut self, sidecar: usize, notice: &pb::Notice, now: Instant) {
        if let Some(session) = &mut self.sidecars[sidecar].session {
            session.registered(now);
        }
        self.hear(sidecar, notice);
    }

    // What comes.

    /// The sidecar as it decides about what it is offered; a planted bug makes it forget that it has something newer.
    fn following<T>(
        &self,
        sidecar: usize,
        offered: Option<&pb::SnapshotHeader>,
        decide: impl FnOnce(Follower<'_>) -> T,
    ) -> T {
        let it = &self.sidecars[sidecar];
        let current = it.snapshot.as_deref();
        let forgetful = current.filter(|current| {
            let offered = offered.and_then(|offered| offered.version.as_ref()).map(take::version);
            self.planted(Plant::OlderVersion) && offered.is_some_and(|offered| offered < current.version)
        });
        let forgetful =
            forgetful.map(|current| Snapshot { version: ConfigVersion::default(), ..current.clone() });
        let trust_domain = trust_domain();
        let current = forgetful.as_ref().or(current);
        decide(Follower { own: &it.instance, trust_domain: &trust_domain, current })
    }

    pub(super) fn noticed(&mut self, to: (usize, u64), stream: u64, notice: pb::Notice) {
        let it = &mut self.sidecars[to.0];
        if it.up && it.life == to.1 && it.stream == Some(stream) {
            it.inbox.push_back(notice);
            self.go_idle(to.0);
        }
    }

    fn take_notice(&mut self, sidecar: usize, notice: pb::Notice) {
        let now = self.instant();
        let it = &mut self.sidecars[sidecar];
        let Some(session) = &mut it.session else { return };
        let head = session.noticed(&notice, now);
        let register = session.must_register(&notice, it.registered, now);
        if let (Some(head), Some(point)) = (head, decode(&notice.witness))
            && it.witness.is_none_or(|(known, _)| known < head)
        {
            it.witness = Some((head, point));
        }
        match it.registration.clone().filter(|_| register) {
            Some(registration) => {
                say!(self, "s{sidecar} registers again");
                let id = self.command_id();
                let request = Request::Command { id, changes: vec![registration] };
                self.sidecar_calls(sidecar, request, Doing::Reregistering(Box::new(notice)));
            }
            None => self.hear(sidecar, &notice),
        }
    }

    fn hear(&mut self, sidecar: usize, notice: &pb::Notice) {
        let now = self.instant();
        let heard = self.following(sidecar, notice.wanted.as_ref(), |follower| {
            self.sidecars[sidecar].session.as_ref().map(|session| session.hear(notice, follower))
        });
        let Some(heard) = heard else { return };
        match heard {
            Heard::Nothing => {}
            Heard::Current => self.sidecars[sidecar].backoff.reset(),
            Heard::Older(offered) => {
                say!(self, "s{sidecar} does not take the older {offered}");
                self.see_beyond();
            }
            Heard::Patched(taken) => {
                self.sidecars[sidecar].backoff.reset();
                return self.keep(sidecar, taken, now);
            }
            Heard::Missed { misfit } => {
                if let Some(misfit) = misfit {
                    say!(self, "s{sidecar} has a patch that does not fit: {misfit}");
                }
                // Who takes what is older does not say what it has.
                let forgets = self.planted(Plant::OlderVersion);
                let ask = if forgets { Ask::Everything } else { Ask::Difference };
                return self.pull(sidecar, ask, now);
            }
        }
        self.go_idle(sidecar);
    }

    fn pull(&mut self, sidecar: usize, ask: Ask, since: Instant) {
        if let Some(session) = &mut self.sidecars[sidecar].session {
            session.pulling();
        }
        let request = ask.request(self.sidecars[sidecar].snapshot.as_deref());
        self.sidecar_calls(sidecar, Request::Pull(request), Doing::Pulling { ask, since });
    }

    fn pulled(&mut self, sidecar: usize, ask: Ask, since: Instant, pulled: &pb::PullResponse) {
        match self.following(sidecar, pulled.header.as_ref(), |follower| ask.answered(pulled, follower)) {
            Pulled::Current => {
                self.sidecars[sidecar].backoff.reset();
                self.go_idle(sidecar);
            }
            Pulled::Taken(taken) => {
                self.sidecars[sidecar].backoff.reset();
                self.keep(sidecar, taken, since);
            }
            Pulled::Unknown => self.pull(sidecar, Ask::Lacking, since),
            Pulled::Misfit(misfit) => {
                say!(self, "s{sidecar} has a difference that does not fit: {misfit}");
                self.pull(sidecar, Ask::Everything, since);
            }
            Pulled::Refused(refusal) => {
                say!(self, "s{sidecar} refuses: {refusal}");
                self.see_beyond();
                let applied = self.sidecars[sidecar].snapshot.clone();
                self.acknowledge(sidecar, applied.as_deref(), Duration::ZERO, refusal.to_string(), false);
            }
        }
    }

    // The swap.

    fn keep(&mut self, sidecar: usize, taken: Taken, since: Instant) {
        let until = self.instant() + DISK_WAIT;
        let it = &mut self.sidecars[sidecar];
        let bytes = stored::encode(&it.instance, taken.snapshot());
        it.disk.next = Some((taken.snapshot().version, bytes));
        self.write_next(sidecar);
        if self.planted(Plant::DiskAfterAck) {
            return self.install(sidecar, taken.kept(Ok(())), since);
        }
        self.sidecars[sidecar].doing = Doing::Keeping { taken, since, until };
        self.go_idle(sidecar);
    }

    fn write_next(&mut self, sidecar: usize) {
        let slow = self.now < self.sidecars[sidecar].disk_slow;
        let most = Duration::from_millis(if slow { 900 } else { 12 });
        let wait = self.between(Duration::from_millis(1), most);
        let it = &mut self.sidecars[sidecar];
        if it.disk.writing.is_some() {
            return;
        }
        let Some(next) = it.disk.next.take() else { return };
        it.disk.writing = Some(next);
        it.disk.writes += 1;
        let (to, write) = ((sidecar, it.life), it.disk.writes);
        self.after(wait, Event::Written { to, write });
    }

    pub(super) fn written(&mut self, to: (usize, u64), write: u64) {
        let fails = self.now < self.sidecars[to.0].disk_fails;
        let it = &mut self.sidecars[to.0];
        if !it.up || it.life != to.1 || it.disk.writes != write {
            return;
        }
        // A write that failed is tried again after a while.
        let Some(writing) = it.disk.writing.take() else { return };
        it.disk.written = Some((writing.0, !fails));
        if fails {
            it.disk.writes += 1;
            let write = it.disk.writes;
            if it.disk.next.is_none() {
                it.disk.writing = Some(writing);
                self.after(DISK_RETRY, Event::Written { to, write });
            }
        } else {
            it.disk.file = Some(writing);
        }
        self.write_next(to.0);
        self.go_idle(to.0);
    }

    /// A snapshot takes effect: here it is looked at.
    fn install(&mut self, sidecar: usize, kept: Kept, since: Instant) {
        let (now, at) = (self.instant(), self.rng.random_range(0.0..=1.0));
        let snapshot = Arc::clone(kept.snapshot());
        let it = &mut self.sidecars[sidecar];
        let before = it.version();
        it.snapshot = Some(Arc::clone(&snapshot));
        let Some(session) = &mut it.session else { return };
        session.applied(kept, now - since, now, at);
        if session.unkept().is_none() {
            it.durable = it.durable.max(Some(snapshot.version));
        }
        let instance = it.instance.clone();
        say!(self, "s{sidecar} runs {}", snapshot.version);
        if before.is_some_and(|before| before >= snapshot.version) {
            return self.complain(format!("I4: s{sidecar} went from {before:?} to {}", snapshot.version));
        }
        if snapshot.inbound.service != instance.service {
            return self.complain(format!("I7: s{sidecar} runs {}'s snapshot", snapshot.inbound.service));
        }
        let listed = Manifest::new(snapshot.manifest.entries().cloned().collect());
        let whole = listed.hash() == snapshot.manifest_hash
            && snapshot
                .manifest
                .entries()
                .all(|(key, entry)| snapshot.shard(key).is_some_and(|bytes| Hash::of(bytes) == entry.hash));
        if !whole {
            return self.complain(format!("I3: s{sidecar} runs a mix at {}", snapshot.version));
        }
        let checked = self.oracle.check_snapshot(&instance, snapshot.version, snapshot.manifest_hash);
        self.check(checked);
        self.go_idle(sidecar);
    }

    /// It said that this version is on its disk.
    pub(super) fn acked_as_durable(&mut self, sidecar: usize, version: ConfigVersion) {
        let it = &self.sidecars[sidecar];
        // One that was spoiled since promises nothing.
        let there = it.disk.file.as_ref().is_some_and(|(on_disk, _)| *on_disk >= version);
        if it.durable.is_some_and(|durable| durable >= version) && !there {
            self.complain(format!("I4: s{sidecar} acknowledged {version}, which is not on its disk"));
        }
    }

    // Its clock.

    /// Goes on with what is next, if it is idle, and sets its clock.
    fn go_idle(&mut self, sidecar: usize) {
        let now = self.instant();
        let it = &mut self.sidecars[sidecar];
        if !it.up {
            return;
        }
        let next = match &it.doing {
            Doing::Waiting { until } if now >= *until => return self.connect(sidecar),
            Doing::Waiting { until } => Some(*until),
            Doing::Keeping { taken, until, .. } => {
                let version = taken.snapshot().version;
                let answer = it.disk.written.filter(|(written, _)| *written >= version);
                let answer = match answer {
                    Some((_, true)) => Some(Ok(())),
                    Some((_, false)) => Some(Err("the disk is full".to_owned())),
                    None if now >= *until => Some(Err("the disk does not answer".to_owned())),
                    None => None,
                };
                let until = *until;
                match answer {
                    Some(answer) => {
                        if let Doing::Keeping { taken, since, .. } =
                            std::mem::replace(&mut it.doing, Doing::Idle)
                        {
                            return self.install(sidecar, taken.kept(answer), since);
                        }
                        None
                    }
                    None => Some(until),
                }
            }
            Doing::Idle => return self.idle(sidecar),
            Doing::Registering
            | Doing::Subscribing
            | Doing::Reregistering(_)
            | Doing::Pulling { .. }
            | Doing::Acking { .. } => None,
        };
        if let Some(next) = next {
            self.set_clock(sidecar, next);
        }
    }

    fn set_clock(&mut self, sidecar: usize, at: Instant) {
        let it = &mut self.sidecars[sidecar];
        it.wake += 1;
        let (to, wake) = ((sidecar, it.life), it.wake);
        self.at(at, Event::Wake { to, wake });
    }

    pub(super) fn woken(&mut self, to: (usize, u64), wake: u64) {
        let it = &self.sidecars[to.0];
        if it.up && it.life == to.1 && it.wake == wake {
            self.go_idle(to.0);
        }
    }

    /// What the task's loop waits for, in its order.
    fn idle(&mut self, sidecar: usize) {
        let now = self.instant();
        let it = &mut self.sidecars[sidecar];
        if let Some(notice) = it.inbox.pop_front() {
            return self.take_notice(sidecar, notice);
        }
        let Some(session) = &mut it.session else { return };
        if now >= session.silent_at() {
            return self.disconnect(sidecar, "no notice for two heartbeats");
        }
        let last_notice = session.last_notice();
        if session.again_at().is_some_and(|again| now >= again) {
            return self.pull(sidecar, Ask::Difference, last_notice);
        }
        if it.missed && it.last_miss.is_none_or(|last| now >= last + MISS_INTERVAL) {
            (it.missed, it.last_miss) = (false, Some(now));
            return self.pull(sidecar, Ask::Difference, now);
        }
        if session.ack_at().is_some_and(|at| now >= at)
            && let Some(ack) = session.take_ack()
        {
            return self.acknowledge(sidecar, Some(&ack.applied), ack.took, ack.error, false);
        }
        let written = it.disk.written.filter(|(_, taken)| *taken).map(|(version, _)| version);
        if let Some(unkept) = session.unkept().cloned()
            && written >= Some(unkept.version)
        {
            it.durable = it.durable.max(Some(unkept.version));
            let took = now.duration_since(last_notice);
            return self.acknowledge(sidecar, Some(&unkept), took, String::new(), true);
        }
        let next = [Some(session.silent_at()), session.again_at(), session.ack_at()];
        let missed = it.last_miss.filter(|_| it.missed).map(|last| last + MISS_INTERVAL);
        let next = next.into_iter().chain([missed]).flatten().min();
        self.set_clock(sidecar, next.unwrap_or(now + CALL_TIMEOUT));
    }

    /// Two sidecars connect, and one tells the other what it runs.
    pub(super) fn peers_talk(&mut self) {
        let wait = self.between(Duration::from_millis(200), Duration::from_secs(3));
        self.after(wait, Event::Peers);
        let count = self.sidecars.len();
        let (from, to) = (self.rng.random_range(0..count), self.rng.random_range(0..count));
        let Some(newest) = self.sidecars[from].version().filter(|_| self.sidecars[from].up) else { return };
        let it = &mut self.sidecars[to];
        let ours = it.version();
        if let Some(session) = it.session.as_ref().filter(|_| it.up)
            && Session::is_news(session.head(), newest, ours)
        {
            it.missed = true;
            say!(self, "s{to} hears of {newest} from s{from}");
            self.go_idle(to);
        }
    }

    /// Takes the shard out of a patch of one, and announces what is then left.
    pub(super) fn drop_a_patch(&self, sidecar: usize, notice: &mut pb::Notice) {
        let Some(current) = &self.sidecars[sidecar].snapshot else { return };
        if let (Some(patch), Some(wanted)) = (&mut notice.patch, &mut notice.wanted)
            && patch.base == current.manifest_hash.prefix()
            && patch.shards.len() == 1
        {
            patch.shards.clear();
            wanted.manifest_hash = current.manifest_hash.0.to_vec().into();
        }
    }
}

/// A witness in the simulation's words, as a controller wrote it.
fn decode(bytes: &[u8]) -> Option<Point> {
    let number = |at: usize| Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let hash = EventHash(bytes.get(16..48)?.try_into().ok()?);
    Some(Point { epoch: Epoch(number(0)?), position: Position(number(8)?), hash })
}
