//! One inbound connection, from the other sidecar's first byte to the record: TLS, OPEN, verdict, the app, bytes. A client that is no sidecar
//! goes the same way without frames ([`standard`]).
//!
//! Nothing of the application moves, and the app does not even see a connection, before the peer has proved who it is
//! and the policy admits it. Called by [`crate::worker`] for each accepted connection.

mod standard;

use crate::connections::{Close, ClosedBy, Connection, Direction, Facts, Registered};
use crate::metrics;
use crate::preface;
use crate::shared::Shared;
use crate::socket;
use crate::tls::{self, Accepted};
use crate::tunnel::Tunnel;
use crate::tunnel::copy::{self, Ended, Side};
use crate::tunnel::frame::{Frame, FrameError, Open, Refused};
use crate::tunnel::pool::{self, Basis};
use crate::worker::Worker;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use weft_identity::certificate::PeerIdentity;
use weft_model::{CloseReason, DnsName, InstanceId, Port, ServiceName};
use weft_routing::verdict;

/// Longest that a peer may take for TLS, and then for OPEN. Far above any round trip; bounds what idle strangers hold.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest that the app may take to accept. It is on this machine: after this time its backlog is full.
const APP_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest that a tunnel waits for its next stream: longer than clients keep one, so that seldom a client finds it closed.
const IDLE_MAX: Duration = pool::IDLE_MAX.saturating_add(Duration::from_secs(30));

/// Longest that telling a refusal may take. Who does not read it learns it from the closed connection.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// What the records of a connection say that its two ends speak inside TLS.
pub(crate) const TUNNEL: &str = "weft/1";
const PLAIN_TLS: &str = "plain_tls";

/// Serves a connection of another sidecar: its streams, one after the other, until one does not end cleanly. Or that of a standard
/// client, which is one stream.
pub(crate) async fn serve(worker: Arc<Worker>, socket: TcpStream, source: SocketAddr) {
    let shared = &worker.shared;
    let facts = Facts {
        source: Some(source),
        peer: Some(source),
        destination: Some(shared.own.service.clone()),
        ..Facts::default()
    };
    let Ok(mut stream) = Stream::begin(shared, facts) else { return socket::reset_on_drop(&socket) };
    // In a place of its own, which is given back: what follows may go on for hours, and needs much less.
    let (mut client, mut open) = match Box::pin(greet(shared, &stream.connection, socket)).await {
        Ok(Greeted::Sidecar(client, open)) => (client, open),
        Ok(Greeted::Standard(client, wanted)) => {
            stream.connection.facts().connection_id = worker.connection_id();
            let close = Box::pin(standard::relay(shared, &stream.connection, client, wanted)).await;
            return stream.end(close);
        }
        Err(close) => return stream.end(close),
    };
    loop {
        match relay(shared, &stream.connection, &mut client, open).await {
            Relayed::Free(close) => stream.end(close),
            Relayed::Over(close) => {
                socket::reset_on_drop(client.tunnel.socket());
                return stream.end(close);
            }
        }
        let Some(next) = next_open(shared, &mut client).await else { return };
        stream = match Stream::begin(shared, client.facts(&next)) {
            Ok(stream) => stream,
            Err(close) => {
                refuse(shared, &mut client.tunnel, &close).await;
                return;
            }
        };
        open = next;
    }
}

/// A stream of the application, known to the registry while it lives.
struct Stream {
    connection: Arc<Connection>,
    _registered: Registered,
}

impl Stream {
    /// Makes it known. If that may not be, its record is written all the same.
    fn begin(shared: &Shared, facts: Facts) -> Result<Self, Close> {
        let connection = shared.begin(Direction::Inbound, facts);
        match shared.connections.register(&connection) {
            Ok(registered) => Ok(Self { connection, _registered: registered }),
            Err(close) => {
                connection.finish(close.clone());
                Err(close)
            }
        }
    }

    fn end(self, close: Close) {
        self.connection.finish(close);
    }
}

/// Who is at the other end of a tunnel, and what is the same for all of its streams.
struct Client {
    tunnel: Box<Tunnel>,
    basis: Basis,
    peer: InstanceId,
    address: Option<SocketAddr>,
    identity: Arc<str>,
}

impl Client {
    /// What is known of a stream that it opens, after another one.
    fn facts(&self, open: &Open) -> Facts {
        Facts {
            connection_id: open.connection_id,
            source: Some(open.source),
            peer: self.address,
            source_identity: Some(Arc::clone(&self.identity)),
            source_service: Some(self.peer.service.clone()),
            destination: Some(open.service.clone()),
            port: Some(open.port),
            protocol: Some(TUNNEL),
            tls: self.basis.tls,
            key_exchange: self.basis.key_exchange,
            tunnel_reused: Some(true),
            ..Facts::default()
        }
    }
}

/// Who connects, and what for.
enum Greeted {
    Sidecar(Client, Open),
    Standard(Client, DnsName),
}

