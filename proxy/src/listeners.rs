//! Local addresses: which are listened on, and for what. Fixed ones are bound at the start; the stable loopback addresses of
//! upstream services follow the snapshots.
//!
//! An address that cannot be bound at run time is reported and tried again with every snapshot; it never stops anything
//! else.

use crate::config::Config;
use crate::metrics;
use crate::outbound::Target;
use crate::socket::{self, ListenError};
use crate::status::Status;
use crate::upgrade::inherited::Inherited;
use crate::upgrade::offers::Way;
use crate::worker::{Listener, Purpose};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use weft_model::{Chain, ServiceName};
use weft_routing::Snapshot;

/// Most loopback addresses that are listened on at once. Each costs a socket for every thread; a sidecar that needs more
/// names its upstreams.
const LOOPBACK_MAX: usize = 4096;

/// How often addresses that could not be bound are tried again while no snapshot comes: who holds them may leave.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// One address, a socket for each thread, not yet given to the threads.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) address: SocketAddr,
    way: Way,
    purpose: Purpose,
    sockets: Vec<TcpListener>,
}

/// Binds an address for every thread, with the sockets that were inherited for it if there are any.
///
/// # Errors
/// If it is used, or not this machine's.
pub(crate) fn bind(
    address: SocketAddr,
    purpose: Purpose,
    threads: NonZeroUsize,
    inherited: &mut Inherited,
) -> Result<Bound, ListenError> {
    let way = Way { purpose: purpose.to_string(), asked: address };
    let handed = inherited.tcp(&way);
    let sockets =
        if handed.is_empty() { socket::listen(address, threads)? } else { socket::adopt(handed, threads)? };
    for listener in &sockets {
        // Who connects to a loopback address is on this machine.
        socket::prepare(listener, address.ip());
        if matches!(purpose, Purpose::Outbound(_) | Purpose::Redirected(_)) {
            socket::reset_on_drop(listener);
        }
    }
    let bound = sockets.first().and_then(|socket| socket.local_addr().ok()).unwrap_or(address);
    Ok(Bound { address: bound, way, purpose, sockets })
}

/// Gives a bound address to the threads.
pub(crate) async fn hand_over(bound: Bound, threads: &[mpsc::Sender<Listener>], stop: &CancellationToken) {
    // Inherited ones may be more than there are threads.
    for (socket, thread) in bound.sockets.into_iter().zip(threads.iter().cycle()) {
        let (way, purpose) = (bound.way.clone(), bound.purpose.clone());
        let listener = Listener { socket, way, purpose, stop: stop.clone() };
        if thread.send(listener).await.is_err() {
            tracing::error!(address = %bound.address, "a data-plane thread is gone");
        }
    }
}

/// The services that the app is led to by their own addresses: the upstreams that were asked for, those on demand included once they
/// are there.
#[derive(Clone, Debug)]
pub(crate) struct Reach(Option<BTreeSet<ServiceName>>);

impl Reach {
    /// What a configuration asks for.
    pub(crate) fn of(config: &Config) -> Self {
        let named = config.upstreams.iter().chain(&config.on_demand);
        Self((!config.all_upstreams).then(|| named.map(|upstream| upstream.service.clone()).collect()))
    }

    /// Whether it includes a service.
    pub(crate) fn contains(&self, service: &ServiceName) -> bool {
        self.0.as_ref().is_none_or(|services| services.contains(service))
    }

    #[cfg(test)]
    pub(crate) const fn everything() -> Self {
        Self(None)
    }

    #[cfg(test)]
    pub(crate) fn only(services: impl IntoIterator<Item = ServiceName>) -> Self {
        Self(Some(services.into_iter().collect()))
    }
}

/// Open addresses: where each leads, and what closes it.
type Open = BTreeMap<SocketAddr, (Target, CancellationToken)>;

