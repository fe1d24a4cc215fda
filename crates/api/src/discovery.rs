//! The Discovery service: notices, pulls, acknowledgements.
//!
//! A subscriber has no queue: its stream watches its class's newest publication, and whatever came between is skipped. It is told
//! nothing while its connection does not take what it was told before ([`outlet`](crate::outlet)). What it is
//! told and when is decided in [`telling`](crate::telling), and what a pull brings in [`pull`](crate::pull). Nothing
//! is handed out that a projector has not committed: wanted versions and shards come from [`View::published`](weft_projector::View::published).
//!
//! A caller that has more than the whole log is told that the log lost its end, and gets nothing older (I4); a caller that is
//! only ahead of *this* controller is asked to come again. What a caller says of itself proves nothing; the witness that it
//! shows does, and is a finding ([`witness`](crate::witness)).

use futures_util::stream::{self, BoxStream, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use weft_model::{ConfigVersion, InstanceId};
use weft_projector::View;
use weft_proto::v1 as pb;
use weft_proto::v1::discovery_server;

use crate::Context;
use crate::acks::{Acks, Connected, Said};
use crate::caller::{Caller, Peer};
use crate::convert;
use crate::outlet::Outlet;
use crate::pull;
use crate::rollouts::Word;
use crate::status::ApiError;
use crate::telling::Telling;
use crate::witness::Witnesses;

/// Whole manifests that are put together at once, with all shards or with those that a caller lacks; a reconnecting fleet with known
/// manifests needs none.
const FULL_PULLS_MAX: usize = 64;
/// How long a pull waits for a registration to be published. With a leader that takes milliseconds; without one, the
/// next comes after a lease at most.
const PUBLISH_WAIT_MAX: Duration = Duration::from_secs(2);
/// How far apart streams end when this controller shuts down: what greeting one costs another controller.
const LEAVE_EVERY: Duration = Duration::from_micros(500);
/// Over how long they end at most: within the time that a controller gives requests under way.
const LEAVE_MAX: Duration = Duration::from_secs(3);
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
        let head = ConfigVersion::new(head.epoch, head.position);
        if pull::is_beyond(have, head) {
            tracing::error!(%instance, %have, %head, "LOG_REWOUND: a sidecar runs a version that is not in the log");
            metrics::counter!("weft_api_log_rewound_total").increment(1);
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
        let version = registered.ok_or_else(|| pull::not_registered(instance))?;
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
        let pb::PullRequest { have, held } = request.into_inner();
        let have = convert::header("have", have)?;
        self.check_not_rewound(instance, have.map(|have| have.0)).await?;
        self.wait_until_published(instance).await?;
        let plan = self.context.view.published(|published| pull::plan(published, instance, have, &held))?;
        metrics::counter!("weft_api_pulls_total", "kind" => plan.against.name()).increment(1);
        let _place = if plan.against.is_whole() {
            let place = self.full_pulls.try_acquire();
            Some(place.map_err(|_| ApiError::Overloaded { retry_after_ms: FULL_PULL_RETRY_MS })?)
        } else {
            None
        };
        Ok(Response::new(plan.into_response()?))
    }
}

/// One subscriber's stream.
struct Subscription {
    view: View,
    witnesses: Arc<Witnesses>,
    acks: Arc<Acks>,
    /// Of the caller's class; of everything, until the caller takes part.
    feed: watch::Receiver<ConfigVersion>,
    telling: Telling,
    outlet: Outlet,
    drain: CancellationToken,
    /// Whether this controller is shutting down, and `ends` is this stream's turn.
    leaving: bool,
    /// When the leaf that this stream came with ends, and the stream with it.
    ends: Instant,
    _connected: Connected,
}

