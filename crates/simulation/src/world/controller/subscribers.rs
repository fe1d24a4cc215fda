//! What sidecars ask, and what they are told. In the order of `discovery.rs` and `witness.rs` in `weft-api`.

use bytes::Bytes;
use std::time::Duration;
use weft_api::status::ApiError;
use weft_api::telling::Telling;
use weft_api::{convert, pull};
use weft_eventlog::Point;
use weft_model::InstanceId;
use weft_proto::v1 as pb;
use weft_routing::Projection;

use super::{Asking, Stream, Then, Timer, Waiting};
use crate::plant::Plant;
use crate::world::{Ask, Caller, Event, Failure, Link, Reply, Request, World};

/// How long a pull waits for a registration to be published.
const PUBLISH_WAIT_MAX: Duration = Duration::from_secs(2);
/// Over how long acknowledgements are spread, as if some hundred sidecars had streams.
const ACK_SPREAD: Duration = Duration::from_millis(50);

impl World {
    pub(in crate::world) fn requested(&mut self, controller: usize, from: Caller, request: Request) {
        if !self.controllers[controller].up {
            return self.reply(controller, from, Err(Failure::Lost));
        }
        let have = |header: Option<pb::SnapshotHeader>| convert::header("have", header).ok().flatten();
        match (request, from) {
            (Request::Subscribe { have: it, witness }, Caller::Sidecar { sidecar, .. }) => {
                let asking = Asking { from, sidecar, have: have(it), held: Vec::new(), subscribe: true };
                let verified = self.controllers[controller].verified;
                match witness.filter(|point| verified != Some(*point) || self.controllers[controller].faulted)
                {
                    Some(point) => {
                        self.call(controller, Ask::CheckSeen(point), Then::Witness(Box::new(asking), point));
                    }
                    None => self.check_not_beyond(controller, asking),
                }
            }
            (Request::Pull(pull), Caller::Sidecar { sidecar, .. }) => {
                let asking =
                    Asking { from, sidecar, have: have(pull.have), held: pull.held, subscribe: false };
                self.check_not_beyond(controller, asking);
            }
            (Request::Ack(ack), Caller::Sidecar { sidecar, .. }) => {
                if let (Ok(Some((version, hash))), true) =
                    (convert::header("applied", ack.applied), ack.error.is_empty())
                {
                    let instance = self.sidecars[sidecar].instance.clone();
                    let checked = self.oracle.check_snapshot(&instance, version, hash);
                    self.check(checked);
                    self.acked_as_durable(sidecar, version);
                }
                self.reply(controller, from, Ok(Reply::Acked));
            }
            (Request::Command { id, changes }, _) => self.execute(controller, from, id, changes),
            (Request::Subscribe { .. } | Request::Pull(_) | Request::Ack(_), Caller::Client { .. }) => {
                self.reply(controller, from, Err(Failure::Refused("no sidecar".into())));
            }
        }
    }

    /// Whether the caller has more than the whole log has.
    pub(super) fn check_not_beyond(&mut self, controller: usize, asking: Asking) {
        let folded = self.controllers[controller].view.read(Projection::version);
        if asking.have.is_some_and(|(have, _)| pull::is_beyond(have, folded)) {
            self.call(controller, Ask::Head, Then::HeadOf(Box::new(asking)));
        } else {
            self.go_on(controller, asking);
        }
    }

    pub(super) fn go_on(&mut self, controller: usize, asking: Asking) {
        if asking.subscribe {
            return self.open(controller, &asking);
        }
        let instance = self.sidecars[asking.sidecar].instance.clone();
        let it = &self.controllers[controller];
        if it.view.published(|published| published.wanted(&instance).is_some()) {
            return self.answer_pull(controller, &asking);
        }
        match it.view.read(|projection| projection.wanted(&instance).map(|wanted| wanted.version)) {
            Some(version) => {
                let until = self.now + PUBLISH_WAIT_MAX;
                self.controllers[controller].waiting.push(Waiting { asking, version, until });
                self.timer(controller, PUBLISH_WAIT_MAX, Timer::Pull);
            }
            None => self.answer_pull(controller, &asking),
        }
    }

    pub(super) fn resume_pulls(&mut self, controller: usize) {
        let waiting = std::mem::take(&mut self.controllers[controller].waiting);
        let published = self.controllers[controller].published();
        for waiting in waiting {
            if published >= waiting.version {
                self.answer_pull(controller, &waiting.asking);
            } else if self.now >= waiting.until {
                self.reply(controller, waiting.asking.from, Err(Failure::Unavailable));
            } else {
                self.controllers[controller].waiting.push(waiting);
            }
        }
    }

