//! The transparent way in: connections that the kernel redirected here, whatever they were opened to.
//!
//! [`rules`] has the kernel lead them to a listener of the sidecar; the socket still knows where they were meant to go
//! (`SO_ORIGINAL_DST`). That address is looked up in the snapshot ([`index`]). If it is a service's, or an instance's, the connection is as if
//! it had come to a local address of that service ([`crate::outbound`]). If it is nobody's in the mesh, the operator says whether it
//! passes, as plain TCP, or is refused; either way there is a record. Not a byte is read to decide.
//!
//! Whatever is of the mesh never leaves in the clear: a service's address that leads nowhere is refused, and so is everything while there
//! is no snapshot (I6).
//!
//! Nothing goes round. The rules leave out what the sidecar opens itself; should they be wrong about who it is, its own connections
//! come back to it, and are refused here: those to other sidecars by their address, those to the outside by their source port, which
//! is this process's own from before they are opened. So is a connection that was not redirected at all.
//!
//! Called by [`crate::worker`]. Read `tests/sidecar/redirect.rs`.

mod index;
mod passthrough;
pub mod rules;

use crate::config::Outside;
use crate::connections::{Close, ClosedBy, Connection, Direction, Facts};
use crate::listeners::Reach;
use crate::metrics;
use crate::outbound::{self, Target};
use crate::shared::Shared;
use crate::socket;
use crate::tunnel::copy::Ended;
use crate::worker::Worker;
use arc_swap::ArcSwapOption;
use index::{Index, Place};
use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;
use weft_model::CloseReason;
use weft_routing::Snapshot;

/// How long a connection to the outside may take to be opened. No policy of the mesh is about it; most programs give up later.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The redirected connections of a sidecar.
#[derive(Debug)]
pub(crate) struct Redirect {
    outside: Outside,
    reach: Reach,
    index: ArcSwapOption<Index>,
    /// Source ports of connections to the outside.
    own_ports: Mutex<BTreeSet<u16>>,
}

/// Where a redirected connection goes.
#[derive(Debug)]
enum Verdict {
    Mesh(Target),
    Outside(SocketAddr),
    /// Nowhere. The word is for the metric.
    Refused(Option<SocketAddr>, Close, &'static str),
}

impl Redirect {
    pub(crate) fn new(outside: Outside, reach: Reach) -> Arc<Self> {
        Arc::new(Self { outside, reach, index: ArcSwapOption::empty(), own_ports: Mutex::default() })
    }

    /// Keeps what is looked up in step with the snapshots.
    pub(crate) async fn follow(self: Arc<Self>, mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>) {
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            if let Some(snapshot) = snapshot {
                self.index.store(Some(Arc::new(Index::of(&snapshot, &self.reach))));
            }
            if snapshots.changed().await.is_err() {
                return;
            }
        }
    }

    fn verdict(&self, shared: &Shared, app: &TcpStream, source: SocketAddr) -> Verdict {
        let denied = |detail: String| Close::local(CloseReason::PolicyDenied, detail);
        let meant = match (socket::original_destination(app), app.local_addr()) {
            (Ok(meant), Ok(here)) if meant != here => meant,
            _ => {
                let detail = "it was opened to the redirect listener itself, and not redirected to it";
                return Verdict::Refused(None, denied(detail.into()), "loop");
            }
        };
        let Some(place) = self.place(shared, meant) else {
            let close = Close::local(CloseReason::NoSnapshot, "this sidecar has no snapshot yet");
            return Verdict::Refused(Some(meant), close, "refused");
        };
        match place {
            Place::Service(target) => Verdict::Mesh(target),
            Place::NoService => {
                let detail = format!("no upstream service has the address {}", meant.ip());
                Verdict::Refused(Some(meant), Close::local(CloseReason::NoSnapshot, detail), "refused")
            }
            Place::Several => {
                let detail = format!(
                    "instances of several services are at {meant}; connect by a service's name or address"
                );
                Verdict::Refused(Some(meant), denied(detail), "refused")
            }
            Place::Sidecar(instance) => {
                let detail = format!(
                    "{meant} is the sidecar of {instance}; if it is this sidecar that connects there, the rules do not leave it out: \
                     `weft-proxy redirect install --uid` with the user that it runs as"
                );
                Verdict::Refused(Some(meant), denied(detail), "loop")
            }
            Place::Outside if self.own_ports().contains(&source.port()) => {
                let detail = format!(
                    "this sidecar's own connection to {meant} was redirected to it; `weft-proxy redirect install --uid` with the user that \
                     it runs as leaves it out"
                );
                Verdict::Refused(Some(meant), denied(detail), "loop")
            }
            Place::Outside => match self.outside {
                Outside::Allow => Verdict::Outside(meant),
                Outside::Refuse => {
                    let detail = format!("{meant} is not in the mesh");
                    Verdict::Refused(Some(meant), denied(detail).with_rule(Outside::Refuse.rule()), "refused")
                }
            },
        }
    }

