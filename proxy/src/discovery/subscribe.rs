//! Following a controller: register, subscribe, take the patch in a notice or pull what is missed, swap it in, say so.
//!
//! One task, one session at a time. A session that breaks, or in which no notice comes for two heartbeats, is given up for
//! a new one, with another controller first, after a random wait. The data path goes on meanwhile.
//!
//! What is to be done is decided in [`follow`](weft_client::follow), which is pure; here it is done.
//!
//! Order of a swap: disk, memory, cuts, ack. What took effect is on disk, so a restart never goes back behind it (I4).
//! The one gap: a disk that does not answer within [`DISK_WAIT`](super::keep::DISK_WAIT), or refuses, does not stop a deny
//! from taking effect; the ack then says that it is not durable, and a crash before the disk has it goes back to what is
//! there, until a controller is reached.

use super::canary::Canary;
use super::keep::Keeper;
use super::own::Own;
use super::witness::Witnesses;
use super::{Session, answer};
use crate::clock;
use crate::config::Config;
use crate::metrics;
use crate::shared::{Rechecked, Shared};
use crate::status::Status;
use rand::RngExt;
use rand::rngs::SmallRng;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tonic::transport::Channel;
use weft_client::follow::{self, Ack, Ask, Follower, HEARTBEAT_DEFAULT, Heard, MISSED_MAX, Pulled, Taken};
use weft_client::take;
use weft_client::{ALPN, Backoff, CallError, command};
use weft_identity::tls::ExpectedPeer;
use weft_model::rollout::Evidence;
use weft_model::{Chain, ConfigVersion, ServiceName};
use weft_proto::v1;
use weft_proto::v1::discovery_client::DiscoveryClient;
use weft_proto::v1::mesh_client::MeshClient;
use weft_routing::Snapshot;

/// Shortest time between pulls because a peer runs something newer. Peers may run ahead of this sidecar for good, if what
/// changed is not in its snapshot.
const MISS_INTERVAL: Duration = Duration::from_millis(200);

/// How often this sidecar goes to another controller at once, without a wait, because one ended its stream.
const MOVE_INTERVAL: Duration = Duration::from_secs(1);

/// A session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the controller ended the stream of notices")]
    Ended,
    #[error("no notice for {MISSED_MAX} heartbeats")]
    Silent,
    #[error("there is a new leaf")]
    Renewed,
}

/// See the module's documentation.
pub(crate) struct Subscriber {
    pub(crate) config: Arc<Config>,
    pub(crate) advertised: SocketAddr,
    pub(crate) shared: Arc<Shared>,
    pub(crate) status: Arc<Status>,
    pub(crate) own: Arc<Own>,
    pub(crate) sessions: watch::Sender<Option<Session>>,
    pub(crate) rng: SmallRng,
    /// Whether this process made the instance known.
    pub(crate) registered: bool,
    pub(crate) keeper: Keeper,
    pub(crate) witnesses: Witnesses,
    pub(crate) canary: Canary,
    /// Waits after a controller failed, and after one had too much to do; over when a controller gave what it has.
    pub(crate) backoff: Backoff,
}

/// When the next notice is due at the latest; [`watch_staleness`] says so if it does not come.
type Due = watch::Sender<Instant>;

impl Subscriber {
    /// Follows controllers until the task is aborted.
    pub(crate) async fn run(mut self) {
        let due = Due::new(Instant::now() + HEARTBEAT_DEFAULT * MISSED_MAX);
        if let Some(snapshot) = self.shared.snapshot() {
            // From the disk: what is met with counts from the beginning.
            self.canary.swapped(snapshot.version, Evidence::default(), 0);
        }
        let staleness = watch_staleness(due.subscribe(), Arc::clone(&self.status));
        let follow = async {
            let mut controllers = self.config.controllers.clone();
            // A fleet that starts at once is spread over them.
            let first = self.rng.random_range(0..controllers.len().max(1));
            controllers.rotate_left(first);
            let mut moved: Option<Instant> = None;
            let tls = self.own.tls.resuming_client(ExpectedPeer::Controller, ALPN);
            loop {
                let channel = weft_client::channel(controllers.clone(), tls.clone());
                let Err(error) = self.session(&channel, &due).await;
                if matches!(error, SessionError::Renewed) {
                    continue;
                }
                // A controller that shuts down says so by ending the stream: there are others, and nothing is wrong.
                if matches!(error, SessionError::Ended)
                    && controllers.len() > 1
                    && moved.is_none_or(|moved| moved.elapsed() > MOVE_INTERVAL)
                {
                    moved = Some(Instant::now());
                    controllers.rotate_left(1);
                    tracing::info!("the controller asked to go to another one");
                    continue;
                }
                if let SessionError::Call(error) = &error
                    && error.is_rewound()
                {
                    self.status.set_rewound(&error.to_string());
                }
                self.status.disconnected(&Chain(&error).to_string());
                sleep(self.backoff.next(&mut self.rng)).await;
                controllers.rotate_left(1);
            }
        };
        tokio::join!(staleness, follow);
    }

