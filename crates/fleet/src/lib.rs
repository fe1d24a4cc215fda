//! A fleet of simulated sidecars that speak the real protocol to real controllers: they join by token, register, report health,
//! subscribe, take patches, pull, acknowledge, and come back when their connection breaks, over gRPC and mTLS, with the
//! code of real ones ([`weft_client`]). What they lack is the data path: no application, no tunnel.
//!
//! [`Fleet`] is the fleet; [`Plan`] says how large it is and who is interested in what; [`profile`] makes changes and measures
//! how they spread. Two things are not as in a real fleet, because one machine plays ten thousand:
//! - Sidecars of one service share decoded snapshots: each checks what it is sent against what it has, but bytes that another
//!   one has decoded and hashed already are not decoded again.
//! - Several may share a connection, as behind a relay on their node ([`weft_client::Relay`]).

mod convergence;
mod enroll;
mod error;
mod follow;
mod line;
mod member;
mod operator;
mod plan;
pub mod profile;
mod reader;
mod snapshots;

pub use convergence::{Convergence, Spread};
pub use error::FleetError;
pub use operator::Operator;
pub use plan::Plan;
pub use reader::Reading;

use futures_util::stream::{self, StreamExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use weft_client::{ControllerAddress, retry};
use weft_identity::fingerprint::Fingerprint;
use weft_identity::tls::TlsIdentity;
use weft_proto::v1;
use weft_proto::v1::change::Change as Wire;
use weft_proto::v1::resource::Spec;

use convergence::{Spreading, Tracker};
use member::Member;
use reader::Reader;
use snapshots::Snapshots;

/// Longest wait for a fleet to do what was asked of it. Reached only if something is broken.
const LIMIT: Duration = Duration::from_secs(120);
/// Calls under way while a fleet is put together or taken apart: enough to keep a controller busy.
const CALLS: usize = 128;
/// Why the mesh is changed, as the log has it.
const WHY: &str = "a simulated fleet";

/// Where a mesh is, and an operator of it. The operator needs the role operator.
#[derive(Clone, Debug)]
pub struct Mesh {
    /// The controllers.
    pub controllers: Vec<ControllerAddress>,
    /// The operator.
    pub operator: TlsIdentity,
}

/// What a fleet has seen since it began; numbers only rise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Notices that said something new.
    pub notices: u64,
    /// Their bytes, with gRPC's and HTTP/2's frames, without TLS.
    pub notice_bytes: u64,
    /// Snapshots made from the patch in a notice.
    pub patches: u64,
    /// Pulls that were answered.
    pub pulls: u64,
    /// Those of them that brought everything.
    pub full_pulls: u64,
    /// Their bytes.
    pub pull_bytes: u64,
    /// Acknowledgements.
    pub acks: u64,
    /// Sessions that a fault ended.
    pub faults: u64,
    /// Snapshots that were refused.
    pub refused: u64,
}

#[derive(Debug, Default)]
struct Counters {
    notices: AtomicU64,
    notice_bytes: AtomicU64,
    patches: AtomicU64,
    pulls: AtomicU64,
    full_pulls: AtomicU64,
    pull_bytes: AtomicU64,
    acks: AtomicU64,
    faults: AtomicU64,
    refused: AtomicU64,
}

/// What the tasks of a fleet share.
#[derive(Debug)]
struct Shared {
    mesh: Mesh,
    plan: Plan,
    operator: Operator,
    snapshots: Snapshots,
    tracker: Tracker,
    counters: Counters,
    /// Every connection that was opened before the newest number is to end.
    cut: watch::Sender<u64>,
    /// Sidecars that are subscribed and have heard a first notice since the last cut.
    subscribed: watch::Sender<usize>,
    /// How all of them read.
    reader: Arc<Reader>,
    /// Why the last session failed, for whoever wonders.
    last_fault: std::sync::Mutex<Option<String>>,
}

/// How far an undertaking is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is done.
    pub what: &'static str,
    /// How many of it.
    pub done: usize,
    /// Of how many.
    pub of: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Fleet {
    shared: Arc<Shared>,
    members: Vec<Arc<Member>>,
    /// Where the log has all endpoints of the target.
    complete: u64,
    tasks: JoinSet<()>,
}