    /// What an address is; none before there is a snapshot.
    fn place(&self, shared: &Shared, meant: SocketAddr) -> Option<Place> {
        let snapshot = shared.snapshot()?;
        let index = self.index.load();
        match index.as_ref() {
            Some(index) if index.version == snapshot.version => Some(index.place(meant)),
            // It is a moment behind. What it knows stays true for as long; what it does not know may have come.
            Some(index) if matches!(index.place(meant), Place::Service(_)) => Some(index.place(meant)),
            _ => {
                let index = Index::of(&snapshot, &self.reach);
                let place = index.place(meant);
                self.index.store(Some(Arc::new(index)));
                Some(place)
            }
        }
    }

    fn own_ports(&self) -> std::sync::MutexGuard<'_, BTreeSet<u16>> {
        self.own_ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves a redirected connection until it ends.
pub(crate) async fn serve(worker: Arc<Worker>, app: TcpStream, source: SocketAddr, redirect: Arc<Redirect>) {
    match redirect.verdict(&worker.shared, &app, source) {
        Verdict::Mesh(target) => {
            metrics::redirected("mesh");
            outbound::serve(worker, app, source, Arc::new(target)).await;
        }
        Verdict::Outside(address) => {
            metrics::redirected("outside");
            let connection = begin(&worker, source, Some(address));
            connection.facts().rule = Some(redirect.outside.rule());
            let close = match worker.shared.connections.register(&connection) {
                Ok(_registered) => {
                    relay(&connection, &redirect, app, address).await.unwrap_or_else(|close| close)
                }
                Err(close) => close,
            };
            connection.finish(close);
        }
        Verdict::Refused(address, close, result) => {
            metrics::redirected(result);
            tracing::debug!(%source, ?address, detail = close.detail, "a redirected connection is refused");
            begin(&worker, source, address).finish(close);
        }
    }
}

fn begin(worker: &Worker, source: SocketAddr, address: Option<SocketAddr>) -> Arc<Connection> {
    let facts = Facts {
        connection_id: worker.connection_id(),
        source: Some(source),
        source_identity: worker.shared.tls.own_spiffe_id(),
        endpoint: address,
        pick: Some("outside"),
        config_version: worker.shared.snapshot().map(|snapshot| snapshot.version),
        ..Facts::default()
    };
    worker.shared.begin(Direction::Outbound, facts)
}

/// `app` is reset whenever it is dropped, its listener has seen to that.
async fn relay(
    connection: &Arc<Connection>,
    redirect: &Redirect,
    app: TcpStream,
    address: SocketAddr,
) -> Result<Close, Close> {
    connection.facts().attempts = 1;
    let (upstream, _port) = connection.unless_cut(dial(redirect, address)).await?;
    connection.established();
    let copied =
        async { Ok(passthrough::copy(&app, &upstream, &connection.counters, connection.started).await) };
    let ended = connection.unless_cut(copied).await;
    if matches!(ended, Ok(Ended::Cleanly(_))) {
        socket::end_on_drop(&app);
        socket::end_on_drop(&upstream);
    }
    ended.map(Into::into)
}

/// A source port that is this process's own until it is dropped.
struct OwnPort<'a> {
    redirect: &'a Redirect,
    port: u16,
}

impl Drop for OwnPort<'_> {
    fn drop(&mut self) {
        self.redirect.own_ports().remove(&self.port);
    }
}

/// A connection to the outside. Its source port is bound, and noted, before it is opened: if it comes back, it is known.
async fn dial(redirect: &Redirect, address: SocketAddr) -> Result<(TcpStream, OwnPort<'_>), Close> {
    let failed = |error: &io::Error| {
        let (reason, by) = match error.kind() {
            io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse | io::ErrorKind::OutOfMemory => {
                (CloseReason::Overload, ClosedBy::Local)
            }
            io::ErrorKind::TimedOut => (CloseReason::ConnectTimeout, ClosedBy::Server),
            _ => (CloseReason::ConnectRefused, ClosedBy::Server),
        };
        Close::new(reason, by, format!("{address}: {error}"))
    };
    let bound = if address.is_ipv4() {
        TcpSocket::new_v4().and_then(|socket| socket.bind((Ipv4Addr::UNSPECIFIED, 0).into()).map(|()| socket))
    } else {
        TcpSocket::new_v6().and_then(|socket| socket.bind((Ipv6Addr::UNSPECIFIED, 0).into()).map(|()| socket))
    };
    let bound = bound.and_then(|socket| Ok((socket.local_addr()?.port(), socket)));
    let (port, socket) = bound.map_err(|error| failed(&error))?;
    redirect.own_ports().insert(port);
    let port = OwnPort { redirect, port };
    let connected = timeout(CONNECT_TIMEOUT, socket.connect(address)).await.map_err(|_| {
        let detail = format!("{address} did not answer within {CONNECT_TIMEOUT:?}");
        Close::new(CloseReason::ConnectTimeout, ClosedBy::Server, detail)
    })?;
    let stream = connected.map_err(|error| failed(&error))?;
    socket::prepare(&stream, address.ip());
    socket::reset_on_drop(&stream);
    Ok((stream, port))
}
