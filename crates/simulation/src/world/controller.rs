//! A controller: its projector's task and what it tells sidecars. The decisions are the production's: the fold, [`Leadership`],
//! [`Telling`], the plan of a pull. What stands here in the place of tasks is which answer leads to which of them, in the order of
//! `projector.rs` and `discovery.rs` of production: [`projector`] and [`subscribers`].

mod projector;
mod subscribers;

use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use weft_api::pull;
use weft_api::telling::Telling;
use weft_eventlog::{EventHash, Point, RecordedEvent, Seen};
use weft_model::{ConfigVersion, Position};
use weft_projector::leadership::Batch;
use weft_projector::projector::LOOK_EVERY;
use weft_projector::{Decoder, Leadership, Lease, View};
use weft_proto::v1 as pb;
use weft_routing::{Hash, Projection};

use super::commands::{Appender, Running};
use super::{Answer, Ask, Caller, Event, Failure, World, say};
use crate::database::Process;

/// How often the log is asked for news without a hint, at the least and at the most.
const POLL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// How often the log's history is looked at.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// How soon an ended controller is started again.
const RESTART: Duration = Duration::from_millis(500);

/// What a controller waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timer {
    /// To look after the lease.
    Tick,
    /// To write what waited for company.
    Write,
    /// To look at the checkpoint, as a follower.
    Look,
    /// To ask for news.
    Poll { wake: u64 },
    /// To look at the log's history.
    Watch,
    /// A subscriber's next heartbeat.
    Pump { stream: u64, wake: u64 },
    /// A pull has waited for long enough.
    Pull,
    /// A command has waited for long enough.
    Command { caller: Caller, stage: u64 },
    /// The appender tries again.
    Append,
}

/// What an answer of the database is for.
#[derive(Debug)]
pub(crate) enum Then {
    KeptSeen(Point),
    KeptReported,
    Start,
    Page,
    Project(Step),
    FoldKept,
    Append,
    Outcome(Caller),
    HeadFor(Caller),
    Witness(Box<Asking>, Point),
    WitnessReported(Box<Asking>),
    HeadOf(Box<Asking>),
    ReportedLost,
    Watch { reported: Option<Seen> },
}

/// Where the projector's task is.
#[derive(Debug)]
pub(crate) enum Step {
    IsFree,
    Point,
    Seen(Point),
    Reported(Point),
    Checkpoint,
    /// The checkpoint, and what was folded.
    Head(ConfigVersion, ConfigVersion),
    /// Asked for then; the checkpoint that was looked at, and what was folded.
    Acquire(Instant, ConfigVersion, ConfigVersion),
    Released,
    Rows(Lease, Instant),
    Commit(Box<Batch>, Instant),
    Renew(Instant),
    Look,
}

/// A sidecar's request on its way through the checks.
#[derive(Debug)]
pub(crate) struct Asking {
    from: Caller,
    sidecar: usize,
    have: Option<(ConfigVersion, Hash)>,
    /// What it holds, if it was asked.
    held: Vec<u32>,
    subscribe: bool,
}

/// A pull that waits for a registration to be published.
#[derive(Debug)]
struct Waiting {
    asking: Asking,
    version: ConfigVersion,
    until: Duration,
}

/// A subscriber's stream.
#[derive(Debug)]
struct Stream {
    to: (usize, u64),
    telling: Telling,
    /// What a subscription that forgets goes back to.
    have: Option<(ConfigVersion, Hash)>,
    feed: watch::Receiver<ConfigVersion>,
    wake: u64,
    /// When the last notice arrives: the next is not before it.
    arrives: Duration,
    broken: bool,
    /// The last notice, and when it was made.
    last: Option<(Duration, pb::Notice)>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Controller {
    pub(crate) up: bool,
    pub(crate) life: u64,
    /// Stopped until then.
    pub(crate) paused: Duration,
    pub(super) view: View,
    leadership: Leadership,
    decoder: Decoder,
    /// The last event that was folded; none before the start is over.
    pub(super) folded: Option<(Position, EventHash)>,
    /// The fold ended for good.
    pub(super) faulted: bool,
    /// The projector waits for an answer.
    busy: bool,
    page: Option<(Vec<RecordedEvent>, Option<EventHash>)>,
    /// A page was asked for.
    asked: bool,
    poll: u64,
    pause: Duration,
    looking: bool,
    calls: BTreeMap<u64, Then>,
    called: u64,
    waiting: Vec<Waiting>,
    streams: BTreeMap<u64, Stream>,
    opened: u64,
    pub(super) running: BTreeMap<Caller, Running>,
    pub(super) appender: Appender,
    /// An event that this process has seen, and that is gone.
    pub(super) lost: Option<Point>,
    pub(super) standing: bool,
    verified: Option<Point>,
    fold_kept: Position,
    /// In the state directory: the newest published event.
    kept: Option<Point>,
}

impl Controller {
    pub(crate) fn new(kept: Option<Point>, life: u64) -> Self {
        Self {
            up: true,
            life,
            paused: Duration::ZERO,
            view: View::new(),
            leadership: Leadership::default(),
            decoder: Decoder::default(),
            folded: None,
            faulted: false,
            busy: false,
            page: None,
            asked: false,
            poll: 0,
            pause: POLL.0,
            looking: false,
            calls: BTreeMap::new(),
            called: 0,
            waiting: Vec::new(),
            streams: BTreeMap::new(),
            opened: 0,
            running: BTreeMap::new(),
            appender: Appender::default(),
            lost: None,
            standing: false,
            verified: None,
            fold_kept: Position::ZERO,
            kept,
        }
    }

