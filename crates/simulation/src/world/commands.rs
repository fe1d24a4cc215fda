//! Changes to the mesh: who wants them, how a controller decides and appends them, in the order of `api/src/commands.rs` and
//! `eventlog/src/append/`. The decisions are the production's; the queue, the flights and the waits are modelled.

use rand::RngExt;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;
use weft_api::commands::{Change, Request as CommandRequest, append_request};
use weft_eventlog::decide::{Ground, LogTail, decide};
use weft_eventlog::{Adoption, AppendError, AppendRequest, Appended, NewEvent, ScopeAppend};
use weft_model::mesh::{HistoryAdopted, MeshEvent};
use weft_model::version::{Epoch, ExpectedVersion, Position, Version};
use weft_model::{Command, Event as Happened, Scope, Timestamp};

use super::controller::{Then, Timer};
use super::wishes::{declare, root};
use super::{Answer, Ask, Caller, Event, Failure, Reply, Request, World, say};
use crate::database::{Ahead, AppendFailure, clock};

/// How often a command is decided again.
const ATTEMPTS_MAX: u32 = 8;
/// How long it waits for the fold.
const FOLD_WAIT_MAX: Duration = Duration::from_secs(5);
/// How often a batch is attempted again, before its callers are told that nobody knows.
const RETRIES_MAX: u32 = 4;
/// Batches in a row that nobody else's came between, until one is decided ahead. Fewer than in production, where it is a question of
/// speed.
const ALONE_MIN: u32 = 2;
/// How often somebody sends a command again, before giving up.
const SENDS_MAX: u32 = 6;

/// Somebody who wants something of the mesh.
#[derive(Debug)]
pub(crate) struct Client {
    id: Uuid,
    changes: Vec<Command>,
    attempt: u32,
    /// How often it is sent again, before giving up.
    attempts_max: u32,
    controller: usize,
    /// Whoever knows what became of it.
    done: bool,
    /// Its last event, if it was told that it is durable.
    pub(crate) acknowledged: Option<Position>,
}

/// A command under way at a controller.
#[derive(Debug)]
pub(crate) struct Running {
    request: CommandRequest,
    attempts: u32,
    /// Where the log ended at some moment of this request.
    head: Option<Position>,
    stage: Stage,
    /// Tells a timer whether it still means this stage.
    stages: u64,
}

#[derive(Debug)]
enum Stage {
    Appending,
    /// It changes nothing, or is refused, as of this position: unless it was executed before, or the fold is behind.
    Asking {
        at: Position,
        answer: Result<(), String>,
    },
    /// Until the fold is there.
    Folding(Position),
    /// Until the fold knows this of a scope.
    Behind(Scope, Version),
    /// It is durable, and answered once this controller's reads show it.
    Showing {
        last: Option<Position>,
        repeated: bool,
    },
}

/// A controller's appender: one batch under way, the next one gathers.
#[derive(Debug, Default)]
pub(crate) struct Appender {
    queue: Vec<Item>,
    flight: Vec<Item>,
    /// It was sent, and its answer is to come.
    sent: bool,
    ahead: bool,
    retries: u32,
    known: Option<LogTail>,
    heads: BTreeMap<String, Version>,
    pub(crate) epoch: Epoch,
    alone: u32,
}

#[derive(Clone, Debug)]
struct Item {
    caller: Option<Caller>,
    request: AppendRequest,
    fingerprint: [u8; 32],
}

impl World {
    // Somebody.

    /// A random change, or one that the mesh begins with.
    pub(super) fn command(&mut self) {
        let changes = self.draw_changes();
        self.want(changes);
        let (least, most) = self.plan.pace;
        let wait = self.between(least, most);
        if self.now + wait < self.plan.changes_until {
            self.after(wait, Event::Command);
        }
    }

    /// Somebody wants this. Returns who.
    pub(crate) fn want(&mut self, changes: Vec<Command>) -> usize {
        let (id, controller) = (self.command_id(), self.rng.random_range(0..self.controllers.len()));
        let attempts_max = SENDS_MAX;
        let client =
            Client { id, changes, attempt: 0, attempts_max, controller, done: false, acknowledged: None };
        self.clients.push(client);
        let client = self.clients.len() - 1;
        self.send_command(client);
        client
    }

    pub(super) fn send_command(&mut self, client: usize) {
        let controllers = self.controllers.len();
        let it = &mut self.clients[client];
        if it.done {
            return;
        }
        it.attempt += 1;
        let (controller, attempt) = (it.controller, it.attempt);
        it.controller = (it.controller + 1) % controllers;
        let request = Request::Command { id: it.id, changes: it.changes.clone() };
        self.request(controller, Caller::Client { client, attempt }, request);
    }

