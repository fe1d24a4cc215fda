//! What a simulated sidecar does all its life: subscribe, take the patch in a notice or pull what is missed, say so.

use prost::Message;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};
use weft_client::follow::Ask;
use weft_client::take::{self, Refusal};
use weft_client::{Backoff, CallError, Introduced};
use weft_model::{Chain, ConfigVersion, TrustDomain};
use weft_proto::v1;
use weft_proto::v1::discovery_client::DiscoveryClient;
use weft_routing::Snapshot;

use crate::Shared;
use crate::error::FleetError;
use crate::line::Session;
use crate::member::Member;

/// What frames a message: five bytes of gRPC, nine of HTTP/2.
const FRAME_BYTES: usize = 5 + 9;
/// Largest answer to a pull, as real sidecars take it.
const PULL_BYTES_MAX: usize = 256 << 20;

/// What an acknowledgement tells at most.
const SWAPS_MAX: usize = 32;

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

struct Follower {
    shared: Arc<Shared>,
    member: Arc<Member>,
    trust_domain: TrustDomain,
    current: Option<Arc<Snapshot>>,
    rng: SmallRng,
    backoff: Backoff,
    /// The newest thing to acknowledge, when, and how long it took.
    due: Option<(Instant, Duration)>,
    /// What was put in force since the last acknowledgement, oldest first.
    swaps: VecDeque<(ConfigVersion, Instant)>,
    /// Whether this session counts among those that are back.
    counted: bool,
}

/// Follows until the task is aborted.
pub(crate) async fn follow(shared: Arc<Shared>, member: Arc<Member>) {
    let trust_domain = shared.mesh.operator.current().spiffe_id().trust_domain.clone();
    let rng = SmallRng::seed_from_u64(u64::try_from(member.index).unwrap_or_default());
    let mut follower = Follower {
        shared,
        member,
        trust_domain,
        current: None,
        rng,
        backoff: Backoff::new(),
        due: None,
        swaps: VecDeque::new(),
        counted: false,
    };
    let mut broken = None;
    loop {
        let end = follower.session(&mut broken).await;
        follower.member.hang_up();
        if let End::Fault(fault) = end {
            follower.count(|shared| &shared.counters.faults, 1);
            follower.uncount();
            let mut last = follower.shared.last_fault.lock().unwrap_or_else(PoisonError::into_inner);
            *last = Some(fault);
        }
        follower.counted = false;
        let wait = follower.backoff.next(&mut follower.rng);
        sleep(wait).await;
    }
}