    pub(crate) fn lives(&self, process: Process) -> bool {
        self.up && self.life == process.1
    }

    /// The last event that is published here.
    pub(crate) fn published(&self) -> ConfigVersion {
        self.view.published(weft_projector::Published::version)
    }

    /// The newest event that this process knows, if it is in the log.
    pub(super) fn known(&self) -> Option<Point> {
        let epoch = self.view.read(Projection::version).epoch.max(self.appender.epoch);
        self.folded.filter(|(position, _)| *position > Position::ZERO).map(|(position, hash)| Point {
            epoch,
            position,
            hash,
        })
    }
}

impl World {
    fn process(&self, controller: usize) -> Process {
        (controller, self.controllers[controller].life)
    }

    pub(super) fn timer(&mut self, controller: usize, wait: Duration, timer: Timer) {
        let to = self.process(controller);
        self.after(wait, Event::Controller { to, timer });
    }

    pub(super) fn call(&mut self, controller: usize, ask: Ask, then: Then) {
        let it = &mut self.controllers[controller];
        it.called += 1;
        let call = it.called;
        it.calls.insert(call, then);
        let of = self.process(controller);
        self.ask(of, call, ask);
    }

    // Life.

    /// A controller's process begins.
    pub(super) fn start_controller(&mut self, controller: usize) {
        let (kept, life) = {
            let it = &self.controllers[controller];
            (it.kept, it.life + 1)
        };
        say!(self, "c{controller} starts, life {life}");
        self.controllers[controller] = Controller::new(kept, life);
        match kept {
            Some(point) => self.call(controller, Ask::CheckSeen(point), Then::KeptSeen(point)),
            None => self.call(controller, Ask::Start, Then::Start),
        }
        self.timer(controller, WATCH_EVERY, Timer::Watch);
    }

    /// It ends, and all its connections with it.
    pub(super) fn end_controller(&mut self, controller: usize) {
        let process = self.process(controller);
        say!(self, "c{controller} ends");
        self.controllers[controller].up = false;
        self.controllers[controller].paused = Duration::ZERO;
        self.database.process_ended(process);
        let it = &mut self.controllers[controller];
        let mut callers: Vec<Caller> = it.running.keys().copied().collect();
        callers.extend(it.waiting.drain(..).map(|waiting| waiting.asking.from));
        for then in std::mem::take(&mut it.calls).into_values() {
            if let Then::Witness(asking, _) | Then::WitnessReported(asking) | Then::HeadOf(asking) = then {
                callers.push(asking.from);
            }
        }
        for caller in callers {
            let wait = self.delay();
            self.after(wait, Event::Reply { to: caller, reply: Box::new(Err(Failure::Lost)) });
        }
        let streams = std::mem::take(&mut self.controllers[controller].streams);
        for (id, stream) in streams {
            self.stream_ends(stream.to, controller, id);
        }
    }

    // Answers and timers.

