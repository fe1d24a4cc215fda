//! What the data-plane threads and the control tasks share. Threads read it without a lock; only the control tasks
//! change it.

use crate::config::Config;
use crate::connections::{Close, ClosedBy, Connection, Direction, Facts, Registry};
use crate::demand::Demand;
use crate::limits::Limits;
use crate::records::RecordSender;
use crate::routes::Routes;
use crate::tally::Tally;
use crate::tls::Tls;
use arc_swap::{ArcSwapOption, Guard};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use weft_model::{CloseReason, ConfigVersion, InstanceId, Port, ServiceName};
use weft_routing::{Snapshot, verdict};

/// Most connections at once that have not said yet who they are. A handshake takes milliseconds, so this many are some
/// ten thousand a second; each holds about 20 KiB.
const UNAUTHENTICATED_MAX: usize = 1024;

/// See the module's documentation.
pub(crate) struct Shared {
    pub(crate) own: InstanceId,
    /// Where the local app serves each port.
    pub(crate) apps: BTreeMap<Port, SocketAddr>,
    /// Whether the app is told who connects, by a header before the first byte.
    pub(crate) proxy_protocol: bool,
    pub(crate) tls: Tls,
    pub(crate) connections: Arc<Registry>,
    pub(crate) records: RecordSender,
    /// How connections go.
    pub(crate) tally: Arc<Tally>,
    /// Services that become upstreams when they are first used.
    pub(crate) demand: Demand,
    /// One permit for each connection that is not authenticated yet.
    pub(crate) unauthenticated: Semaphore,
    /// One permit for each inbound tunnel that waits for its next stream.
    pub(crate) idle_tunnels: Semaphore,
    /// Inbound tunnels end with the stream that they carry, and those that carry none at once.
    pub(crate) retire: CancellationToken,
    /// The newest version that a peer said it runs.
    pub(crate) seen: watch::Sender<ConfigVersion>,
    routes: ArcSwapOption<Routes>,
    snapshots: watch::Sender<Option<Arc<Snapshot>>>,
    draining: AtomicBool,
}

impl Shared {
    pub(crate) fn new(config: &Config, limits: Limits, records: RecordSender, demand: Demand) -> Arc<Self> {
        Arc::new(Self {
            own: config.instance.clone(),
            apps: config.apps.clone(),
            proxy_protocol: config.proxy_protocol,
            tls: Tls::default(),
            connections: Registry::new(limits.connections),
            records,
            tally: Arc::default(),
            demand,
            unauthenticated: Semaphore::new(UNAUTHENTICATED_MAX),
            idle_tunnels: Semaphore::new(limits.idle_tunnels),
            retire: CancellationToken::new(),
            seen: watch::Sender::new(ConfigVersion::default()),
            routes: ArcSwapOption::empty(),
            snapshots: watch::Sender::new(None),
            draining: AtomicBool::new(false),
        })
    }

    /// A connection that was just accepted.
    pub(crate) fn begin(&self, direction: Direction, facts: Facts) -> Arc<Connection> {
        Connection::begin(direction, facts, self.records.clone(), Arc::clone(&self.tally))
    }

    /// What connections are routed by; none before the first snapshot.
    pub(crate) fn routes(&self) -> Guard<Option<Arc<Routes>>> {
        self.routes.load()
    }

    /// The snapshot in use.
    pub(crate) fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.routes.load().as_ref().map(|routes| Arc::clone(&routes.snapshot))
    }

    /// Whether there is a snapshot, and this service is not in it.
    pub(crate) fn lacks(&self, service: &ServiceName) -> bool {
        self.routes.load().as_ref().is_some_and(|routes| !routes.snapshot.endpoints.contains_key(service))
    }

    /// Tells every snapshot from the one in use on; the newest only, if the reader is slow.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<Arc<Snapshot>>> {
        self.snapshots.subscribe()
    }

    /// Swaps a snapshot in, then cuts what it does not allow any more. Returns how many connections that were. The caller
    /// makes sure that it is newer than the one in use; there is one caller at a time.
    pub(crate) fn install(&self, snapshot: Arc<Snapshot>) -> usize {
        let previous = self.routes.load();
        let routes = Routes::new(&snapshot, previous.as_deref(), &self.own);
        routes.tell_panic(previous.as_deref());
        self.routes.store(Some(Arc::new(routes)));
        let mut cut = 0;
        self.connections.for_each(|connection| {
            if let Some(close) = recheck(connection, &snapshot) {
                connection.cut(close);
                cut += 1;
            }
        });
        self.snapshots.send_replace(Some(snapshot));
        cut
    }

    /// Checks a connection that has just become one that snapshots check. Whatever was installed before is seen here,
    /// whatever comes later sees the connection.
    pub(crate) fn recheck(&self, connection: &Connection) -> Result<(), Close> {
        let close = self.snapshot().and_then(|snapshot| recheck(connection, &snapshot));
        close.map_or(Ok(()), Err)
    }

    /// A peer runs this version. If it is newer than anything seen so far, discovery looks for it.
    pub(crate) fn peer_runs(&self, version: ConfigVersion) {
        let ours = self.routes.load().as_ref().map(|routes| routes.snapshot.version);
        if ours.is_none_or(|ours| version > ours) {
            self.seen.send_if_modified(|seen| {
                let newer = version > *seen;
                *seen = version.max(*seen);
                newer
            });
        }
    }

    /// The sidecar stops: it is not ready any more.
    pub(crate) fn start_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub(crate) fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}

/// Why a live connection may not go on under a snapshot; none if it may.
fn recheck(connection: &Connection, snapshot: &Snapshot) -> Option<Close> {
    let facts = connection.facts();
    let (destination, port) = (facts.destination.as_ref()?, facts.port?);
    match connection.direction {
        Direction::Inbound => {
            let source = facts.source_service.as_ref()?;
            if !snapshot.inbound.has_port(port) {
                let detail = format!("{destination} has no port {port} any more");
                return Some(Close::local(CloseReason::EndpointRemoved, detail));
            }
            let verdict = verdict::authorize(&snapshot.inbound, source, port);
            if verdict.permitted() {
                return None;
            }
            let detail = format!("refused as of version {}", snapshot.version);
            let close = Close::local(CloseReason::PolicyChanged, detail);
            Some(close.with_rule(verdict.ruling.by.to_string()))
        }
        Direction::Outbound => {
            // Until it is established every attempt asks the snapshot of the moment, and may fail for another one.
            facts.connect_ms?;
            let removed = |what: String| {
                let detail = format!("{what} left as of version {}", snapshot.version);
                Some(Close::new(CloseReason::EndpointRemoved, ClosedBy::Local, detail))
            };
            let Some(shard) = snapshot.endpoints.get(destination) else {
                return removed(destination.to_string());
            };
            if !shard.has_port(port) {
                return removed(format!("port {port} of {destination}"));
            }
            let instance = facts.endpoint_identity.as_ref()?;
            let listed =
                shard.endpoints.binary_search_by_key(&&instance.instance, |endpoint| &endpoint.instance);
            if listed.is_ok() { None } else { removed(instance.to_string()) }
        }
    }
}
