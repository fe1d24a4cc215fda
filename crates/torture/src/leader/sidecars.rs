//! Sidecars without a data plane: they register, subscribe, pull, take and acknowledge as real ones do, and remember what they were
//! told and what they took.

use anyhow::Context;
use rand::rngs::StdRng;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use weft_client::follow::{Ask, Follower, Pulled};
use weft_client::{Backoff, CallError, ControllerAddress, command, take};
use weft_identity::tls::TlsIdentity;
use weft_model::{ConfigVersion, InstanceId, TrustDomain};
use weft_proto::v1 as pb;
use weft_proto::v1::discovery_client::DiscoveryClient;
use weft_proto::v1::mesh_client::MeshClient;
use weft_routing::{Hash, Snapshot};

use crate::controllers::channel;
use crate::server::Session;

/// Longest silence of a stream: two heartbeats, and room.
const SILENCE_MAX: Duration = Duration::from_secs(12);
/// Longest wait for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// What all of them saw.
#[derive(Debug)]
pub(super) struct Seen {
    told: Mutex<Told>,
    /// The checkpoint, as it was last read.
    covered: tokio::sync::Mutex<(Session, u64)>,
    /// The newest event that anybody was told of.
    newest: watch::Sender<u64>,
}

#[derive(Debug, Default)]
pub(super) struct Told {
    /// Snapshots that were announced: for whom, version and hash.
    pub(super) snapshots: BTreeSet<(ConfigVersion, Hash, InstanceId)>,
    pub(super) notices: u64,
    pub(super) streams: u64,
    pub(super) patches: u64,
    pub(super) pulls: u64,
    pub(super) applied: BTreeMap<InstanceId, Vec<ConfigVersion>>,
    pub(super) complaints: Vec<String>,
}

impl Seen {
    /// Nothing yet. `session` is to read the checkpoint.
    pub(super) fn new(session: Session) -> Self {
        let covered = tokio::sync::Mutex::new((session, 0));
        Self { told: Mutex::default(), covered, newest: watch::Sender::new(0) }
    }

    pub(super) fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest event that anybody was told of.
    pub(super) fn newest(&self) -> u64 {
        *self.newest.borrow()
    }

    /// Waits until somebody was told of an event.
    pub(super) async fn told_of(&self, position: u64) {
        // The sender lives in this value.
        let _ = self.newest.subscribe().wait_for(|newest| *newest >= position).await;
    }

    /// Whether a committed checkpoint covers the position. Asked after the notice came, so a publication that came before its commit
    /// is found, however soon the commit follows.
    async fn is_covered(&self, position: u64) -> anyhow::Result<bool> {
        let mut covered = self.covered.lock().await;
        if covered.1 < position {
            let row = covered.0.client.query_one("select position from weft.projection", &[]).await?;
            covered.1 = row.get::<_, i64>(0).cast_unsigned();
        }
        Ok(covered.1 >= position)
    }
}

/// One sidecar.
pub(super) struct Sidecar {
    pub(super) instance: InstanceId,
    pub(super) trust_domain: TrustDomain,
    pub(super) who: TlsIdentity,
    /// Those that it goes to, in turn.
    pub(super) controllers: Vec<ControllerAddress>,
    pub(super) seen: Arc<Seen>,
    /// The newest event of which it was told, once it runs what it was told with it.
    pub(super) at: watch::Sender<u64>,
    pub(super) rng: StdRng,
}

impl Sidecar {
    /// Follows its controllers until the end; fails only if it cannot go on judging.
    pub(super) async fn run(mut self, ending: Arc<AtomicBool>) -> anyhow::Result<()> {
        let mut current: Option<Arc<Snapshot>> = None;
        let (mut registered, mut backoff) = (false, Backoff::new());
        while !ending.load(Ordering::SeqCst) {
            let channel = channel(&self.controllers, &self.who);
            registered = registered || self.register(&channel).await.is_ok();
            if registered {
                self.session(&channel, &mut current, &ending).await?;
            }
            self.controllers.rotate_left(1);
            sleep(backoff.next(&mut self.rng)).await;
        }
        Ok(())
    }

    async fn register(&self, channel: &Channel) -> Result<(), CallError> {
        let request = pb::RegisterInstanceRequest {
            meta: Some(command("torture")),
            expected: None,
            registration: Some(pb::RegisterInstance {
                instance: self.instance.to_string(),
                address: "127.0.0.1".into(),
                port: 9_000,
                all_upstreams: true,
                ..Default::default()
            }),
        };
        let mut mesh = MeshClient::new(channel.clone());
        answer(mesh.register_instance(request)).await.map(drop)
    }

