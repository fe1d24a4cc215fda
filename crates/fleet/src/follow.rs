//! What a simulated sidecar does all its life: subscribe, take the patch in a notice or pull what is missed, say so. It decides
//! with the machine that real ones decide with ([`weft_client::follow`]); but it never gives a controller up for being silent, which on
//! a machine that plays ten thousand is no sign of anything.

use prost::Message;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};
use weft_client::follow::{self, Ack, Ask, Follower, Heard, Pulled, Taken};
use weft_client::take::{self, Refusal};
use weft_client::{Backoff, CallError, Introduced};
use weft_model::{Chain, TrustDomain};
use weft_proto::v1;
use weft_proto::v1::discovery_client::DiscoveryClient;
use weft_routing::Snapshot;

use crate::Shared;
use crate::error::FleetError;
use crate::line::Session;
use crate::member::Member;

/// What frames a message: five bytes of gRPC, nine of HTTP/2.
const FRAME_BYTES: usize = 5 + 9;

/// When one that is to be slow begins with it the first time, after it has what it came for: not all of them at once. Later on, at once.
const SETTLES_WITHIN: Duration = Duration::from_secs(20);

/// Why a session ended.
enum End {
    /// All connections were to be cut.
    Cut,
    Fault(String),
}

impl From<CallError> for End {
    fn from(error: CallError) -> Self {
        Self::Fault(error.to_string())
    }
}

impl From<tonic::Status> for End {
    fn from(status: tonic::Status) -> Self {
        CallError::from(status).into()
    }
}

impl From<FleetError> for End {
    fn from(error: FleetError) -> Self {
        Self::Fault(Chain(&error).to_string())
    }
}

struct Sidecar {
    shared: Arc<Shared>,
    member: Arc<Member>,
    trust_domain: TrustDomain,
    current: Option<Arc<Snapshot>>,
    rng: SmallRng,
    backoff: Backoff,
    /// Whether this session counts among those that are back.
    counted: bool,
    /// Whether it was slow before, if it is to be.
    settled: bool,
}

/// Follows until the task is aborted.
pub(crate) async fn follow(shared: Arc<Shared>, member: Arc<Member>) {
    let trust_domain = shared.mesh.operator.current().spiffe_id().trust_domain.clone();
    let rng = SmallRng::seed_from_u64(u64::try_from(member.index).unwrap_or_default());
    let mut sidecar = Sidecar {
        shared,
        member,
        trust_domain,
        current: None,
        rng,
        backoff: Backoff::new(),
        counted: false,
        settled: false,
    };
    let mut broken = None;
    loop {
        let end = sidecar.session(&mut broken).await;
        sidecar.member.hang_up();
        if let End::Fault(fault) = end {
            sidecar.count(|shared| &shared.counters.faults, 1);
            sidecar.uncount();
            let mut last = sidecar.shared.last_fault.lock().unwrap_or_else(PoisonError::into_inner);
            *last = Some(fault);
        }
        sidecar.counted = false;
        let wait = sidecar.backoff.next(&mut sidecar.rng);
        sleep(wait).await;
    }
}

impl Sidecar {
    fn count(&self, counter: impl FnOnce(&Shared) -> &AtomicU64, by: usize) {
        counter(&self.shared).fetch_add(u64::try_from(by).unwrap_or_default(), Ordering::Relaxed);
    }

    /// A session that had counted broke on its own.
    fn uncount(&mut self) {
        if self.counted {
            self.shared.subscribed.send_modify(|subscribed| *subscribed = subscribed.saturating_sub(1));
        }
    }

    /// This sidecar is there and at the newest version.
    fn is_back(&mut self) {
        if !std::mem::replace(&mut self.counted, true) {
            self.shared.subscribed.send_modify(|subscribed| *subscribed += 1);
            self.backoff.reset();
        }
    }

    async fn session(&mut self, broken: &mut Option<Session>) -> End {
        let mut cut = self.shared.cut.subscribe();
        let member = Arc::clone(&self.member);
        let session = match member.session(broken.as_ref()).await {
            Ok(session) => session,
            Err(error) => return error.into(),
        };
        *broken = Some(session.clone());
        tokio::select! {
            Err(end) = self.listen(&session) => end,
            _ = cut.changed() => End::Cut,
        }
    }

