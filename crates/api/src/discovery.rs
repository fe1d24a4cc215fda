//! The Discovery service: notices, pulls, acknowledgements.
//!
//! A subscriber has no queue: its stream watches its class's newest publication, and whatever came between is skipped. A notice
//! is sent when the caller's own snapshot changed, else only as a heartbeat. It brings what changed since the caller was
//! last told, if that is little; a caller that does not have that snapshot after all finds that it does not fit, and pulls. Nothing
//! is handed out that a projector has not committed: wanted versions and shards come from [`View::published`](weft_projector::View::published).
//!
//! A caller that has more than the whole log is told that the log lost its end, and gets nothing older (I4); a caller that is
//! only ahead of *this* controller is asked to come again. What a caller says of itself proves nothing; the witness that it
//! shows does, and is a finding ([`witness`](crate::witness)).

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use weft_eventlog::Point;
use weft_model::{ConfigVersion, InstanceId};
use weft_projector::{Patch, View};
use weft_proto::v1 as pb;
use weft_proto::v1::discovery_server;
use weft_routing::Hash;

use crate::Context;
use crate::acks::{Acks, Connected};
use crate::caller::Caller;
use crate::convert::{self, config_version};
use crate::pull::{self, header};
use crate::status::ApiError;
use crate::witness::Witnesses;

/// When the next notice comes at the latest. Two missed ones tell a sidecar within ten seconds that it is on its own.
pub const HEARTBEAT: Duration = Duration::from_secs(5);
/// How long a witness of what was told may be late: as long as a sidecar may take to write it down. A notice of a change goes
/// without, since it would be twice as long.
const WITNESS_WITHIN: Duration = Duration::from_secs(1);
/// Full snapshots that are put together at once; a reconnecting fleet with known manifests needs none.
const FULL_PULLS_MAX: usize = 64;
/// How long a pull waits for a registration to be published. With a leader that takes milliseconds; without one, the
/// next comes after a lease at most.
const PUBLISH_WAIT_MAX: Duration = Duration::from_secs(2);
/// Advice to a full pull that found no place.
const FULL_PULL_RETRY_MS: u64 = 100;
/// Advice to a sidecar whose earlier streams have not ended yet: a dead connection is noticed within twenty seconds.
const STREAMS_RETRY_MS: u64 = 5_000;

/// See the module's documentation.
pub struct Discovery {
    context: Context,
    full_pulls: Arc<Semaphore>,
}

impl Discovery {
    pub(crate) fn new(context: Context) -> Self {
        Self { context, full_pulls: Arc::new(Semaphore::new(FULL_PULLS_MAX)) }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ApiError> {
        let caller = Caller::of(request.extensions(), (self.context.clock)())?;
        caller.sidecar()?;
        Ok(caller)
    }

    /// Checks that the caller has nothing that the log does not have.
    async fn check_not_rewound(
        &self,
        instance: &InstanceId,
        have: Option<ConfigVersion>,
    ) -> Result<(), ApiError> {
        let Some(have) = have else { return Ok(()) };
        if have <= self.context.view.read(weft_routing::Projection::version) {
            return Ok(());
        }
        let head = self.context.reader.head().await?;
        if have.epoch > head.epoch || (have.epoch == head.epoch && have.position > head.position) {
            tracing::error!(%instance, %have, epoch = %head.epoch, head = %head.position,
                "LOG_REWOUND: a sidecar runs a version that is not in the log");
            metrics::counter!("weft_api_log_rewound_total").increment(1);
            let head = ConfigVersion::new(head.epoch, head.position);
            return Err(ApiError::Rewound(format!(
                "LOG_REWOUND: you run {have}, but the log ends at {head}; an operator must restore the lost events"
            )));
        }
        Ok(())
    }

    /// Who has just registered need not poll: its first snapshot is a commit away.
    async fn wait_until_published(&self, instance: &InstanceId) -> Result<(), ApiError> {
        let view = &self.context.view;
        if view.published(|published| published.wanted(instance).is_some()) {
            return Ok(());
        }
        let registered = view.read(|projection| Some(projection.wanted(instance)?.version));
        let version = registered.ok_or_else(|| not_registered(instance))?;
        let mut publications = view.publications();
        let published = publications.wait_for(|published| *published >= version);
        match tokio::time::timeout(PUBLISH_WAIT_MAX, published).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(ApiError::Unavailable("nothing is published now; try again".into())),
        }
    }

    async fn pull(&self, request: Request<pb::PullRequest>) -> Result<Response<pb::PullResponse>, ApiError> {
        let caller = self.caller(&request)?;
        let instance = caller.sidecar()?;
        let have = convert::header("have", request.into_inner().have)?;
        self.check_not_rewound(instance, have.map(|have| have.0)).await?;
        self.wait_until_published(instance).await?;
        let plan = pull::plan(&self.context.view, instance, have.map(|have| have.1))?;
        let plan = plan.ok_or_else(|| not_registered(instance))?;
        if have.is_some_and(|(version, _)| version > plan.version) {
            return Err(ApiError::Unavailable("this controller is behind what you run; try again".into()));
        }
        let kind = if plan.full { "full" } else { "difference" };
        metrics::counter!("weft_api_pulls_total", "kind" => kind).increment(1);
        let _place = if plan.full {
            let place = self.full_pulls.try_acquire();
            Some(place.map_err(|_| ApiError::Overloaded { retry_after_ms: FULL_PULL_RETRY_MS })?)
        } else {
            None
        };
        Ok(Response::new(plan.into_response()?))
    }
}

fn not_registered(instance: &InstanceId) -> ApiError {
    ApiError::NotFound(format!("{instance} is not registered; register it, then pull again"))
}