    /// Until the stream ends, or a call fails.
    async fn session(
        &self,
        channel: &Channel,
        current: &mut Option<Arc<Snapshot>>,
        ending: &AtomicBool,
    ) -> anyhow::Result<()> {
        let mut discovery = DiscoveryClient::new(channel.clone());
        let have = current.as_deref().map(take::header);
        let request = pb::SubscribeRequest { have, ..Default::default() };
        let Ok(mut notices) = answer(discovery.subscribe(request)).await else { return Ok(()) };
        self.seen.told().streams += 1;
        while !ending.load(Ordering::SeqCst) {
            let Ok(Ok(Some(notice))) = timeout(SILENCE_MAX, notices.message()).await else { return Ok(()) };
            self.hear(&notice).await?;
            let wanted = notice.wanted.as_ref().and_then(|wanted| wanted.version.as_ref()).map(take::version);
            if wanted.is_none() || wanted <= current.as_ref().map(|current| current.version) {
                self.reached(&notice);
                continue;
            }
            let Some(snapshot) = self.fetch(&mut discovery, &notice, current.as_deref()).await else {
                return Ok(());
            };
            {
                let mut told = self.seen.told();
                told.applied.entry(self.instance.clone()).or_default().push(snapshot.version);
                // A notice with a patch says only how the hash begins.
                told.snapshots.insert((snapshot.version, snapshot.manifest_hash, self.instance.clone()));
            }
            let applied = Some(take::header(&snapshot));
            *current = Some(Arc::new(snapshot));
            self.reached(&notice);
            let ack = pb::AckRequest { applied, took_ms: 0, ..Default::default() };
            if answer(discovery.ack(ack)).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn reached(&self, notice: &pb::Notice) {
        let head = notice.head.as_ref().map_or(0, |head| head.position);
        self.at.send_if_modified(|at| std::mem::replace(at, head.max(*at)) < head);
    }

    /// Notes what a notice says, and whether that was committed.
    async fn hear(&self, notice: &pb::Notice) -> anyhow::Result<()> {
        let head = notice.head.as_ref().map(take::version).context("a notice tells no head")?;
        let covered = self.seen.is_covered(head.position.0).await?;
        let wanted = notice.wanted.as_ref().and_then(|wanted| {
            Some((take::version(wanted.version.as_ref()?), Hash::from_slice(&wanted.manifest_hash)?))
        });
        let mut told = self.seen.told();
        told.notices += 1;
        if !covered {
            told.complaints.push(format!("{} was told of {head}, which nobody had committed", self.instance));
        }
        if let Some((version, hash)) = wanted {
            if version > head {
                told.complaints
                    .push(format!("{} was told of {version} when the head was {head}", self.instance));
            }
            told.snapshots.insert((version, hash, self.instance.clone()));
        }
        drop(told);
        self.seen.newest.send_if_modified(|newest| {
            let newer = head.position.0 > *newest;
            *newest = (*newest).max(head.position.0);
            newer
        });
        Ok(())
    }

    /// What the notice brings, or a pull. None if the controller does not give it; whoever is newer than what is there refuses it.
    async fn fetch(
        &self,
        discovery: &mut DiscoveryClient<Channel>,
        notice: &pb::Notice,
        current: Option<&Snapshot>,
    ) -> Option<Snapshot> {
        let patched =
            current.map(|current| take::take_patch(notice, current, &self.instance, &self.trust_domain));
        if let Some(Ok(Some(snapshot))) = patched {
            self.seen.told().patches += 1;
            return Some(snapshot);
        }
        let follower = Follower { own: &self.instance, trust_domain: &self.trust_domain, current };
        for ask in [Ask::Difference, Ask::Lacking] {
            let pulled = answer(discovery.pull(ask.request(current))).await.ok()?;
            match ask.answered(&pulled, follower) {
                Pulled::Current => return None,
                Pulled::Unknown => continue,
                Pulled::Taken(taken) => {
                    let mut told = self.seen.told();
                    told.pulls += 1;
                    // A difference, also from a controller that never saw what is held here.
                    if current.is_some() && pulled.shards.len() >= taken.snapshot().shards.len() {
                        told.complaints.push(format!("{} was sent everything", self.instance));
                    }
                    return Some(Snapshot::clone(taken.snapshot()));
                }
                Pulled::Misfit(refusal) | Pulled::Refused(refusal) => {
                    let refusal = weft_model::Chain(&refusal).to_string();
                    self.seen.told().complaints.push(format!("{} refuses a pull: {refusal}", self.instance));
                    return None;
                }
            }
        }
        None
    }
}

async fn answer<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, CallError> {
    match timeout(ANSWER_MAX, call).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(CallError::Unreachable("no answer in time".into())),
    }
}
