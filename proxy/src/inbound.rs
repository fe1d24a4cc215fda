//! One inbound connection, from the other sidecar's first byte to the record: TLS, OPEN, verdict, the app, bytes.
//!
//! Nothing of the application moves, and the app does not even see a connection, before the peer has proved who it is
//! and the policy admits it. Called by [`crate::worker`] for each accepted connection.

use crate::connections::{Close, ClosedBy, Connection, Direction, Facts};
use crate::metrics;
use crate::shared::Shared;
use crate::socket;
use crate::tls;
use crate::tunnel::copy::{self, Ended};
use crate::tunnel::frame::{self, Frame, FrameError, Open, Refused};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;
use weft_model::{CloseReason, InstanceId};
use weft_routing::verdict;

/// Longest that a peer may take for TLS, and then for OPEN. Far above any round trip; bounds what idle strangers hold.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest that the app may take to accept. It is on this machine: after this time its backlog is full.
const APP_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest that telling a refusal may take. Who does not read it learns it from the closed connection.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves a connection of another sidecar until it ends.
pub(crate) async fn serve(shared: Arc<Shared>, socket: TcpStream, source: SocketAddr) {
    let facts = Facts {
        source: Some(source),
        peer: Some(source),
        destination: Some(shared.own.service.clone()),
        ..Facts::default()
    };
    let connection = shared.begin(Direction::Inbound, facts);
    let close = match shared.connections.register(&connection) {
        Ok(_registered) => relay(&shared, &connection, socket).await.unwrap_or_else(|close| close),
        Err(close) => {
            socket::reset_on_drop(&socket);
            close
        }
    };
    connection.finish(close);
}

async fn relay(shared: &Shared, connection: &Connection, socket: TcpStream) -> Result<Close, Close> {
    let Ok(permit) = shared.unauthenticated.try_acquire() else {
        socket::reset_on_drop(&socket);
        return Err(Close::local(
            CloseReason::Overload,
            "too many connections that have not said who they are",
        ));
    };
    socket::prepare(&socket);
    let greeting = async {
        let (mut tunnel, peer) = handshake(shared, connection, socket).await?;
        let open = read_open(connection, &mut tunnel).await?;
        Ok((tunnel, peer, open))
    };
    let (mut tunnel, peer, open) = connection.unless_cut(greeting).await?;
    drop(permit);

    let mut app = match connection.unless_cut(admit_and_dial(shared, connection, &peer, open)).await {
        Ok(app) => app,
        Err(close) => {
            refuse(shared, &mut tunnel, &close).await;
            return Err(close);
        }
    };
    // From here on the peer and the app may have said something that an end would cut short.
    socket::reset_on_drop(tunnel.get_ref().0);
    let relayed = async {
        let opened = timeout(OPEN_TIMEOUT, frame::write(&mut tunnel, &Frame::Opened)).await;
        opened
            .map_err(|_| client_left("did not take OPENED within 5 s"))?
            .map_err(|error| client_left(&error.to_string()))?;
        connection.established();
        Ok(copy::copy(&mut tunnel, &mut app, &connection.counters, connection.started).await)
    };
    let ended = connection.unless_cut(relayed).await?;
    if let Ended::Cleanly(_) = ended {
        socket::end_on_drop(tunnel.get_ref().0);
        socket::end_on_drop(&app);
    }
    Ok(ended.into())
}

/// Learns who connects.
async fn handshake(
    shared: &Shared,
    connection: &Connection,
    socket: TcpStream,
) -> Result<(TlsStream<TcpStream>, InstanceId), Close> {
    let slow = |_| Close::new(CloseReason::TlsFailed, ClosedBy::Client, "no handshake within 5 s");
    let tunnel = timeout(HANDSHAKE_TIMEOUT, shared.tls.accept(socket)).await.map_err(slow)??;
    let session = tunnel.get_ref().1;
    let peer = tls::peer(session)?;
    let mut facts = connection.facts();
    tls::negotiated(session, &mut facts)?;
    facts.source_identity = shared.tls.spiffe_id(&peer);
    facts.source_service = Some(peer.service.clone());
    drop(facts);
    Ok((tunnel, peer))
}

/// Learns what it wants.
async fn read_open(connection: &Connection, tunnel: &mut TlsStream<TcpStream>) -> Result<Open, Close> {
    let slow = |_| Close::new(CloseReason::TlsFailed, ClosedBy::Client, "no OPEN within 5 s");
    let open = match timeout(OPEN_TIMEOUT, frame::read(tunnel)).await.map_err(slow)? {
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

/// Decides about the connection, and opens it to the app.
async fn admit_and_dial(
    shared: &Shared,
    connection: &Connection,
    peer: &InstanceId,
    open: Open,
) -> Result<TcpStream, Close> {
    shared.peer_runs(open.version);
    let address = admit(shared, connection, peer, &open)?;
    connection.facts().endpoint = Some(address);
    match timeout(APP_TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(app)) => {
            socket::prepare(&app);
            socket::reset_on_drop(&app);
            Ok(app)
        }
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

/// Whether the connection may be, and where the app serves it. Looks at the snapshot once (I3).
fn admit(
    shared: &Shared,
    connection: &Connection,
    peer: &InstanceId,
    open: &Open,
) -> Result<SocketAddr, Close> {
    let Some(snapshot) = shared.snapshot() else {
        return Err(Close::local(CloseReason::NoSnapshot, "this sidecar has no snapshot yet"));
    };
    let mut facts = connection.facts();
    facts.config_version = Some(snapshot.version);
    if open.service != shared.own.service {
        let detail = format!("this sidecar stands before {}", shared.own.service);
        return Err(Close::local(CloseReason::NoSnapshot, detail));
    }
    if !snapshot.inbound.has_port(open.port) {
        let detail = format!("{} declares no port {}", open.service, open.port);
        return Err(Close::local(CloseReason::NoSnapshot, detail));
    }
    let verdict = verdict::authorize(&snapshot.inbound, &peer.service, open.port);
    let mode = if verdict.would_refuse.is_some() { "audit" } else { "enforce" };
    metrics::authorized(verdict.permitted(), mode);
    facts.mode = Some(mode);
    let decisive = verdict.would_refuse.as_ref().unwrap_or(&verdict.ruling);
    facts.rule = Some(decisive.by.to_string());
    if !verdict.permitted() {
        let detail = format!("{} may not connect to port {} of {}", peer.service, open.port, open.service);
        return Err(Close::local(CloseReason::PolicyDenied, detail).with_rule(verdict.ruling.by.to_string()));
    }
    shared.apps.get(&open.port).copied().ok_or_else(|| {
        let detail = format!("no --app is given for port {}", open.port);
        Close::local(CloseReason::ConnectRefused, detail)
    })
}

/// Tells the other sidecar why, so that its record has the reason too.
async fn refuse(shared: &Shared, tunnel: &mut TlsStream<TcpStream>, close: &Close) {
    let refused = Frame::Refused(Refused {
        reason: close.reason,
        rule: close.rule.clone(),
        detail: close.detail.clone(),
        version: shared.snapshot().map(|snapshot| snapshot.version),
    });
    let told = async {
        frame::write(tunnel, &refused).await?;
        tunnel.shutdown().await
    };
    // A peer that is gone needs no reason.
    let _ = timeout(REFUSAL_TIMEOUT, told).await;
}

fn client_left(detail: &str) -> Close {
    Close::new(CloseReason::ClientReset, ClosedBy::Client, detail)
}