    async fn listen(&mut self, line: &Session) -> Result<std::convert::Infallible, End> {
        let mut discovery =
            DiscoveryClient::new(line.channel.clone()).max_decoding_message_size(take::PULL_BYTES_MAX);
        let have = self.current.as_deref().map(take::header);
        let request = v1::SubscribeRequest { have, ..v1::SubscribeRequest::default() };
        let mut notices = discovery.subscribe(request).await?.into_inner();
        let mut session = follow::Session::new(Instant::now());
        let mut settles = None;
        loop {
            if self.counted && settles.is_none() {
                let spread = SETTLES_WITHIN.mul_f64(self.rng.random_range(0.0..=1.0));
                settles = Some(Instant::now() + if self.settled { Duration::ZERO } else { spread });
            }
            let missed = tokio::select! {
                biased;
                notice = notices.message() => {
                    let notice = notice?.ok_or_else(|| End::Fault("the controller ended the stream".into()))?;
                    session.noticed(&notice, Instant::now());
                    let missed = self.misses(&notice, &mut session)?;
                    // A canary says with every heartbeat that nothing happened to it.
                    let says = session.rollout().is_some() && session.ack_at().is_none();
                    if let Some(current) = self.current.clone().filter(|_| says && !missed) {
                        let now = Instant::now();
                        discovery.ack(session.acknowledge(Some(&current), Duration::ZERO, String::new(), now)).await?;
                    }
                    missed
                }
                () = at(session.ack_at()) => {
                    if let Some(Ack { applied, took, error }) = session.take_ack() {
                        let ack = session.acknowledge(Some(&applied), took, error, Instant::now());
                        discovery.ack(ack).await?;
                        self.count(|shared| &shared.counters.acks, 1);
                    }
                    false
                }
                () = at(session.again_at()) => true,
                () = at(settles), if !line.is_settled() => {
                    line.settle();
                    self.settled = true;
                    false
                }
            };
            if !missed {
                continue;
            }
            session.pulling();
            match self.pull(&mut discovery, &mut session).await {
                Ok(()) => self.backoff.reset(),
                Err(CallError::Overloaded(_) | CallError::Unavailable(_)) => {
                    session.ask_again(Instant::now() + self.backoff.next(&mut self.rng));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes what a notice brings. Whether something is missed after that, and is to be pulled.
    fn misses(&mut self, notice: &v1::Notice, session: &mut follow::Session) -> Result<bool, End> {
        let began = Instant::now();
        let heard = self.following(|shared, follower| {
            session.hear_with(notice, follower, |current| {
                shared.snapshots.take_patch(notice, current, follower.own, follower.trust_domain)
            })
        });
        if matches!(heard, Heard::Patched(_) | Heard::Missed { .. }) && self.current.is_some() {
            self.count(|shared| &shared.counters.notices, 1);
            self.count(|shared| &shared.counters.notice_bytes, notice.encoded_len() + FRAME_BYTES);
        }
        match heard {
            Heard::Nothing => Ok(false),
            Heard::Current => {
                self.is_back();
                self.backoff.reset();
                Ok(false)
            }
            Heard::Older(wanted) => {
                Err(End::Fault(format!("a controller announces {wanted}, older than what is applied")))
            }
            Heard::Patched(taken) => {
                self.count(|shared| &shared.counters.patches, 1);
                self.apply(taken, began, session);
                self.backoff.reset();
                Ok(false)
            }
            Heard::Missed { misfit } => {
                self.count(|shared| &shared.counters.refused, usize::from(misfit.is_some()));
                Ok(true)
            }
        }
    }

    /// Decides something about this sidecar as it is.
    fn following<T>(&self, decide: impl FnOnce(&Shared, Follower<'_>) -> T) -> T {
        let (own, trust_domain) = (&self.member.instance, &self.trust_domain);
        decide(&self.shared, Follower { own, trust_domain, current: self.current.as_deref() })
    }

    /// Gets what is missed: the difference, or everything if that does not fit together.
    async fn pull(
        &mut self,
        discovery: &mut DiscoveryClient<Introduced>,
        session: &mut follow::Session,
    ) -> Result<(), CallError> {
        let began = Instant::now();
        let mut pulled = self.pull_once(discovery, Ask::Difference).await?;
        if let Pulled::Unknown = pulled {
            pulled = self.pull_once(discovery, Ask::Lacking).await?;
        }
        if let Pulled::Misfit(_) = pulled {
            self.count(|shared| &shared.counters.refused, 1);
            pulled = self.pull_once(discovery, Ask::Everything).await?;
        }
        self.count(|shared| &shared.counters.pulls, 1);
        match pulled {
            // Unknown: only what was asked first is answered so.
            Pulled::Current | Pulled::Unknown => self.is_back(),
            Pulled::Taken(taken) => self.apply(taken, began, session),
            Pulled::Refused(Refusal::NotNewer { .. }) => {}
            Pulled::Misfit(_) | Pulled::Refused(_) => self.count(|shared| &shared.counters.refused, 1),
        }
        Ok(())
    }

    async fn pull_once(
        &self,
        discovery: &mut DiscoveryClient<Introduced>,
        ask: Ask,
    ) -> Result<Pulled, CallError> {
        let pulled = discovery.pull(ask.request(self.current.as_deref())).await?.into_inner();
        self.count(|shared| &shared.counters.pull_bytes, pulled.encoded_len() + FRAME_BYTES);
        let whole = pulled.full && ask != Ask::Lacking;
        self.count(|shared| &shared.counters.full_pulls, usize::from(whole));
        Ok(self.following(|shared, follower| {
            ask.answered_with(&pulled, follower, || {
                shared.snapshots.take(&pulled, follower.current, follower.own, follower.trust_domain)
            })
        }))
    }

    /// Puts a snapshot in force. A simulated sidecar has no disk that could refuse it.
    fn apply(&mut self, taken: Taken, began: Instant, session: &mut follow::Session) {
        let kept = taken.kept(Ok(()));
        self.current = Some(Arc::clone(kept.snapshot()));
        self.shared.tracker.applied(&self.member, kept.snapshot().version.position.0);
        self.is_back();
        let now = Instant::now();
        session.applied(kept, now - began, now, self.rng.random_range(0.0..=1.0));
    }
}

/// Waits until then; for ever if there is no time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