/// The loopback addresses of upstream services.
pub(crate) struct Loopback {
    pub(crate) reach: Reach,
    pub(crate) threads: Vec<mpsc::Sender<Listener>>,
    pub(crate) count: NonZeroUsize,
    pub(crate) status: Arc<Status>,
    /// Sockets of an earlier process, for the first addresses that are wanted.
    pub(crate) inherited: Inherited,
}

impl Loopback {
    /// Follows the snapshots until `stop`, which also closes every address.
    pub(crate) async fn run(
        mut self,
        mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
        stop: CancellationToken,
    ) {
        let mut open = Open::new();
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            let mut failed = false;
            if let Some(snapshot) = snapshot {
                let wanted = self.wanted(&snapshot);
                let failures = self.follow(&mut open, wanted, &stop).await;
                // What is left is wanted no more; kept open, it would hold connections that nobody accepts.
                self.inherited = Inherited::default();
                failed = !failures.is_empty();
                self.report(&open, failures);
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = snapshots.changed() => if changed.is_err() { return },
                () = sleep(RETRY_INTERVAL), if failed => {}
            }
        }
    }

    /// Closes what is not wanted any more and opens what is. Says what could not be opened, and why.
    async fn follow(
        &mut self,
        open: &mut Open,
        wanted: BTreeMap<SocketAddr, Target>,
        stop: &CancellationToken,
    ) -> BTreeMap<SocketAddr, (Target, String)> {
        open.retain(|address, (target, close)| {
            let stays = wanted.get(address) == Some(target);
            if !stays {
                close.cancel();
            }
            stays
        });
        let mut failures = BTreeMap::new();
        for (address, target) in wanted {
            let Entry::Vacant(place) = open.entry(address) else { continue };
            match self.open(address, &target, stop).await {
                Ok(close) => {
                    place.insert((target, close));
                }
                Err(error) => {
                    failures.insert(address, (target, Chain(&error).to_string()));
                }
            }
        }
        failures
    }

    async fn open(
        &mut self,
        address: SocketAddr,
        target: &Target,
        stop: &CancellationToken,
    ) -> Result<CancellationToken, ListenError> {
        let bound =
            bind(address, Purpose::Outbound(Arc::new(target.clone())), self.count, &mut self.inherited)?;
        let close = stop.child_token();
        hand_over(bound, &self.threads, &close).await;
        tracing::info!(%address, service = %target.service, port = %target.port, "listening for an upstream service");
        Ok(close)
    }

    fn wanted(&self, snapshot: &Snapshot) -> BTreeMap<SocketAddr, Target> {
        let services = snapshot.endpoints.values().filter(|shard| self.reach.contains(&shard.service));
        let addresses = services.flat_map(|shard| {
            let address = shard.address;
            shard.ports.iter().filter_map(move |port| {
                let address = SocketAddr::from((address?, port.port.number()));
                Some((address, Target { service: shard.service.clone(), port: port.port }))
            })
        });
        let mut wanted: BTreeMap<_, _> = addresses.collect();
        let left_out = wanted.len().saturating_sub(LOOPBACK_MAX);
        if left_out > 0 {
            tracing::warn!(
                left_out,
                "more than {LOOPBACK_MAX} loopback addresses; name the upstreams that are needed"
            );
            wanted = wanted.into_iter().take(LOOPBACK_MAX).collect();
        }
        wanted
    }

    fn report(&self, open: &Open, failures: BTreeMap<SocketAddr, (Target, String)>) {
        metrics::listeners_failed(failures.len());
        let known = self.status.listener_failures();
        for (address, (target, error)) in &failures {
            // Once, not with every snapshot.
            if !known.contains_key(address) {
                tracing::error!(%address, service = %target.service, %error, "an upstream service has no local address");
            }
        }
        let open = open.iter().map(|(address, (target, _))| (*address, target.clone()));
        self.status.set_loopback(open.collect(), failures.into_iter().map(|(a, (_, e))| (a, e)).collect());
    }
}