impl Subscription {
    /// Waits until there is something to say. None when the stream is to end.
    async fn next(&mut self) -> Option<pb::Notice> {
        loop {
            // A reader that does not keep up misses what comes between, heartbeats too, and nothing piles up for it.
            tokio::select! {
                biased;
                () = self.outlet.open() => {}
                () = self.drain.cancelled() => return None,
                () = sleep_until(self.ends) => return None,
            }
            // Before it is looked at: what comes meanwhile is looked at again.
            self.feed.mark_unchanged();
            let (news, feed) = self.view.published(|published| {
                let news = self.telling.next(published, Instant::now(), self.acks.spread());
                let feed = published.feed(self.telling.instance());
                (news, feed.filter(|feed| !feed.same_channel(&self.feed)))
            });
            if let Some(feed) = feed {
                self.feed = feed;
            }
            if let Some(news) = news {
                let witness = news.witness.and_then(|point| self.witnesses.sign(point));
                return Some(news.notice(witness.unwrap_or_default(), self.acks.spread()));
            }
            tokio::select! {
                () = self.drain.cancelled(), if !self.leaving => {
                    self.leaving = true;
                    self.ends = self.ends.min(Instant::now() + self.turn());
                }
                () = sleep_until(self.ends) => return None,
                () = sleep_until(self.telling.next_heartbeat()) => {}
                changed = self.feed.changed() => if changed.is_err() {
                    // The class has no members any more, hence not the caller; or the controller is ending.
                    self.feed = self.view.publications();
                }
            }
        }
    }

    /// How long this stream goes on when the controller shuts down. Its caller goes to another controller then, which should not have
    /// to greet all of them at once.
    fn turn(&self) -> Duration {
        let streams = u32::try_from(self.acks.streams()).unwrap_or(u32::MAX);
        self.telling.turn(LEAVE_EVERY.saturating_mul(streams).min(LEAVE_MAX))
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
        let outlet = request.extensions().get::<Peer>().map(|peer| peer.outlet.clone());
        let pb::SubscribeRequest { have, witness } = request.into_inner();
        let have = convert::header("have", have)?;
        self.context.witnesses.check(&witness, &format!("sidecar {instance}")).await?;
        self.check_not_rewound(instance, have.map(|have| have.0)).await?;
        let word = Word { applied: have.map(|have| have.0), ..Word::default() };
        self.context.rollouts.hear(&self.context.view, instance, &word);
        let connected = self.context.acks.connect(instance, have);
        let retry_after_ms = STREAMS_RETRY_MS;
        let connected = connected.ok_or(ApiError::Overloaded { retry_after_ms })?;
        let view = self.context.view.clone();
        let subscription = Subscription {
            feed: view.publications(),
            view,
            witnesses: Arc::clone(&self.context.witnesses),
            acks: Arc::clone(&self.context.acks),
            telling: Telling::new(instance.clone(), have, Instant::now()),
            outlet: outlet.unwrap_or_default(),
            drain: self.context.drain.clone(),
            leaving: false,
            ends: caller.ends((self.context.clock)()),
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
        let pb::AckRequest { applied, took_ms, error, swaps, evidence, evidence_only } = request.into_inner();
        let applied = convert::header("applied", applied)?;
        let swaps = convert::swaps(swaps)?;
        let word = Word {
            applied: applied.map(|applied| applied.0),
            error: &error,
            evidence: evidence.map(convert::evidence),
        };
        self.context.rollouts.hear(&self.context.view, instance, &word);
        if evidence_only {
            return Ok(Response::new(pb::AckResponse {}));
        }
        let result = if error.is_empty() { "applied" } else { "refused" };
        metrics::counter!("weft_api_acks_total", "result" => result).increment(1);
        if !error.is_empty() {
            tracing::warn!(%instance, error = %error.escape_debug(), "a sidecar refused its snapshot");
        }
        // Somebody without a stream is remembered too, but only if it takes part: that bounds what is kept.
        let wanted = self.context.view.published(|published| Some(published.wanted(instance)?.named()));
        if let (Some(wanted), Some(applied)) = (wanted, applied)
            && wanted.0 == applied.0
            && wanted.1 != applied.1
        {
            metrics::counter!("weft_api_acks_total", "result" => "other_content").increment(1);
            tracing::error!(%instance, version = %wanted.0, published = %wanted.1, runs = %applied.1,
                "a sidecar runs other content than was published at its version; restart it");
        }
        if wanted.is_some() {
            self.context.acks.record(instance, Said { applied, took_ms, error, swaps });
        }
        Ok(Response::new(pb::AckResponse {}))
    }
}