/// How a stream ended.
enum Relayed {
    /// The tunnel is free for the next one.
    Free(Close),
    /// The tunnel is of no use any more.
    Over(Close),
}

/// Learns who connects and what for.
async fn greet(shared: &Shared, connection: &Connection, socket: TcpStream) -> Result<Greeted, Close> {
    let Ok(_permit) = shared.unauthenticated.try_acquire() else {
        socket::reset_on_drop(&socket);
        return Err(Close::local(
            CloseReason::Overload,
            "too many connections that have not said who they are",
        ));
    };
    let greeting = async {
        let (mut client, wanted) = handshake(shared, connection, socket).await?;
        match wanted {
            Some(wanted) => Ok(Greeted::Standard(client, wanted)),
            None => {
                let open = read_open(connection, &mut client.tunnel).await?;
                Ok(Greeted::Sidecar(client, open))
            }
        }
    };
    connection.unless_cut(greeting).await
}

/// Decides about a stream, and carries it.
async fn relay(shared: &Shared, connection: &Connection, client: &mut Client, open: Open) -> Relayed {
    let Client { tunnel, peer, .. } = client;
    shared.peer_runs(open.version);
    let Open { service, port, source, .. } = open;
    let wanted = Wanted { service, port, source };
    let dialled = Box::pin(connection.unless_cut(admit_and_dial(shared, connection, peer, &wanted))).await;
    let app = match dialled {
        Ok(app) => app,
        Err(close) => {
            return if refuse(shared, tunnel, &close).await {
                Relayed::Free(close)
            } else {
                Relayed::Over(close)
            };
        }
    };
    let relayed = async {
        let opened = timeout(OPEN_TIMEOUT, tunnel.write(&Frame::Opened)).await;
        opened
            .map_err(|_| client_left("did not take OPENED within 5 s"))?
            .map_err(|error| client_left(&error.to_string()))?;
        connection.established();
        Ok(copy::copy(&app, Side::Upstream, tunnel, &connection.counters, connection.started).await)
    };
    match connection.unless_cut(relayed).await {
        Ok(ended @ Ended::Cleanly(_)) => {
            socket::end_on_drop(&app);
            Relayed::Free(ended.into())
        }
        Ok(ended @ Ended::Broken(..)) => Relayed::Over(ended.into()),
        Err(close) => Relayed::Over(close),
    }
}

/// Learns who connects; and what for, if it is a standard client.
async fn handshake(
    shared: &Shared,
    connection: &Connection,
    socket: TcpStream,
) -> Result<(Client, Option<DnsName>), Close> {
    let slow = |_| Close::new(CloseReason::TlsFailed, ClosedBy::Client, "no handshake within 5 s");
    let accepted = timeout(HANDSHAKE_TIMEOUT, shared.tls.accept(socket)).await.map_err(slow)?;
    let (tunnel, basis, leaf, wanted) = match accepted? {
        Accepted::Sidecar(tunnel, basis, leaf) => (tunnel, basis, leaf, None),
        Accepted::Standard(tunnel, basis, leaf, wanted) => (tunnel, basis, leaf, Some(wanted)),
    };
    let PeerIdentity { id, .. } = leaf;
    let Some(peer) = id.as_instance() else {
        return Err(Close::local(CloseReason::TlsFailed, "the peer is no instance of the mesh"));
    };
    let identity: Arc<str> = id.to_string().into();
    let mut facts = connection.facts();
    facts.tls = basis.tls;
    facts.key_exchange = basis.key_exchange;
    facts.source_identity = Some(Arc::clone(&identity));
    facts.source_service = Some(peer.service.clone());
    facts.protocol = Some(if wanted.is_some() { PLAIN_TLS } else { TUNNEL });
    facts.tunnel_reused = wanted.is_none().then_some(false);
    Ok((Client { tunnel, basis, peer: peer.clone(), address: facts.peer, identity }, wanted))
}

/// Learns what it wants.
async fn read_open(connection: &Connection, tunnel: &mut Tunnel) -> Result<Open, Close> {
    let slow = |_| Close::new(CloseReason::TlsFailed, ClosedBy::Client, "no OPEN within 5 s");
    let open = match timeout(OPEN_TIMEOUT, tunnel.read()).await.map_err(slow)? {
        Ok(Frame::Open(open)) => open,
        Ok(Frame::Opened | Frame::Refused(_)) => {
            return Err(Close::new(CloseReason::TlsFailed, ClosedBy::Client, "the first frame is no OPEN"));
        }
        Err(FrameError::Io(error)) => return Err(tls::handshake_failed(Direction::Inbound, &error)),
        Err(error) => return Err(Close::new(CloseReason::TlsFailed, ClosedBy::Client, error.to_string())),
    };
    let mut facts = connection.facts();
    facts.connection_id = open.connection_id;
    facts.source = Some(open.source);
    facts.destination = Some(open.service.clone());
    facts.port = Some(open.port);
    Ok(open)
}