impl Fleet {
    /// Puts a fleet together: its services are declared; each sidecar joins by a token of its own, registers its instance,
    /// and reports it healthy. None is subscribed yet.
    ///
    /// # Errors
    /// A controller refuses, or none answers.
    pub async fn enroll(mesh: Mesh, plan: Plan, progress: impl Fn(Progress)) -> Result<Self, FleetError> {
        let reader = Arc::new(Reader::new(plan.reading));
        let members = plan.members(&mesh, &reader)?;
        let (subscribed, cut) = (watch::Sender::new(0), watch::Sender::new(0));
        let shared = Arc::new(Shared {
            operator: Operator::of(&mesh),
            snapshots: Snapshots::default(),
            tracker: Tracker::new(&members),
            counters: Counters::default(),
            cut,
            subscribed,
            last_fault: std::sync::Mutex::default(),
            reader,
            mesh,
            plan,
        });
        let fleet = Self { shared, members, complete: 0, tasks: JoinSet::new() };
        fleet.shared.operator.apply_all(WHY, &fleet.shared.plan.declarations()?).await?;
        let strangers = enroll::Strangers::new(&fleet.shared.mesh)?;
        let of = fleet.members.len();
        let enrolled = fleet.members.iter().map(|member| {
            let (shared, strangers) = (&fleet.shared, &strangers);
            async move { Ok((member.index, enroll::enroll(shared, strangers, member).await?)) }
        });
        let mut enrolled = stream::iter(enrolled).buffer_unordered(CALLS).enumerate();
        let mut complete = 0;
        while let Some((done, result)) = enrolled.next().await {
            let (index, position) = result?;
            if index < fleet.shared.plan.endpoints {
                complete = complete.max(position);
            }
            progress(Progress { what: "joined", done: done + 1, of });
        }
        drop(enrolled);
        Ok(Self { complete, ..fleet })
    }

    /// Subscribes all sidecars and waits until each runs a snapshot, and the interested ones know all endpoints of the
    /// target. Each then follows until the fleet ends.
    ///
    /// # Errors
    /// Some do not get that far.
    pub async fn subscribe(&mut self, progress: impl Fn(Progress)) -> Result<(), FleetError> {
        for member in &self.members {
            self.tasks.spawn(follow::follow(Arc::clone(&self.shared), Arc::clone(member)));
        }
        self.wait_subscribed(progress).await?;
        self.shared.settle(self.complete, Instant::now()).await.map(drop)
    }

    /// The opposite: all sidecars are gone for a while, as far as a controller sees.
    pub async fn unsubscribe(&mut self) {
        self.tasks.shutdown().await;
        for member in &self.members {
            member.leave_line().await;
        }
        self.shared.subscribed.send_replace(0);
    }

    async fn wait_subscribed(&self, progress: impl Fn(Progress)) -> Result<(), FleetError> {
        let of = self.members.len();
        let mut subscribed = self.shared.subscribed.subscribe();
        let all = async {
            loop {
                let done = *subscribed.borrow_and_update();
                progress(Progress { what: "subscribed", done, of });
                if done >= of || subscribed.changed().await.is_err() {
                    return;
                }
            }
        };
        timeout(LIMIT, all).await.map_err(|_| self.stuck("subscribed"))
    }

    /// Cuts all connections at once, and tells how long it took until every sidecar was back and at the newest version.
    ///
    /// # Errors
    /// Some do not come back.
    pub async fn cut(&self, progress: impl Fn(Progress)) -> Result<Duration, FleetError> {
        self.shared.subscribed.send_replace(0);
        let began = Instant::now();
        self.shared.cut.send_modify(|number| *number += 1);
        self.wait_subscribed(progress).await?;
        Ok(began.elapsed())
    }

    /// From now on the sidecars read as [`Plan::reading`] has it, each on every connection some seconds after it is at the
    /// newest version there.
    pub fn hold_back(&self) {
        self.shared.reader.hold_back();
    }

    /// Makes all sidecars come back by whole handshakes the next time, as to a controller that they never saw.
    pub fn forget_tickets(&self) {
        for member in &self.members {
            member.forget_tickets();
        }
    }

    /// How many sidecars there are.
    #[must_use]
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// Bytes of what the interested sidecars run: its manifest and its shards, not compressed; the most of them, if they
    /// differ.
    #[must_use]
    pub fn snapshot_bytes(&self) -> u64 {
        self.shared.snapshots.largest()
    }

