//! Everything in one place: the clock, what is under way, and whom it reaches.
//!
//! One event at a time: a message that arrives, a timer that ends, a fault. Events at the same moment come in the order in which they
//! were sent. All chance comes from one generator, which is the seed's, and is drawn in the order of events. So a seed is one run.

mod commands;
mod controller;
mod faults;
mod sidecar;
mod store;
mod wishes;

pub(crate) use commands::Client;
pub(crate) use controller::Controller;
pub(crate) use faults::{Fault, Plan};
pub(crate) use sidecar::Sidecar;
pub(crate) use store::{Answer, Ask};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;
use weft_eventlog::Point;
use weft_model::{Command, Position};
use weft_proto::v1 as pb;

use crate::database::{Database, Process, Tables, clock};
use crate::oracle::Oracle;
use crate::plant::Plant;
use crate::trace::Trace;

/// A line of the trace.
macro_rules! say {
    ($world:expr, $($what:tt)*) => { $world.trace.say($world.now, format_args!($($what)*)) };
}
pub(crate) use say;

/// How long a call waits for an answer that was lost, on either side.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// What happens.
#[derive(Debug)]
pub(crate) enum Event {
    /// A question reaches the database.
    Ask { of: Process, call: u64, ask: Box<Ask> },
    /// Its answer reaches the controller; none if it was lost, or the database ended before.
    Answer { to: Process, call: u64, answer: Option<Box<Answer>> },
    /// A controller's timer ends.
    Controller { to: Process, timer: controller::Timer },
    /// A request reaches a controller.
    Request { to: usize, from: Caller, request: Box<Request> },
    /// Its answer reaches the caller.
    Reply { to: Caller, reply: Box<Result<Reply, Failure>> },
    /// A notice reaches a sidecar.
    Notice { to: (usize, u64), stream: u64, notice: Box<pb::Notice> },
    /// A sidecar looks at its clock.
    Wake { to: (usize, u64), wake: u64 },
    /// A sidecar's disk has written.
    Written { to: (usize, u64), write: u64 },
    /// Two sidecars talk, and one tells the other what it runs.
    Peers,
    /// Somebody wants something of the mesh.
    Command,
    /// Somebody's command is sent, again perhaps.
    Send { client: usize },
    /// An operator looks whether anything is to be decided.
    Operator,
    /// Something breaks, or is mended.
    Fault(Fault),
}

/// Who waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Caller {
    /// A sidecar, one of its lives, one of its calls.
    Sidecar { sidecar: usize, life: u64, call: u64 },
    /// Somebody who changes the mesh.
    Client { client: usize, attempt: u32 },
}

/// What is asked of a controller.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    /// To be told.
    Subscribe { have: Option<pb::SnapshotHeader>, witness: Option<Point> },
    /// What is missed.
    Pull(pb::PullRequest),
    /// That it runs.
    Ack(pb::AckRequest),
    /// To change the mesh.
    Command { id: Uuid, changes: Vec<Command> },
}

/// What a controller answers.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    /// Notices come on this stream.
    Subscribed { stream: u64 },
    /// What is missed.
    Pulled(Box<pb::PullResponse>),
    /// It was heard.
    Acked,
    /// The command is durable; up to this event, if it changed anything.
    Done { last: Option<Position>, repeated: bool },
}

/// Why a controller does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Nobody answered. Whether it was done is unknown.
    Lost,
    /// Not now.
    Unavailable,
    /// The log was rewound.
    Rewound,
    /// Never.
    Refused(String),
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: Duration,
    base: Instant,
    queue: BTreeMap<(Duration, u64), Event>,
    sent: u64,
    pub(crate) rng: SmallRng,
    pub(crate) trace: Trace,
    pub(crate) plan: Plan,
    pub(crate) plant: Option<Plant>,
    pub(crate) database: Database,
    /// Until when the database does not answer, and until when it is down.
    stalled: Duration,
    down: Duration,
    pub(crate) controllers: Vec<Controller>,
    pub(crate) sidecars: Vec<Sidecar>,
    pub(crate) clients: Vec<Client>,
    pub(crate) oracle: Oracle,
    /// Links that are cut: between a controller and the database, a sidecar and a controller; towards the second, or back.
    cuts: BTreeSet<Link>,
    backups: Vec<Tables>,
    /// The newest finding that an operator has looked at.
    looked_at: Option<u64>,
    /// When a sidecar was seen to have more than the log, at first and at last, since an operator did something about it.
    beyond: Option<(Duration, Duration)>,
    /// What is wrong.
    pub(crate) wrong: Option<String>,
}

/// One direction between two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Link {
    /// From a controller to the database, and back.
    Ask(usize),
    Answer(usize),
    /// From a sidecar to a controller, and back.
    Request(usize, usize),
    Reply(usize, usize),
}