    pub(super) fn answered(&mut self, controller: usize, call: u64, answer: Option<Answer>) {
        let Some(then) = self.controllers[controller].calls.remove(&call) else { return };
        match (then, answer) {
            (Then::KeptSeen(point), Some(Answer::Seen(Seen::Lost { .. }))) => {
                let who = format!("controller c{controller}");
                self.call(controller, Ask::Report(point, who), Then::KeptReported);
            }
            (Then::KeptSeen(point), None) => {
                self.call(controller, Ask::CheckSeen(point), Then::KeptSeen(point));
            }
            (Then::KeptSeen(_) | Then::KeptReported, _) | (Then::Start, None) => {
                self.call(controller, Ask::Start, Then::Start);
            }
            (Then::Start, Some(Answer::Start { fold, events })) => self.started(controller, fold, &events),
            (Then::Page, answer) => {
                self.controllers[controller].asked = false;
                if let Some(Answer::Page(page, anchor)) = answer {
                    self.controllers[controller].page = Some((page, anchor));
                    self.take_in(controller);
                } else {
                    self.poll(controller, POLL.1);
                }
            }
            (Then::Project(step), answer) => {
                self.controllers[controller].busy = false;
                self.project(controller, step, answer);
                self.take_in(controller);
            }
            (Then::FoldKept, _) => {}
            (Then::Append, answer) => self.appended(controller, answer),
            (Then::Outcome(caller), answer) => self.outcome_found(controller, caller, answer),
            (Then::HeadFor(caller), answer) => self.head_found(controller, caller, answer.as_ref()),
            (Then::Witness(asking, point), Some(Answer::Seen(seen))) => match seen {
                Seen::Lost { .. } => {
                    let who = format!("sidecar s{}", asking.sidecar);
                    self.call(controller, Ask::Report(point, who), Then::WitnessReported(asking));
                }
                Seen::Stands => {
                    self.controllers[controller].verified = Some(point);
                    self.check_not_beyond(controller, *asking);
                }
                Seen::NotYet | Seen::GivenUp => self.check_not_beyond(controller, *asking),
            },
            (Then::WitnessReported(asking), Some(Answer::Seen(seen))) => match seen {
                Seen::Lost { .. } => self.reply(controller, asking.from, Err(Failure::Rewound)),
                Seen::Stands | Seen::NotYet | Seen::GivenUp => self.check_not_beyond(controller, *asking),
            },
            (Then::HeadOf(asking), Some(Answer::Head(head))) => {
                let head = ConfigVersion::new(head.epoch, head.position);
                if asking.have.is_some_and(|(have, _)| pull::is_beyond(have, head)) {
                    self.see_beyond();
                    self.reply(controller, asking.from, Err(Failure::Rewound));
                } else {
                    self.go_on(controller, *asking);
                }
            }
            (Then::Witness(asking, _) | Then::WitnessReported(asking) | Then::HeadOf(asking), _) => {
                self.reply(controller, asking.from, Err(Failure::Unavailable));
            }
            (Then::ReportedLost, answer) => {
                let reported = match answer {
                    Some(Answer::Seen(seen)) => Some(seen),
                    _ => None,
                };
                self.call(controller, Ask::Watch, Then::Watch { reported });
            }
            (Then::Watch { reported }, Some(Answer::Watch(standing, adoption))) => {
                self.controllers[controller].standing = !standing.is_empty();
                if standing.is_empty() {
                    if reported == Some(Seen::GivenUp) {
                        // It remembers a history that was given up: its supervisor starts it anew.
                        self.end_controller(controller);
                        return self.after(RESTART, Event::Fault(super::Fault::StartController(controller)));
                    }
                    if let Some(adoption) = adoption {
                        self.record_adoption(controller, &adoption);
                    }
                    let point = self.controllers[controller].view.published(weft_projector::Published::point);
                    let it = &mut self.controllers[controller];
                    it.kept = point.or(it.kept);
                }
            }
            (Then::Watch { .. }, _) => {}
            (Then::Start, Some(_)) => self.complain("the database answers something else"),
        }
    }

    pub(super) fn controller_timer(&mut self, controller: usize, timer: Timer) {
        match timer {
            Timer::Tick => {
                if self.controllers[controller].faulted {
                    return;
                }
                self.timer(controller, LOOK_EVERY, Timer::Tick);
                if !self.controllers[controller].busy {
                    self.keep_lease(controller);
                }
            }
            Timer::Write if self.controllers[controller].busy => {
                self.timer(controller, Duration::from_millis(1), Timer::Write);
            }
            Timer::Write => self.write(controller),
            Timer::Look => {
                self.controllers[controller].looking = false;
                self.look(controller);
            }
            Timer::Poll { wake } => {
                if self.controllers[controller].poll == wake {
                    self.ask_for_page(controller);
                }
            }
            Timer::Watch => {
                self.timer(controller, WATCH_EVERY, Timer::Watch);
                match self.controllers[controller].lost {
                    Some(lost) => {
                        let who = format!("controller c{controller}");
                        self.call(controller, Ask::Report(lost, who), Then::ReportedLost);
                    }
                    None => self.call(controller, Ask::Watch, Then::Watch { reported: None }),
                }
            }
            Timer::Pump { stream, wake } => {
                if self.controllers[controller].streams.get(&stream).is_some_and(|it| it.wake == wake) {
                    self.pump(controller, stream);
                }
            }
            Timer::Pull => self.resume_pulls(controller),
            Timer::Command { caller, stage } => self.command_times_out(controller, caller, stage),
            Timer::Append => self.append_next(controller),
        }
    }
}