/// One subscriber's stream.
struct Subscription {
    view: View,
    witnesses: Arc<Witnesses>,
    acks: Arc<Acks>,
    /// Of the caller's class; of everything, until the caller takes part.
    feed: watch::Receiver<ConfigVersion>,
    instance: InstanceId,
    drain: CancellationToken,
    /// When the leaf that this stream came with ends, and the stream with it.
    ends: Instant,
    next_heartbeat: Instant,
    /// What the caller was last told to run; at first, what it says it runs.
    told: Option<(ConfigVersion, Hash)>,
    _connected: Connected,
}

/// What is published for a subscriber.
struct Seen {
    head: ConfigVersion,
    point: Option<Point>,
    wanted: Option<(ConfigVersion, Hash)>,
    patch: Option<Arc<Patch>>,
}

impl Subscription {
    /// Waits until there is something to say. None when the stream is to end.
    async fn next(&mut self) -> Option<pb::Notice> {
        loop {
            // Before it is looked at: what comes meanwhile is looked at again.
            self.feed.mark_unchanged();
            let seen = self.look();
            let now = Instant::now();
            if now >= self.next_heartbeat {
                self.told = seen.wanted;
                self.next_heartbeat = now + HEARTBEAT;
                let witness = seen.point.and_then(|point| self.witnesses.sign(point));
                return Some(self.notice(&seen, witness.unwrap_or_default()));
            }
            if self.told != seen.wanted {
                self.told = seen.wanted;
                self.next_heartbeat = self.next_heartbeat.min(now + WITNESS_WITHIN);
                return Some(self.notice(&seen, Bytes::new()));
            }
            tokio::select! {
                () = self.drain.cancelled() => return None,
                () = sleep_until(self.ends) => return None,
                () = sleep_until(self.next_heartbeat) => {}
                changed = self.feed.changed() => if changed.is_err() {
                    // The class has no members any more, hence not the caller; or the controller is ending.
                    self.feed = self.view.publications();
                }
            }
        }
    }

    fn look(&mut self) -> Seen {
        let (seen, feed) = self.view.published(|published| {
            let wanted = published.wanted(&self.instance);
            let news = wanted.as_ref().map(|wanted| (wanted.version, wanted.class.hash));
            let base = self.told.filter(|_| self.told != news).map(|(_, hash)| hash);
            let patch = wanted.zip(base).and_then(|(wanted, base)| published.patch(wanted.class, base));
            let seen = Seen { head: published.version(), point: published.point(), wanted: news, patch };
            let feed = published.feed(&self.instance).filter(|feed| !feed.same_channel(&self.feed));
            (seen, feed)
        });
        if let Some(feed) = feed {
            self.feed = feed;
        }
        seen
    }

    fn notice(&self, seen: &Seen, witness: Bytes) -> pb::Notice {
        pb::Notice {
            wanted: seen.wanted.map(|(version, hash)| header(version, hash)),
            head: Some(config_version(seen.head)),
            heartbeat_ms: u32::try_from(HEARTBEAT.as_millis()).unwrap_or(u32::MAX),
            witness,
            patch: seen.patch.as_deref().map(pull::patch),
            ack_spread_ms: u32::try_from(self.acks.spread().as_millis()).unwrap_or(u32::MAX),
        }
    }
}

#[tonic::async_trait]
impl discovery_server::Discovery for Discovery {
    type SubscribeStream = BoxStream<'static, Result<pb::Notice, Status>>;

    async fn subscribe(
        &self,
        request: Request<pb::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let caller = self.caller(&request)?;
        let instance = caller.sidecar()?;
        let pb::SubscribeRequest { have, witness } = request.into_inner();
        let have = convert::header("have", have)?;
        self.context.witnesses.check(&witness, &format!("sidecar {instance}")).await?;
        self.check_not_rewound(instance, have.map(|have| have.0)).await?;
        let connected = self.context.acks.connect(instance, have);
        let retry_after_ms = STREAMS_RETRY_MS;
        let connected = connected.ok_or(ApiError::Overloaded { retry_after_ms })?;
        let view = self.context.view.clone();
        let subscription = Subscription {
            feed: view.publications(),
            view,
            witnesses: Arc::clone(&self.context.witnesses),
            acks: Arc::clone(&self.context.acks),
            instance: instance.clone(),
            drain: self.context.drain.clone(),
            ends: caller.ends((self.context.clock)()),
            // The first notice comes at once.
            next_heartbeat: Instant::now(),
            told: have,
            _connected: connected,
        };
        let notices = stream::unfold(subscription, |mut subscription| async move {
            let notice = subscription.next().await?;
            Some((Ok(notice), subscription))
        });
        Ok(Response::new(notices.boxed()))
    }

    async fn pull(&self, request: Request<pb::PullRequest>) -> Result<Response<pb::PullResponse>, Status> {
        Ok(Self::pull(self, request).await?)
    }

    async fn ack(&self, request: Request<pb::AckRequest>) -> Result<Response<pb::AckResponse>, Status> {
        let caller = self.caller(&request)?;
        let instance = caller.sidecar()?;
        let pb::AckRequest { applied, took_ms, error } = request.into_inner();
        let applied = convert::header("applied", applied)?;
        let result = if error.is_empty() { "applied" } else { "refused" };
        metrics::counter!("weft_api_acks_total", "result" => result).increment(1);
        if !error.is_empty() {
            tracing::warn!(%instance, error = %error.escape_debug(), "a sidecar refused its snapshot");
        }
        // Somebody without a stream is remembered too, but only if it takes part: that bounds what is kept.
        if self.context.view.published(|published| published.wanted(instance).is_some()) {
            self.context.acks.record(instance, applied, took_ms, &error);
        }
        Ok(Response::new(pb::AckResponse {}))
    }
}