impl World {
    pub(crate) fn new(seed: u64, plant: Option<Plant>) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let plan = Plan::draw(&mut rng);
        let mut world = Self {
            now: Duration::ZERO,
            base: Instant::now(),
            queue: BTreeMap::new(),
            sent: 0,
            rng,
            trace: Trace::default(),
            plan,
            plant,
            database: Database::new(plant),
            stalled: Duration::ZERO,
            down: Duration::ZERO,
            controllers: Vec::new(),
            sidecars: Vec::new(),
            clients: Vec::new(),
            oracle: Oracle::new(),
            cuts: BTreeSet::new(),
            backups: Vec::new(),
            looked_at: None,
            beyond: None,
            wrong: None,
        };
        world.begin();
        world
    }

    /// Time as the decisions know it.
    pub(crate) fn instant(&self) -> Instant {
        self.base + self.now
    }

    pub(crate) fn planted(&self, plant: Plant) -> bool {
        self.plant == Some(plant)
    }

    pub(crate) fn complain(&mut self, what: impl Into<String>) {
        self.wrong.get_or_insert(what.into());
    }

    /// Complains, if something is wrong.
    pub(crate) fn check(&mut self, checked: Result<(), String>) {
        if let Err(what) = checked {
            self.complain(what);
        }
    }

    pub(crate) fn after(&mut self, wait: Duration, event: Event) {
        self.sent += 1;
        self.queue.insert((self.now + wait, self.sent), event);
    }

    /// At that moment of the decisions' time, or now if it is over.
    fn at(&mut self, at: Instant, event: Event) {
        self.after(at.saturating_duration_since(self.instant()), event);
    }

    pub(crate) fn chance(&mut self, of: f64) -> bool {
        self.rng.random_bool(of)
    }

    pub(crate) fn between(&mut self, least: Duration, most: Duration) -> Duration {
        self.rng.random_range(least..=most)
    }

    /// How long a message is under way.
    fn delay(&mut self) -> Duration {
        let (least, most) = (Duration::from_micros(100), Duration::from_millis(5));
        let slow = self.plan.slow;
        if self.chance(slow) {
            self.between(least, Duration::from_millis(800))
        } else {
            self.between(least, most)
        }
    }

    /// Whether a message on this link is lost.
    fn is_lost(&mut self, link: Link) -> bool {
        let loss = self.plan.loss;
        self.cuts.contains(&link) || self.chance(loss)
    }

    /// A new command id, made now.
    pub(crate) fn command_id(&mut self) -> Uuid {
        let millis = u64::try_from(clock(self.now).millis()).unwrap_or_default();
        uuid::Builder::from_unix_timestamp_millis(millis, &self.rng.random()).into_uuid()
    }

    /// One event. False if nothing is left to happen before `end`.
    pub(crate) fn step(&mut self, end: Duration) -> bool {
        let next = self.queue.first_entry().filter(|next| next.key().0 <= end);
        let Some(next) = next else {
            self.now = end;
            return false;
        };
        let ((at, _), event) = next.remove_entry();
        self.now = at;
        match event {
            Event::Ask { of, call, ask } => self.asked(of, call, *ask),
            Event::Answer { to, call, answer } => {
                if let Some(wait) = self.paused(to.0) {
                    self.after(wait, Event::Answer { to, call, answer });
                } else if self.controllers[to.0].lives(to) {
                    self.answered(to.0, call, answer.map(|answer| *answer));
                }
            }
            Event::Controller { to, timer } => {
                if let Some(wait) = self.paused(to.0) {
                    self.after(wait, Event::Controller { to, timer });
                } else if self.controllers[to.0].lives(to) {
                    self.controller_timer(to.0, timer);
                }
            }
            Event::Request { to, from, request } => {
                if let Some(wait) = self.paused(to) {
                    self.after(wait, Event::Request { to, from, request });
                } else {
                    self.requested(to, from, *request);
                }
            }
            Event::Reply { to, reply } => match to {
                Caller::Sidecar { sidecar, life, call } => self.sidecar_reply(sidecar, life, call, *reply),
                Caller::Client { client, attempt } => self.client_reply(client, attempt, *reply),
            },
            Event::Notice { to, stream, notice } => self.noticed(to, stream, *notice),
            Event::Wake { to, wake } => self.woken(to, wake),
            Event::Written { to, write } => self.written(to, write),
            Event::Peers => self.peers_talk(),
            Event::Command => self.command(),
            Event::Send { client } => self.send_command(client),
            Event::Operator => self.operate(),
            Event::Fault(fault) => self.fault(fault),
        }
        if let Some(wrong) = self.database.wrong.take() {
            self.complain(wrong);
        }
        true
    }

    fn paused(&self, controller: usize) -> Option<Duration> {
        let until = self.controllers[controller].paused;
        until.checked_sub(self.now).filter(|wait| !wait.is_zero())
    }

    /// An answer of a controller goes out.
    fn reply(&mut self, from: usize, to: Caller, reply: Result<Reply, Failure>) {
        let lost = match to {
            Caller::Sidecar { sidecar, .. } => self.is_lost(Link::Reply(sidecar, from)),
            Caller::Client { .. } => self.is_lost(Link::Ask(usize::MAX)),
        };
        let reply = if lost { Err(Failure::Lost) } else { reply };
        let wait = if lost { CALL_TIMEOUT } else { self.delay() };
        self.after(wait, Event::Reply { to, reply: Box::new(reply) });
    }

    /// A request to a controller goes out; one that is not there refuses the connection.
    fn request(&mut self, to: usize, from: Caller, request: Request) {
        let lost = match from {
            Caller::Sidecar { sidecar, .. } => self.is_lost(Link::Request(sidecar, to)),
            Caller::Client { .. } => self.is_lost(Link::Ask(usize::MAX)),
        };
        if lost || !self.controllers[to].up {
            let wait = if lost { CALL_TIMEOUT } else { self.delay() };
            self.after(wait, Event::Reply { to: from, reply: Box::new(Err(Failure::Lost)) });
        } else {
            let wait = self.delay();
            self.after(wait, Event::Request { to, from, request: Box::new(request) });
        }
    }
}