    async fn session(
        &mut self,
        channel: &Channel,
        due: &Due,
    ) -> Result<std::convert::Infallible, SessionError> {
        // Once is enough: registering again at every session would undo what an operator did meanwhile, such as a drain.
        if !self.registered {
            // If nothing is recorded now, what this sidecar has seen may be why, or may be news: it is shown below.
            self.registered = self.register_if_recorded(channel).await?;
        }
        let mut session = follow::Session::new(Instant::now());
        let mut seen = self.shared.seen.subscribe();
        let mut discovery =
            DiscoveryClient::new(channel.clone()).max_decoding_message_size(take::PULL_BYTES_MAX);
        let have = self.shared.snapshot().map(|snapshot| take::header(&snapshot));
        let witness = self.witnesses.show().into();
        let mut notices = answer(discovery.subscribe(v1::SubscribeRequest { have, witness })).await?;
        self.status.clear_rewound();
        self.open_session(channel);
        self.canary.greet(Instant::now());
        let mut last_miss = None;
        loop {
            let since = tokio::select! {
                biased;
                notice = notices.message() => {
                    let notice = notice.map_err(CallError::from)?.ok_or(SessionError::Ended)?;
                    let now = Instant::now();
                    let head = session.noticed(&notice, now);
                    self.canary.told(notice.rollout, now);
                    due.send_replace(session.silent_at());
                    self.witnesses.told(head, &notice.witness);
                    if session.must_register(&notice, self.registered, now) {
                        self.registered = self.register_if_recorded(channel).await?;
                        if self.registered {
                            // As a new session, so that its health is reported anew too.
                            self.open_session(channel);
                        }
                        session.registered(Instant::now());
                    }
                    if !self.misses(&notice, &mut session).await {
                        continue;
                    }
                    now
                }
                () = sleep_until(session.silent_at()) => return Err(SessionError::Silent),
                // The controller ends the stream with the leaf that opened it; this is before.
                () = self.own.renewed.notified() => return Err(SessionError::Renewed),
                () = at(session.again_at()) => session.last_notice(),
                () = miss(&mut seen, last_miss, session.head(), &self.shared) => {
                    last_miss = Some(Instant::now());
                    Instant::now()
                }
                () = at(session.ack_at()) => {
                    if let Some(Ack { applied, took, error }) = session.take_ack() {
                        self.acknowledge(&mut discovery, &mut session, Some(&applied), took, error).await?;
                    }
                    continue;
                }
                () = at(self.canary.say_at()) => {
                    let totals = self.shared.tally.totals();
                    if self.canary.has_news(totals, Instant::now()) {
                        self.testify(&mut discovery).await?;
                    }
                    continue;
                }
                snapshot = kept(&mut self.keeper, session.unkept()) => {
                    let took = session.last_notice().elapsed();
                    self.acknowledge(&mut discovery, &mut session, Some(&snapshot), took, String::new()).await?;
                    session.kept();
                    continue;
                }
            };
            session.pulling();
            match self.pull(&mut discovery, since, &mut session).await {
                Ok(()) => {
                    self.backoff.reset();
                    // A peer that claims more than there is shall not hide what others say later.
                    let applied = self.shared.snapshot().map(|snapshot| snapshot.version);
                    self.shared.seen.send_replace(applied.unwrap_or_default());
                }
                Err(SessionError::Call(error @ (CallError::Overloaded(_) | CallError::Unavailable(_)))) => {
                    let wait = self.backoff.next(&mut self.rng);
                    tracing::debug!(%error, ?wait, "pulling again later");
                    session.ask_again(Instant::now() + wait);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Makes the instance known. False if nothing is recorded now, because the log was rewound.
    async fn register_if_recorded(&self, channel: &Channel) -> Result<bool, SessionError> {
        match self.register(channel).await {
            Ok(()) => Ok(true),
            Err(SessionError::Call(error)) if error.is_rewound() => {
                tracing::warn!(%error, "not registered yet");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes the instance known.
    async fn register(&self, channel: &Channel) -> Result<(), SessionError> {
        if self.shared.draining() {
            // It is leaving; it only wants to know what changes meanwhile.
            return Ok(());
        }
        // With every service, single ones are in it already, and naming them as well is refused.
        let named = self.config.upstreams.iter().filter(|_| !self.config.all_upstreams);
        // What was added stays: connections that go there shall not end because the sidecar was restarted.
        let snapshot = self.shared.snapshot();
        let is_added = |service: &ServiceName| {
            snapshot.as_ref().is_some_and(|snapshot| snapshot.endpoints.contains_key(service))
        };
        let added = self.config.on_demand.iter().filter(|upstream| is_added(&upstream.service));
        let upstreams: BTreeSet<&ServiceName> =
            named.chain(added).map(|upstream| &upstream.service).collect();
        let request = v1::RegisterInstanceRequest {
            meta: Some(command("the sidecar connects")),
            expected: None,
            registration: Some(v1::RegisterInstance {
                instance: self.config.instance.to_string(),
                address: self.advertised.ip().to_string(),
                port: self.advertised.port().into(),
                upstreams: upstreams.into_iter().map(ToString::to_string).collect(),
                all_upstreams: self.config.all_upstreams,
                metadata: self.config.metadata.clone().into_iter().collect(),
            }),
        };
        let mut mesh = MeshClient::new(channel.clone());
        answer(mesh.register_instance(request)).await?;
        Ok(())
    }

    /// Makes the channel the one that everybody uses.
    fn open_session(&self, channel: &Channel) {
        self.sessions.send_modify(|session| {
            let number = session.as_ref().map_or(1, |session| session.number + 1);
            *session = Some(Session { channel: channel.clone(), number });
        });
    }

    /// Takes what a notice brings. Whether something is missed after that, and is to be pulled.
    async fn misses(&mut self, notice: &v1::Notice, session: &mut follow::Session) -> bool {
        let since = Instant::now();
        let wanted = notice.wanted.as_ref().and_then(|wanted| wanted.version.as_ref()).map(take::version);
        self.status.notice(wanted, session.head());
        match self.following(|follower| session.hear(notice, follower)) {
            Heard::Nothing => false,
            Heard::Current => {
                self.backoff.reset();
                false
            }
            Heard::Older(wanted) => {
                // Not an error of this notice only: say it, keep what is newer.
                let error = format!("a controller announces {wanted}, older than what is applied; not taken");
                self.status.set_refused(Some(error));
                false
            }
            Heard::Patched(taken) => {
                self.apply(taken, since, session).await;
                self.backoff.reset();
                false
            }
            Heard::Missed { misfit } => {
                if let Some(refusal) = misfit {
                    tracing::warn!(error = %Chain(&refusal), "the patch does not fit; pulling");
                }
                true
            }
        }
    }

    fn evidence(&mut self) -> Option<v1::Evidence> {
        self.canary.evidence(self.shared.tally.totals(), Instant::now())
    }

    /// Says what this canary met with, and nothing else.
    async fn testify(&mut self, discovery: &mut DiscoveryClient<Channel>) -> Result<(), SessionError> {
        let applied = self.shared.snapshot().map(|snapshot| take::header(&snapshot));
        let evidence = self.evidence();
        let ack = v1::AckRequest { applied, evidence, evidence_only: true, ..v1::AckRequest::default() };
        answer(discovery.ack(ack)).await?;
        Ok(())
    }

    /// Says what is in force, and what it met with if this sidecar is a canary.
    async fn acknowledge(
        &mut self,
        discovery: &mut DiscoveryClient<Channel>,
        session: &mut follow::Session,
        applied: Option<&Snapshot>,
        took: Duration,
        error: String,
    ) -> Result<(), SessionError> {
        let ack = session.acknowledge(applied, took, error, Instant::now());
        answer(discovery.ack(v1::AckRequest { evidence: self.evidence(), ..ack })).await?;
        Ok(())
    }

    /// Decides something about this sidecar as it is.
    fn following<T>(&self, decide: impl FnOnce(Follower<'_>) -> T) -> T {
        let (current, identity) = (self.shared.snapshot(), self.own.tls.current());
        let trust_domain = &identity.spiffe_id().trust_domain;
        decide(Follower { own: &self.config.instance, trust_domain, current: current.as_deref() })
    }

    /// Gets what is missed: the difference, or everything if that does not fit together.
    async fn pull(
        &mut self,
        discovery: &mut DiscoveryClient<Channel>,
        since: Instant,
        session: &mut follow::Session,
    ) -> Result<(), SessionError> {
        let mut pulled = self.pull_once(discovery, Ask::Difference).await?;
        if let Pulled::Unknown = pulled {
            pulled = self.pull_once(discovery, Ask::Lacking).await?;
        }
        if let Pulled::Misfit(refusal) = pulled {
            tracing::warn!(error = %Chain(&refusal), "the difference does not fit; pulling everything");
            pulled = self.pull_once(discovery, Ask::Everything).await?;
        }
        match pulled {
            // Unknown: only what was asked first is answered so.
            Pulled::Current | Pulled::Unknown => Ok(()),
            Pulled::Taken(taken) => {
                self.apply(taken, since, session).await;
                Ok(())
            }
            Pulled::Misfit(refusal) | Pulled::Refused(refusal) => {
                let error = Chain(&refusal).to_string();
                metrics::config_refused();
                tracing::error!(error, "snapshot refused; the one in use stays");
                self.status.set_refused(Some(error.clone()));
                let current = self.shared.snapshot();
                self.acknowledge(discovery, session, current.as_deref(), since.elapsed(), error).await
            }
        }
    }

    async fn pull_once(
        &self,
        discovery: &mut DiscoveryClient<Channel>,
        ask: Ask,
    ) -> Result<Pulled, SessionError> {
        let request = ask.request(self.shared.snapshot().as_deref());
        let pulled = answer(discovery.pull(request)).await?;
        Ok(self.following(|follower| ask.answered(&pulled, follower)))
    }

    /// Puts a snapshot in force, and has it acked; with why, if it is not on disk.
    async fn apply(&mut self, taken: Taken, since: Instant, session: &mut follow::Session) {
        let answer = self.keeper.keep(taken.snapshot()).await;
        let kept = taken.kept(answer);
        let snapshot = Arc::clone(kept.snapshot());
        // Before, so that what it cuts counts.
        let (totals, live) = (self.shared.tally.totals(), self.shared.tally.live());
        self.canary.swapped(snapshot.version, totals, live);
        let Rechecked { cut, spared } = self.shared.install(Arc::clone(&snapshot));
        let (swapped_at, took) = (Instant::now(), since.elapsed());
        metrics::config("applied", snapshot.version);
        self.status.set_refused(None);
        tracing::info!(version = %snapshot.version, cut, spared, ?took, "snapshot applied");
        self.own.trust(&snapshot.trust).await;
        session.applied(kept, took, swapped_at, self.rng.random_range(0.0..=1.0));
    }
}

/// Waits until then; for ever if there is no time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Waits until what was acked as not on disk is there.
async fn kept(keeper: &mut Keeper, unkept: Option<&Arc<Snapshot>>) -> Arc<Snapshot> {
    match unkept {
        Some(snapshot) => {
            keeper.kept(snapshot.version).await;
            Arc::clone(snapshot)
        }
        None => std::future::pending().await,
    }
}

/// Waits until a peer runs something newer than this sidecar and its controller know.
async fn miss(
    seen: &mut watch::Receiver<ConfigVersion>,
    last: Option<Instant>,
    head: Option<ConfigVersion>,
    shared: &Shared,
) {
    loop {
        if let Some(last) = last {
            sleep_until(last + MISS_INTERVAL).await;
        }
        if seen.changed().await.is_err() {
            return std::future::pending().await;
        }
        let newest = *seen.borrow_and_update();
        let ours = shared.snapshot().map(|snapshot| snapshot.version);
        if follow::Session::is_news(head, newest, ours) {
            return;
        }
    }
}

/// Says that the configuration may be stale, whenever a notice is overdue.
async fn watch_staleness(mut due: watch::Receiver<Instant>, status: Arc<Status>) {
    loop {
        let at = *due.borrow_and_update();
        tokio::select! {
            () = sleep_until(at) => {
                status.set_stale(clock::now());
                if due.changed().await.is_err() {
                    return;
                }
            }
            changed = due.changed() => if changed.is_err() { return },
        }
    }
}