    pub(super) fn client_reply(&mut self, client: usize, attempt: u32, reply: Result<Reply, Failure>) {
        let it = &mut self.clients[client];
        if let Ok(Reply::Done { last, repeated }) = &reply {
            // Whichever attempt it answers.
            it.done = true;
            it.acknowledged = it.acknowledged.or(*last);
            say!(self, "client {client}: done at {last:?}, repeated {repeated}");
            return self.check_acknowledged(client);
        }
        if it.done || attempt != it.attempt {
            return;
        }
        match reply {
            Ok(_) => {}
            Err(Failure::Refused(why)) => {
                it.done = true;
                say!(self, "client {client}: refused: {why}");
            }
            Err(failure) => {
                let again = attempt < it.attempts_max;
                say!(self, "client {client}: {failure:?}");
                if again {
                    let wait = self.between(Duration::from_millis(50), Duration::from_millis(900));
                    self.after(wait, Event::Send { client });
                } else {
                    self.clients[client].done = true;
                }
            }
        }
    }

    /// An acknowledged command's events are in the log (I1).
    fn check_acknowledged(&mut self, client: usize) {
        let Client { id, acknowledged: Some(last), .. } = self.clients[client] else { return };
        let index = usize::try_from(last.0 - 1).unwrap_or(usize::MAX);
        let there = self.database.tables.events.get(index).is_some_and(|event| event.command_id == id);
        if !there {
            // Its answer may have been under way while a backup took the place of the log.
            let lost = last > self.database.tail().position || self.plan.restored;
            if !lost {
                self.complain(format!("I1: client {client} was told of {last}, which is not its command's"));
            }
            self.clients[client].acknowledged = None;
        }
    }

    /// What everybody was told is still so.
    pub(crate) fn check_all_acknowledged(&mut self) {
        (0..self.clients.len()).for_each(|client| self.check_acknowledged(client));
    }

    /// A backup took the place of the log: what it lacks was lost with it.
    pub(super) fn forget_lost(&mut self) {
        let events = &self.database.tables.events;
        for client in &mut self.clients {
            let there = |last: Position| {
                let index = usize::try_from(last.0 - 1).unwrap_or(usize::MAX);
                events.get(index).is_some_and(|event| event.command_id == client.id)
            };
            client.acknowledged = client.acknowledged.filter(|last| there(*last));
        }
    }

    /// What the mesh begins with.
    pub(super) fn found(&mut self) {
        let mut changes = vec![root()];
        changes.extend((0..self.plan.services).map(|service| declare(service, 80)));
        let client = self.want(changes);
        self.clients[client].attempts_max = u32::MAX;
    }

    /// Any change, until it is made.
    pub(super) fn want_something(&mut self) {
        let port = self.rng.random_range(1_000..60_000);
        let client = self.want(vec![declare(0, port)]);
        self.clients[client].attempts_max = u32::MAX;
    }

    /// A controller that starts announces its root.
    pub(super) fn announce(&mut self) {
        let client = self.want(vec![root()]);
        self.clients[client].attempts_max = u32::MAX;
    }

    // A controller.

    pub(super) fn execute(&mut self, controller: usize, from: Caller, id: Uuid, changes: Vec<Command>) {
        if self.controllers[controller].faulted || self.controllers[controller].folded.is_none() {
            return self.reply(controller, from, Err(Failure::Unavailable));
        }
        let mut print = Sha256::new();
        print.update(id.as_bytes());
        let change = |command| Change::new(ExpectedVersion::Any, command);
        let request = CommandRequest {
            command_id: id,
            reason: None,
            actor: "somebody".into(),
            fingerprint: print.finalize().into(),
            changes: changes.into_iter().map(change).collect(),
        };
        let running = Running { request, attempts: 0, head: None, stage: Stage::Appending, stages: 0 };
        self.controllers[controller].running.insert(from, running);
        self.attempt(controller, from);
    }