    fn answer_pull(&mut self, controller: usize, asking: &Asking) {
        let instance = &self.sidecars[asking.sidecar].instance;
        let it = &self.controllers[controller];
        let answer =
            it.view.published(|published| pull::plan(published, instance, asking.have, &asking.held));
        let answer = answer.and_then(pull::Plan::into_response);
        let reply = match answer {
            Ok(response) => Ok(Reply::Pulled(Box::new(response))),
            Err(ApiError::Unavailable(_) | ApiError::Overloaded { .. }) => Err(Failure::Unavailable),
            Err(error) => Err(Failure::Refused(format!("{error:?}"))),
        };
        self.reply(controller, asking.from, reply);
    }

    fn open(&mut self, controller: usize, asking: &Asking) {
        let Caller::Sidecar { sidecar, life, .. } = asking.from else { return };
        let now = self.instant();
        let arrives = self.now;
        let instance: InstanceId = self.sidecars[sidecar].instance.clone();
        let it = &mut self.controllers[controller];
        it.opened += 1;
        // Of all its lives, so that no stream is taken for another one.
        let stream = it.life * 1_000_000 + it.opened;
        it.streams.insert(
            stream,
            Stream {
                to: (sidecar, life),
                telling: Telling::new(instance, asking.have, now),
                have: asking.have,
                feed: it.view.publications(),
                wake: 0,
                arrives,
                broken: false,
                last: None,
            },
        );
        self.reply(controller, asking.from, Ok(Reply::Subscribed { stream }));
        // What is told first comes behind the answer.
        self.timer(controller, Duration::from_millis(6), Timer::Pump { stream, wake: 0 });
    }

    /// A sidecar's end of a stream is gone.
    pub(in crate::world) fn drop_stream(&mut self, controller: usize, stream: u64) {
        self.controllers[controller].streams.remove(&stream);
    }

    /// Says what there is to say on a stream.
    pub(super) fn pump(&mut self, controller: usize, id: u64) {
        let now = self.instant();
        loop {
            let forgets = self.planted(Plant::ForgetTold);
            let it = &mut self.controllers[controller];
            let Some(stream) = it.streams.get_mut(&id) else { return };
            stream.feed.mark_unchanged();
            let (news, feed) = it.view.published(|published| {
                let news = stream.telling.next(published, now, Duration::ZERO);
                let feed = published.feed(stream.telling.instance());
                (news, feed.filter(|feed| !feed.same_channel(&stream.feed)))
            });
            if let Some(feed) = feed {
                stream.feed = feed;
            } else if stream.feed.has_changed().is_err() {
                stream.feed = it.view.publications();
            }
            let Some(news) = news else { break };
            if forgets {
                let (instance, at) = (stream.telling.instance().clone(), stream.telling.next_heartbeat());
                stream.telling = Telling::new(instance, stream.have, at);
            }
            let witness = news.witness.map(|point| encode(&point)).unwrap_or_default();
            let notice = news.notice(witness, ACK_SPREAD);
            let before = stream.last.replace((self.now, notice.clone()));
            let again = before.is_some_and(|(at, last)| {
                at == self.now && (last.wanted, last.head) == (notice.wanted.clone(), notice.head)
            });
            if again {
                return self.complain("I10: a subscriber is told the same over and over");
            }
            self.send_notice(controller, id, notice);
        }
        let Some(stream) = self.controllers[controller].streams.get_mut(&id) else { return };
        stream.wake += 1;
        let (wake, at) = (stream.wake, stream.telling.next_heartbeat());
        let to = self.process(controller);
        self.at(at, Event::Controller { to, timer: Timer::Pump { stream: id, wake } });
    }

    fn send_notice(&mut self, controller: usize, id: u64, mut notice: pb::Notice) {
        let Some(&Stream { to, broken, arrives, .. }) = self.controllers[controller].streams.get(&id) else {
            return;
        };
        if self.planted(Plant::DropPatch) {
            self.drop_a_patch(to.0, &mut notice);
        }
        let cut = self.is_lost(Link::Reply(to.0, controller));
        let wait = self.delay();
        if self.plan.wild {
            // Harsher than TCP: notices are lost, doubled and overtaken on a stream that goes on.
            if cut || self.chance(0.05) {
                return;
            }
            if self.chance(0.1) {
                let later = self.delay() * 20;
                self.after(later, Event::Notice { to, stream: id, notice: Box::new(notice.clone()) });
            }
            return self.after(wait, Event::Notice { to, stream: id, notice: Box::new(notice) });
        }
        if broken || cut {
            if let Some(stream) = self.controllers[controller].streams.get_mut(&id) {
                stream.broken = true;
            }
            return;
        }
        let at = (self.now + wait).max(arrives);
        if let Some(stream) = self.controllers[controller].streams.get_mut(&id) {
            stream.arrives = at;
        }
        let wait = at - self.now;
        self.after(wait, Event::Notice { to, stream: id, notice: Box::new(notice) });
    }
}

/// A witness in the simulation's words: its signature is taken for granted.
fn encode(point: &Point) -> Bytes {
    let mut bytes = Vec::with_capacity(48);
    bytes.extend(point.epoch.0.to_be_bytes());
    bytes.extend(point.position.0.to_be_bytes());
    bytes.extend(point.hash.0);
    bytes.into()
}