    /// What has happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            notices: read(&counters.notices),
            notice_bytes: read(&counters.notice_bytes),
            patches: read(&counters.patches),
            pulls: read(&counters.pulls),
            full_pulls: read(&counters.full_pulls),
            pull_bytes: read(&counters.pull_bytes),
            acks: read(&counters.acks),
            faults: read(&counters.faults),
            refused: read(&counters.refused),
        }
    }

    /// Makes a change of the target service by an operator, and waits until every interested sidecar runs it.
    ///
    /// # Errors
    /// It is refused, or does not spread.
    pub async fn change(&self, change: Wire) -> Result<Convergence, FleetError> {
        self.shared.converge(self.shared.operator.apply(WHY, vec![change])).await
    }

    /// Reports the health of an endpoint of the target service, in its own name, and waits until every interested sidecar
    /// runs it. None if there is nothing to wait for, because the mesh damps an endpoint that flaps.
    ///
    /// # Errors
    /// It is refused, or does not spread.
    pub async fn report(
        &self,
        endpoint: usize,
        health: v1::Health,
    ) -> Result<Option<Convergence>, FleetError> {
        let member = self.endpoint(endpoint)?;
        let began = Instant::now();
        let response = member.report(health).await?;
        let position = response.version.map(|version| version.position).unwrap_or_default();
        // Before anything else, so that no sidecar's time is missed.
        let spreading = self.shared.tracker.open(position, began);
        let seen = self.seen(member).await?;
        if member.seen.swap(seen, Ordering::Relaxed) == seen {
            self.shared.tracker.forget(&spreading);
            return Ok(None);
        }
        self.shared.wait(&spreading).await.map(Some)
    }

    /// An endpoint came anew: nobody has seen it yet.
    fn unseen(&self, endpoint: usize) -> Result<(), FleetError> {
        self.endpoint(endpoint)?.seen.store(v1::Health::Unknown.into(), Ordering::Relaxed);
        Ok(())
    }

    /// An endpoint's health as everybody sees it.
    async fn seen(&self, member: &Member) -> Result<i32, FleetError> {
        let request =
            v1::GetRequest { kind: v1::Kind::Instance.into(), name: member.instance.to_string(), at: None };
        let found = retry(|| {
            let (mut operator, request) = (self.shared.operator.client.clone(), request.clone());
            async move { operator.get(request).await }
        });
        let found = found.await.map_err(FleetError::of("asking for an endpoint"))?;
        let found = found.resources.into_iter().next().and_then(|resource| resource.spec);
        Ok(if let Some(Spec::Instance(instance)) = found { instance.health } else { 0 })
    }

    /// The instance that is this endpoint of the target service.
    ///
    /// # Errors
    /// There are not so many.
    pub fn instance(&self, endpoint: usize) -> Result<String, FleetError> {
        Ok(self.endpoint(endpoint)?.instance.to_string())
    }

    /// What registers it.
    ///
    /// # Errors
    /// There are not so many.
    pub fn registration(&self, endpoint: usize) -> Result<v1::RegisterInstance, FleetError> {
        Ok(self.endpoint(endpoint)?.registration())
    }

    fn endpoint(&self, endpoint: usize) -> Result<&Arc<Member>, FleetError> {
        let missing = || FleetError::Plan(format!("the target service has no endpoint {endpoint}"));
        self.members.get(endpoint).filter(|_| endpoint < self.shared.plan.endpoints).ok_or_else(missing)
    }

    /// Takes the fleet out of the mesh: its instances leave, its services are deleted.
    ///
    /// # Errors
    /// A controller refuses, or none answers.
    pub async fn leave(mut self) -> Result<(), FleetError> {
        self.tasks.shutdown().await;
        let leaving = self.members.iter().map(|member| {
            let instance = member.instance.to_string();
            Wire::DeregisterInstance(v1::DeregisterInstance { instance })
        });
        let operator = &self.shared.operator;
        operator.apply_all(WHY, &leaving.collect::<Vec<_>>()).await?;
        operator.apply_all(WHY, &self.shared.plan.deletions()).await
    }

    fn stuck(&self, what: &'static str) -> FleetError {
        let done = *self.shared.subscribed.borrow();
        self.shared.stuck(what, done, self.members.len())
    }
}

impl Shared {
    /// Waits until everybody who is interested runs what a change leads to.
    async fn converge(
        &self,
        change: impl Future<Output = Result<v1::ApplyResponse, FleetError>>,
    ) -> Result<Convergence, FleetError> {
        let began = Instant::now();
        let response = change.await?;
        let position = response.version.map(|version| version.position).unwrap_or_default();
        self.settle(position, began).await
    }

    /// Waits until everybody who is interested runs this position or a later one.
    async fn settle(&self, position: u64, began: Instant) -> Result<Convergence, FleetError> {
        self.wait(&self.tracker.open(position, began)).await
    }

    async fn wait(&self, spreading: &Spreading) -> Result<Convergence, FleetError> {
        let spread = timeout(LIMIT, spreading.done()).await;
        spread.map_err(|_| self.stuck("converged", spreading.count(), spreading.of()))?;
        Ok(spreading.convergence())
    }

    fn stuck(&self, what: &'static str, done: usize, of: usize) -> FleetError {
        let last_fault = self.last_fault.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        FleetError::Stuck { what, done, of, last_fault: last_fault.clone().unwrap_or_else(|| "none".into()) }
    }
}

/// The root that the operator believes, which joining needs.
fn root(mesh: &Mesh) -> Result<Fingerprint, FleetError> {
    let operator = mesh.operator.current();
    let root = operator.roots().first();
    let root = root.ok_or_else(|| FleetError::Plan("the operator's credential has no root".into()))?;
    Ok(Fingerprint::of_certificate(root))
}