    /// Decides against the fold as it is.
    fn attempt(&mut self, controller: usize, caller: Caller) {
        let now = Timestamp(clock(self.now).millis());
        let it = &mut self.controllers[controller];
        let Some(running) = it.running.get_mut(&caller) else { return };
        running.attempts += 1;
        if running.attempts > ATTEMPTS_MAX {
            return self.finish(controller, caller, Err(Failure::Unavailable));
        }
        let batch: Vec<Command> =
            running.request.changes.iter().map(|change| change.command.clone()).collect();
        let (at, decided) = it.view.read(|projection| {
            (projection.version().position, weft_routing::decide::decide(projection.state(), &batch, now))
        });
        let answer = match decided {
            Ok(decisions) if decisions.iter().any(|decision| !decision.events.is_empty()) => {
                running.stage = Stage::Appending;
                return match append_request(&running.request, &decisions) {
                    Ok(request) => {
                        let fingerprint = running.request.fingerprint;
                        self.append(controller, Item { caller: Some(caller), request, fingerprint });
                    }
                    Err(error) => self.complain(format!("no request to append: {error:?}")),
                };
            }
            Ok(_) => Ok(()),
            Err(refused) => Err(refused.to_string()),
        };
        let id = running.request.command_id;
        running.stage = Stage::Asking { at, answer };
        self.call(controller, Ask::Outcome(id), Then::Outcome(caller));
    }

    pub(super) fn outcome_found(&mut self, controller: usize, caller: Caller, answer: Option<Answer>) {
        let Some(running) = self.controllers[controller].running.get(&caller) else { return };
        match answer {
            Some(Answer::Outcome(Some(first))) => {
                let last = first.appended.positions.map(|positions| *positions.end());
                self.finish(controller, caller, Ok(Reply::Done { last, repeated: true }));
            }
            Some(Answer::Outcome(None)) => match running.head {
                Some(head) => self.refuse_or_wait(controller, caller, head),
                None => self.call(controller, Ask::Head, Then::HeadFor(caller)),
            },
            _ => self.finish(controller, caller, Err(Failure::Unavailable)),
        }
    }

    pub(super) fn head_found(&mut self, controller: usize, caller: Caller, answer: Option<&Answer>) {
        let seen = self.controllers[controller].running.get(&caller).and_then(Running::rests_on);
        match answer {
            Some(Answer::Head(head)) if seen.is_none_or(|seen| head.position >= seen) => {
                self.refuse_or_wait(controller, caller, head.position);
            }
            _ => self.finish(controller, caller, Err(Failure::Unavailable)),
        }
    }

    /// What leads to no append is final only if it rests on everything that was in the log at some moment of the request.
    fn refuse_or_wait(&mut self, controller: usize, caller: Caller, head: Position) {
        let Some(running) = self.controllers[controller].running.get_mut(&caller) else { return };
        running.head = Some(head);
        let Stage::Asking { at, answer } = &running.stage else { return };
        if head <= *at {
            let reply = match answer {
                Ok(()) => Ok(Reply::Done { last: None, repeated: false }),
                Err(why) => Err(Failure::Refused(why.clone())),
            };
            return self.finish(controller, caller, reply);
        }
        self.wait(controller, caller, Stage::Folding(head));
    }

    /// Waits for the fold, for a while.
    fn wait(&mut self, controller: usize, caller: Caller, stage: Stage) {
        let Some(running) = self.controllers[controller].running.get_mut(&caller) else { return };
        running.stage = stage;
        running.stages += 1;
        let stage = running.stages;
        self.timer(controller, FOLD_WAIT_MAX, Timer::Command { caller, stage });
        self.resume_commands(controller);
    }

    pub(super) fn command_times_out(&mut self, controller: usize, caller: Caller, stage: u64) {
        let Some(running) = self.controllers[controller].running.get(&caller) else { return };
        if running.stages != stage {
            return;
        }
        match running.stage {
            Stage::Showing { last, repeated } => {
                self.finish(controller, caller, Ok(Reply::Done { last, repeated }));
            }
            Stage::Folding(_) | Stage::Behind(..) => {
                self.finish(controller, caller, Err(Failure::Unavailable));
            }
            Stage::Appending | Stage::Asking { .. } => {}
        }
    }

    /// The fold went on: who waited for it goes on, too.
    pub(super) fn resume_commands(&mut self, controller: usize) {
        let it = &self.controllers[controller];
        let ready: Vec<Caller> = it.view.read(|projection| {
            let position = projection.version().position;
            let is_ready = |running: &Running| match &running.stage {
                Stage::Folding(wanted) => position >= *wanted,
                Stage::Behind(scope, version) => projection.state().source(scope).version >= *version,
                Stage::Showing { last, .. } => last.is_none_or(|last| position >= last),
                Stage::Appending | Stage::Asking { .. } => false,
            };
            it.running.iter().filter(|(_, running)| is_ready(running)).map(|(caller, _)| *caller).collect()
        });
        for caller in ready {
            let Some(running) = self.controllers[controller].running.get(&caller) else { continue };
            match running.stage {
                Stage::Showing { last, repeated } => {
                    self.finish(controller, caller, Ok(Reply::Done { last, repeated }));
                }
                _ => self.attempt(controller, caller),
            }
        }
    }