impl Follower {
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
            Err(end) = self.listen(session.channel) => end,
            _ = cut.changed() => End::Cut,
        }
    }

    async fn listen(&mut self, channel: Introduced) -> Result<std::convert::Infallible, End> {
        let mut discovery = DiscoveryClient::new(channel).max_decoding_message_size(PULL_BYTES_MAX);
        let have = self.current.as_deref().map(take::header);
        let request = v1::SubscribeRequest { have, ..v1::SubscribeRequest::default() };
        let mut notices = discovery.subscribe(request).await?.into_inner();
        let mut again: Option<Instant> = None;
        loop {
            let pull = tokio::select! {
                biased;
                notice = notices.message() => {
                    let notice = notice?.ok_or_else(|| End::Fault("the controller ended the stream".into()))?;
                    let missed = self.hear(&notice)?;
                    missed && again.is_none()
                }
                () = at(self.due.map(|(at, _)| at)) => {
                    self.ack(&mut discovery).await?;
                    false
                }
                () = at(again) => true,
            };
            if pull {
                again = match self.pull(&mut discovery).await {
                    Ok(()) => None,
                    Err(CallError::Overloaded(_) | CallError::Unavailable(_)) => {
                        Some(Instant::now() + self.backoff.next(&mut self.rng))
                    }
                    Err(error) => return Err(error.into()),
                };
            }
        }
    }

    /// Takes a notice in. True if something is to be pulled.
    fn hear(&mut self, notice: &v1::Notice) -> Result<bool, End> {
        let Some(wanted) = notice.wanted.as_ref().and_then(|wanted| wanted.version.as_ref()) else {
            return Ok(false);
        };
        let wanted = take::version(wanted);
        let spread = Duration::from_millis(notice.ack_spread_ms.into());
        let Some(current) = self.current.clone() else { return Ok(true) };
        if wanted == current.version {
            self.is_back();
            return Ok(false);
        }
        if wanted < current.version {
            return Err(End::Fault(format!(
                "a controller announces {wanted}, older than {}",
                current.version
            )));
        }
        self.count(|shared| &shared.counters.notices, 1);
        self.count(|shared| &shared.counters.notice_bytes, notice.encoded_len() + FRAME_BYTES);
        let began = Instant::now();
        let snapshots = &self.shared.snapshots;
        match snapshots.take_patch(notice, &current, &self.member.instance, &self.trust_domain) {
            Ok(Some(snapshot)) => {
                self.count(|shared| &shared.counters.patches, 1);
                self.apply(snapshot, began, spread);
                Ok(false)
            }
            Ok(None) => Ok(true),
            Err(_) => {
                self.count(|shared| &shared.counters.refused, 1);
                Ok(true)
            }
        }
    }

    async fn pull(&mut self, discovery: &mut DiscoveryClient<Introduced>) -> Result<(), CallError> {
        let began = Instant::now();
        let mut pulled = self.ask(discovery, Ask::Difference).await?;
        if pulled.held_wanted {
            pulled = self.ask(discovery, Ask::Lacking).await?;
        } else {
            self.count(|shared| &shared.counters.full_pulls, usize::from(pulled.full));
        }
        self.count(|shared| &shared.counters.pulls, 1);
        let snapshots = &self.shared.snapshots;
        let taken = snapshots.take(&pulled, self.current.as_ref(), &self.member.instance, &self.trust_domain);
        match taken {
            Ok(Some(snapshot)) => self.apply(snapshot, began, Duration::ZERO),
            Ok(None) => self.is_back(),
            Err(Refusal::NotNewer { .. }) => {}
            Err(_) => self.count(|shared| &shared.counters.refused, 1),
        }
        Ok(())
    }

    async fn ask(
        &self,
        discovery: &mut DiscoveryClient<Introduced>,
        ask: Ask,
    ) -> Result<v1::PullResponse, CallError> {
        let pulled = discovery.pull(ask.request(self.current.as_deref())).await?.into_inner();
        self.count(|shared| &shared.counters.pull_bytes, pulled.encoded_len() + FRAME_BYTES);
        Ok(pulled)
    }

    fn apply(&mut self, snapshot: Arc<Snapshot>, began: Instant, spread: Duration) {
        let version = snapshot.version;
        self.current = Some(snapshot);
        self.shared.tracker.applied(&self.member, version.position.0);
        self.is_back();
        let now = Instant::now();
        self.swaps.push_back((version, now));
        if self.swaps.len() > SWAPS_MAX {
            self.swaps.pop_front();
        }
        let held_back = spread.mul_f64(self.rng.random_range(0.0..=1.0));
        self.due = Some((now + held_back, now - began));
    }

    async fn ack(&mut self, discovery: &mut DiscoveryClient<Introduced>) -> Result<(), CallError> {
        let Some((_, took)) = self.due.take() else { return Ok(()) };
        let swap = |(version, at): (ConfigVersion, Instant)| v1::Swap {
            version: Some(v1::ConfigVersion { epoch: version.epoch.0, position: version.position.0 }),
            ago_us: u64::try_from(at.elapsed().as_micros()).unwrap_or(u64::MAX),
        };
        let request = v1::AckRequest {
            swaps: self.swaps.drain(..).map(swap).collect(),
            applied: self.current.as_deref().map(take::header),
            took_ms: u32::try_from(took.as_millis()).unwrap_or(u32::MAX),
            ..v1::AckRequest::default()
        };
        discovery.ack(request).await?;
        self.count(|shared| &shared.counters.acks, 1);
        Ok(())
    }
}

/// Waits until then; for ever if there is no time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