/// Waits for the next stream. None if the tunnel is to be closed: too many wait, this one did so too long, the sidecar stops, or
/// what the tunnel rests on has changed. The client takes another tunnel then; it was told nothing yet.
async fn next_open(shared: &Shared, client: &mut Client) -> Option<Open> {
    let _place = shared.idle_tunnels.try_acquire().ok()?;
    let frame = tokio::select! {
        biased;
        () = shared.retire.cancelled() => return None,
        frame = timeout(IDLE_MAX, client.tunnel.read()) => frame.ok()?,
    };
    let frame = match frame {
        Ok(frame) => frame,
        // It was closed, which is how a tunnel ends that is not needed.
        Err(FrameError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return None,
        Err(error) => {
            tracing::debug!(peer = %client.peer, %error, "a tunnel broke between two streams");
            return None;
        }
    };
    let own = shared.tls.identity()?.current();
    match frame {
        Frame::Open(open) if client.basis.holds(&own, crate::clock::now()) => Some(open),
        _ => None,
    }
}

/// What a peer wants to be connected to, and who is behind it.
struct Wanted {
    service: ServiceName,
    port: Port,
    source: SocketAddr,
}

/// Decides about the connection, and opens it to the app.
async fn admit_and_dial(
    shared: &Shared,
    connection: &Connection,
    peer: &InstanceId,
    wanted: &Wanted,
) -> Result<TcpStream, Close> {
    let address = admit(shared, connection, peer, wanted)?;
    connection.facts().endpoint = Some(address);
    let dialled = async {
        let mut app = TcpStream::connect(address).await?;
        socket::prepare(&app, address.ip());
        // From here on an end might cut short what somebody said.
        socket::reset_on_drop(&app);
        if shared.proxy_protocol {
            let identity = connection.facts().source_identity.clone().unwrap_or_default();
            app.write_all(&preface::proxied(wanted.source, address, &identity)?).await?;
        }
        Ok::<_, io::Error>(app)
    };
    match timeout(APP_TIMEOUT, dialled).await {
        Ok(Ok(app)) => Ok(app),
        Ok(Err(error)) => {
            let detail = format!("the app does not accept connections at {address}: {error}");
            Err(Close::new(CloseReason::ConnectRefused, ClosedBy::Server, detail))
        }
        Err(_) => {
            let detail = format!("the app at {address} did not accept within 5 s");
            Err(Close::new(CloseReason::ConnectTimeout, ClosedBy::Server, detail))
        }
    }
}

/// Whether the connection may be, and where the app serves it. Looks at the snapshot once (I3), and while it has the lock under which
/// live connections are checked again: a snapshot that comes meanwhile is either seen here or finds a connection that is admitted.
fn admit(
    shared: &Shared,
    connection: &Connection,
    peer: &InstanceId,
    wanted: &Wanted,
) -> Result<SocketAddr, Close> {
    let mut facts = connection.facts();
    let Some(snapshot) = shared.snapshot() else {
        return Err(Close::local(CloseReason::NoSnapshot, "this sidecar has no snapshot yet"));
    };
    facts.config_version = Some(snapshot.version);
    if wanted.service != shared.own.service {
        let detail = format!("this sidecar stands before {}", shared.own.service);
        return Err(Close::local(CloseReason::NoSnapshot, detail));
    }
    if !snapshot.inbound.has_port(wanted.port) {
        let detail = format!("{} declares no port {}", wanted.service, wanted.port);
        return Err(Close::local(CloseReason::NoSnapshot, detail));
    }
    let verdict = verdict::authorize(&snapshot.inbound, &peer.service, wanted.port);
    let mode = if verdict.would_refuse.is_some() { "audit" } else { "enforce" };
    metrics::authorized(verdict.permitted(), mode);
    facts.mode = Some(mode);
    let decisive = verdict.would_refuse.as_ref().unwrap_or(&verdict.ruling);
    facts.rule = Some(decisive.by.to_string());
    if !verdict.permitted() {
        let detail =
            format!("{} may not connect to port {} of {}", peer.service, wanted.port, wanted.service);
        return Err(Close::local(CloseReason::PolicyDenied, detail).with_rule(verdict.ruling.by.to_string()));
    }
    facts.admitted = true;
    shared.apps.get(&wanted.port).copied().ok_or_else(|| {
        let detail = format!("no --app is given for port {}", wanted.port);
        Close::local(CloseReason::ConnectRefused, detail)
    })
}

/// Tells the other sidecar why, so that its record has the reason too. Whether it was told.
async fn refuse(shared: &Shared, tunnel: &mut Tunnel, close: &Close) -> bool {
    let refused = Frame::Refused(Refused {
        reason: close.reason,
        rule: close.rule.clone(),
        detail: close.detail.clone(),
        version: shared.snapshot().map(|snapshot| snapshot.version),
    });
    // A peer that is gone needs no reason.
    timeout(REFUSAL_TIMEOUT, tunnel.write(&refused)).await.is_ok_and(|told| told.is_ok())
}

fn client_left(detail: &str) -> Close {
    Close::new(CloseReason::ClientReset, ClosedBy::Client, detail)
}