    /// The fold ended: nobody waits for it any more.
    pub(super) fn fail_waiting(&mut self, controller: usize) {
        let callers: Vec<Caller> = self.controllers[controller].running.keys().copied().collect();
        for caller in callers {
            let running = &self.controllers[controller].running[&caller];
            match running.stage {
                Stage::Showing { last, repeated } => {
                    self.finish(controller, caller, Ok(Reply::Done { last, repeated }));
                }
                Stage::Folding(_) | Stage::Behind(..) => {
                    self.finish(controller, caller, Err(Failure::Unavailable));
                }
                Stage::Appending | Stage::Asking { .. } => {}
            }
        }
    }

    fn finish(&mut self, controller: usize, caller: Caller, reply: Result<Reply, Failure>) {
        if self.controllers[controller].running.remove(&caller).is_some() {
            self.reply(controller, caller, reply);
        }
    }

    /// Makes a decision an event of the log, if nobody did yet.
    pub(super) fn record_adoption(&mut self, controller: usize, adoption: &Adoption) {
        let it = &self.controllers[controller];
        let folded = it.view.read(|projection| projection.version().epoch);
        if folded >= adoption.epoch || it.faulted || it.folded.is_none() {
            return;
        }
        let digest = Sha256::digest(format!("{} {} {}", adoption.id, adoption.epoch, adoption.adopted_at.0));
        let mut random = [0; 10];
        random.copy_from_slice(&digest[..10]);
        let millis = u64::try_from(adoption.adopted_at.millis()).unwrap_or_default();
        let adopted = HistoryAdopted { epoch: adoption.epoch.0, fork_position: adoption.fork_position.0 };
        let event = Happened::from(MeshEvent::from(adopted));
        let Ok(payload) = event.payload() else { return self.complain("an event without a JSON form") };
        let event = NewEvent { event_type: event.type_name().into(), schema: event.schema(), payload };
        let request = AppendRequest {
            command_id: uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid(),
            fingerprint: Some(digest.into()),
            actor: adoption.actor.clone(),
            reason: Some(adoption.reason.clone()),
            cause: None,
            scopes: vec![ScopeAppend {
                scope: Scope::Mesh.to_string(),
                expected: ExpectedVersion::Any,
                events: vec![event],
            }],
        };
        self.append(controller, Item { caller: None, fingerprint: digest.into(), request });
    }

    // Its appender.

    fn append(&mut self, controller: usize, item: Item) {
        self.controllers[controller].appender.queue.push(item);
        self.append_next(controller);
    }

    /// Sends what has queued, unless a batch is under way.
    pub(super) fn append_next(&mut self, controller: usize) {
        let now = clock(self.now);
        let it = &mut self.controllers[controller];
        let delivered = it.lost.or_else(|| it.known());
        let appender = &mut it.appender;
        if appender.sent {
            return;
        }
        let again = !appender.flight.is_empty();
        if !again {
            appender.flight = std::mem::take(&mut appender.queue);
            appender.ahead = false;
        }
        if appender.flight.is_empty() {
            return;
        }
        let mut known: Vec<_> = delivered.into_iter().collect();
        let epoch = appender.epoch;
        known.extend(
            appender.known.filter(|tail| tail.position > Position::ZERO).map(|tail| weft_eventlog::Point {
                epoch,
                position: tail.position,
                hash: tail.hash,
            }),
        );
        let requests: Vec<_> =
            appender.flight.iter().map(|item| (item.request.clone(), item.fingerprint)).collect();
        let ahead = if again { None } else { appender.decide_ahead(&requests, now) };
        (appender.ahead, appender.sent) = (ahead.is_some(), true);
        self.call(controller, Ask::Append { requests, ahead: ahead.map(Box::new), known }, Then::Append);
    }

