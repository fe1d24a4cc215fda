//! What the data-plane threads and the control tasks share. Threads read it without a lock; only the control tasks
//! change it.

use crate::clock;
use crate::config::Config;
use crate::connections::{Close, ClosedBy, Connection, Direction, Facts, Forbidden, Registry};
use crate::demand::Demand;
use crate::limits::Limits;
use crate::records::RecordSender;
use crate::routes::Routes;
use crate::standing::Standing;
use crate::tally::Tally;
use crate::tls::Tls;
use crate::upgrade::offers::Offers;
use arc_swap::{ArcSwapOption, Guard};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use weft_model::membership::Locality;
use weft_model::{CloseReason, ConfigVersion, InstanceId, Port, ServiceName};
use weft_routing::{Snapshot, verdict};

/// Most connections at once that have not said yet who they are. A handshake takes milliseconds, so this many are some
/// ten thousand a second; each holds about 20 KiB.
const UNAUTHENTICATED_MAX: usize = 1024;

/// See the module's documentation.
pub(crate) struct Shared {
    pub(crate) own: InstanceId,
    /// Where this sidecar runs.
    pub(crate) home: Locality,
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
    /// What a process that takes this one's place is given.
    pub(crate) offers: Offers,
    routes: ArcSwapOption<Routes>,
    snapshots: watch::Sender<Option<Arc<Snapshot>>>,
    /// When the next grace of a live connection ends; perhaps earlier.
    graces: watch::Sender<Option<Instant>>,
    draining: AtomicBool,
}

impl Shared {
    pub(crate) fn new(config: &Config, limits: Limits, records: RecordSender, demand: Demand) -> Arc<Self> {
        Arc::new(Self {
            own: config.instance.clone(),
            home: Locality::of(&config.metadata),
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
            offers: Offers::default(),
            routes: ArcSwapOption::empty(),
            snapshots: watch::Sender::new(None),
            graces: watch::Sender::new(None),
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

    /// Swaps a snapshot in, then cuts what it does not allow any more, but for what it spares. The caller makes sure that it is newer
    /// than the one in use; there is one caller at a time.
    pub(crate) fn install(&self, snapshot: Arc<Snapshot>) -> Rechecked {
        let previous = self.routes.load();
        let routes = Routes::new(&snapshot, previous.as_deref(), &self.own, &self.home);
        routes.tell_panic(previous.as_deref());
        self.routes.store(Some(Arc::new(routes)));
        let now = Instant::now();
        let mut rechecked = Rechecked::default();
        let mut ends = None;
        self.connections.for_each(|connection| {
            if let Some(close) = recheck(connection, &snapshot, now) {
                connection.cut(close);
                rechecked.cut += 1;
            } else if let Some(forbidden) = &connection.facts().forbidden {
                rechecked.spared += 1;
                ends = earlier(ends, forbidden.standing.ends());
            }
        });
        self.grace_ends(ends);
        self.snapshots.send_replace(Some(snapshot));
        rechecked
    }

    /// Cuts live connections when their grace is over, for as long as it runs. They have it by the snapshot that was installed last, and
    /// most of them from the same moment on, so one task that looks at all of them does what a timer each would.
    pub(crate) async fn end_graces(self: Arc<Self>) {
        let mut graces = self.graces.subscribe();
        loop {
            let next = *graces.borrow_and_update();
            let over = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // The other end of the channel is in `self`.
                _ = graces.changed() => {}
                () = over => {
                    // Before it is looked, so that a grace which is given meanwhile is not forgotten.
                    self.graces.send_replace(None);
                    let (now, mut ends) = (Instant::now(), None);
                    self.connections.for_each(|connection| ends = earlier(ends, connection.end_grace(now)));
                    self.grace_ends(ends);
                }
            }
        }
    }

    fn grace_ends(&self, ends: Option<Instant>) {
        self.graces.send_if_modified(|next| {
            let before = *next;
            *next = earlier(before, ends);
            *next != before
        });
    }

    /// Checks a connection that has just become one that snapshots check. Whatever was installed before is seen here,
    /// whatever comes later sees the connection.
    pub(crate) fn recheck(&self, connection: &Connection) -> Result<(), Close> {
        let close = self.snapshot().and_then(|snapshot| recheck(connection, &snapshot, Instant::now()));
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

fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}

/// What became of the live connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rechecked {
    /// So many were cut.
    pub(crate) cut: usize,
    /// So many are not permitted, and have a grace or are kept.
    pub(crate) spared: usize,
}

/// Why a live connection may not go on under a snapshot; none if it may.
fn recheck(connection: &Connection, snapshot: &Snapshot, now: Instant) -> Option<Close> {
    let mut facts = connection.facts();
    let (destination, port) = (facts.destination.as_ref()?, facts.port?);
    match connection.direction {
        Direction::Inbound => {
            // Who asks to be admitted is checked against the snapshot of the moment, and has this lock meanwhile.
            if !facts.admitted {
                return None;
            }
            if !snapshot.inbound.has_port(port) {
                let detail = format!("{destination} has no port {port} any more");
                return Some(Close::local(CloseReason::EndpointRemoved, detail));
            }
            recheck_policies(connection, &mut facts, port, snapshot, now)
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

/// What policies say of a live inbound connection, which is noted in its facts.
fn recheck_policies(
    connection: &Connection,
    facts: &mut Facts,
    port: Port,
    snapshot: &Snapshot,
    now: Instant,
) -> Option<Close> {
    let verdict = verdict::authorize_live(&snapshot.inbound, facts.source_service.as_ref()?, port);
    let Some(refused) = verdict else {
        facts.forbidden = None;
        return None;
    };
    let rule = refused.by.to_string();
    let before = facts.forbidden.take();
    let standing = before.as_ref().map_or(Standing::Permitted, |before| before.standing);
    let standing = standing.after(Some(refused.on_change), now);
    let Some((standing, on_change)) = standing.and_then(|it| Some((it, it.spared_by()?))) else {
        let detail = format!("refused as of version {}", snapshot.version);
        return Some(Close::local(CloseReason::PolicyChanged, detail).with_rule(rule));
    };
    let as_of = before.map_or(snapshot.version, |before| before.as_of);
    let ends = standing.ends().map(|ends| clock::rfc3339(clock::at(ends, now)));
    facts.forbidden = Some(Box::new(Forbidden { on_change, rule, as_of, ends, standing }));
    connection.spared();
    None
}