    pub(super) fn appended(&mut self, controller: usize, answer: Option<Answer>) {
        let it = &mut self.controllers[controller];
        let appender = &mut it.appender;
        appender.sent = false;
        match answer {
            Some(Answer::Appended(Ok(written))) => {
                let before = appender.known.unwrap_or(LogTail::EMPTY).position;
                let new = written.answers.iter().flatten().filter(|appended| !appended.repeated);
                let first = new.filter_map(|appended| Some(*appended.positions.as_ref()?.start())).next();
                let alone = first.map_or(written.tail.position, |first| Position(first.0 - 1)) == before;
                if !appender.ahead {
                    if !alone {
                        appender.heads.clear();
                    }
                    appender.heads.extend(written.heads);
                    appender.alone = if alone { appender.alone + 1 } else { 0 };
                }
                appender.epoch = written.epoch;
                appender.known = Some(written.tail);
                // A repeat tells versions of then.
                for appended in written.answers.iter().flatten().filter(|appended| !appended.repeated) {
                    appender
                        .heads
                        .extend(appended.versions.iter().map(|(scope, version)| (scope.clone(), *version)));
                }
                appender.retries = 0;
                let items = std::mem::take(&mut appender.flight);
                for (item, answer) in items.into_iter().zip(written.answers) {
                    self.item_answered(controller, &item, answer);
                }
            }
            Some(Answer::Appended(Err(failure @ (AppendFailure::Lost(_) | AppendFailure::Standing)))) => {
                appender.lose_footing();
                let items = std::mem::take(&mut appender.flight);
                appender.retries = 0;
                if let AppendFailure::Lost(point) = failure {
                    it.lost.get_or_insert(point);
                }
                for item in items {
                    if let Some(caller) = item.caller {
                        self.finish(controller, caller, Err(Failure::Rewound));
                    }
                }
            }
            Some(Answer::Appended(Err(AppendFailure::Unexpected))) => {
                // Nothing of it was written.
                appender.lose_footing();
                appender.retries += 1;
            }
            _ => {
                // Whether it was written is unknown: it is attempted again, where its commands are found by their ids.
                appender.lose_footing();
                appender.retries += 1;
                if appender.retries > RETRIES_MAX {
                    appender.retries = 0;
                    let items = std::mem::take(&mut appender.flight);
                    for item in items {
                        if let Some(caller) = item.caller {
                            self.finish(controller, caller, Err(Failure::Unavailable));
                        }
                    }
                }
            }
        }
        if self.controllers[controller].appender.retries > 0 {
            self.timer(controller, Duration::from_millis(50), Timer::Append);
        } else {
            self.append_next(controller);
        }
    }

    fn item_answered(&mut self, controller: usize, item: &Item, answer: Result<Appended, AppendError>) {
        let Some(caller) = item.caller else { return };
        match answer {
            Ok(appended) => {
                let last = appended.positions.map(|positions| *positions.end());
                let stage = Stage::Showing { last, repeated: appended.repeated };
                if self.controllers[controller].faulted {
                    let reply = Ok(Reply::Done { last, repeated: appended.repeated });
                    return self.finish(controller, caller, reply);
                }
                self.wait(controller, caller, stage);
            }
            Err(AppendError::Conflict { scope, current, .. }) => match scope.parse() {
                Ok(scope) => self.wait(controller, caller, Stage::Behind(scope, current)),
                Err(_) => self.complain(format!("a conflict about {scope}")),
            },
            Err(error) => self.finish(controller, caller, Err(Failure::Refused(error.to_string()))),
        }
    }
}

impl Running {
    /// The last event that an answer without an append rests on.
    const fn rests_on(&self) -> Option<Position> {
        match &self.stage {
            Stage::Asking { at, .. } => Some(*at),
            Stage::Appending | Stage::Folding(_) | Stage::Behind(..) | Stage::Showing { .. } => None,
        }
    }
}

impl Client {
    /// Whether it knows what became of it.
    pub(crate) const fn is_done(&self) -> bool {
        self.done
    }
}

impl Appender {
    /// Decides a batch on what is known, if that may be.
    fn decide_ahead(
        &self,
        requests: &[(AppendRequest, [u8; 32])],
        now: weft_eventlog::UnixMicros,
    ) -> Option<Ahead> {
        let tail = self.known.filter(|_| self.alone >= ALONE_MIN)?;
        let parts = requests.iter().flat_map(|(request, _)| &request.scopes);
        let known = parts.map(|part| Some((part.scope.as_str(), *self.heads.get(&part.scope)?)));
        let mut heads: BTreeMap<&str, Version> = known.collect::<Option<_>>()?;
        let ground = Ground { epoch: self.epoch, tail, now, outcomes: BTreeMap::new() };
        let decision = decide(ground, &mut heads, requests.iter().map(|(request, print)| (request, *print)));
        // A conflict may be that of a command which was recorded before: only the log knows.
        let doubted = |answer: &Result<Appended, AppendError>| {
            !matches!(answer, Ok(Appended { positions: Some(_), .. }))
        };
        if decision.answers.iter().any(doubted) {
            return None;
        }
        let (answers, recorded, end) = (decision.answers, decision.recorded, decision.tail);
        Some(Ahead { epoch: self.epoch, tail, answers, recorded, end })
    }

    fn lose_footing(&mut self) {
        self.alone = 0;
        self.heads.clear();
    }
}
