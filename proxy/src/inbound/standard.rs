//! The connection of a standard TLS client that has a leaf of the mesh: no frames, one stream, the same verdict. What it wants to be connected to it
//! says by the name that it asks for (SNI); that it is refused, by a fatal alert. Described in `docs/ways-in/standard-client.md`.
//!
//! A client of TLS 1.3 takes the handshake for done before anybody has decided about it, so it learns of a refusal from its first read.

use super::{Client, REFUSAL_TIMEOUT, Wanted, admit_and_dial};
use crate::connections::{Close, Connection};
use crate::shared::Shared;
use crate::socket;
use crate::tunnel::Tunnel;
use crate::tunnel::copy::{self, Ended, Side};
use tokio::time::timeout;
use tokio_rustls::rustls::AlertDescription;
use weft_model::dns_name::PortLabel;
use weft_model::{CloseReason, DnsName, Port};
use weft_routing::shard::InboundShard;

/// Decides about the connection, and carries it. Returns how it ended.
pub(super) async fn relay(
    shared: &Shared,
    connection: &Connection,
    client: Client,
    wanted: DnsName,
) -> Close {
    let Client { mut tunnel, peer, .. } = client;
    let dialled = Box::pin(connection.unless_cut(async {
        let wanted = {
            let mut facts = connection.facts();
            let (Some(snapshot), Some(source)) = (shared.snapshot(), facts.source) else {
                return Err(Close::local(CloseReason::NoSnapshot, "this sidecar has no snapshot yet"));
            };
            facts.config_version = Some(snapshot.version);
            let port = port(&snapshot.inbound, &wanted)?;
            facts.port = Some(port);
            Wanted { service: wanted.service, port, source }
        };
        admit_and_dial(shared, connection, &peer, &wanted).await
    }))
    .await;
    let app = match dialled {
        Ok(app) => app,
        Err(close) => {
            refuse(&mut tunnel, &close).await;
            return close;
        }
    };
    connection.established();
    let copying = copy::copy(&app, Side::Upstream, &mut tunnel, &connection.counters, connection.started);
    let close = match connection.unless_cut(async { Ok(copying.await) }).await {
        Ok(ended @ Ended::Cleanly(_)) => {
            socket::end_on_drop(&app);
            return ended.into();
        }
        Ok(ended @ Ended::Broken(..)) => ended.into(),
        Err(close) => close,
    };
    socket::reset_on_drop(tunnel.socket());
    close
}

/// The port that a name leads to: the one that it says, else the only one that there is.
fn port(inbound: &InboundShard, wanted: &DnsName) -> Result<Port, Close> {
    let found = match (&wanted.port, inbound.ports.as_slice()) {
        (Some(PortLabel::Number(number)), ports) => ports.iter().find(|port| port.port == *number),
        (Some(PortLabel::Named(name)), ports) => ports.iter().find(|port| port.name == *name),
        (None, [only]) => Some(only),
        (None, _) => None,
    };
    found.map(|port| port.port).ok_or_else(|| {
        let names: Vec<_> = inbound.ports.iter().map(|port| port.name.as_str()).collect();
        let detail = match (&wanted.port, names.as_slice()) {
            (_, []) => format!("{} declares no port", wanted.service),
            (None, [first, ..]) => format!(
                "{wanted} does not say which port, and {} has {}; ask for one by name, such as {first}.{wanted}",
                wanted.service,
                names.join(", ")
            ),
            (Some(port), _) => format!("{} declares no port {port}; it has {}", wanted.service, names.join(", ")),
        };
        Close::local(CloseReason::NoSnapshot, detail)
    })
}

/// Tells the client that it is refused, as far as TLS has a word for it.
async fn refuse(tunnel: &mut Tunnel, close: &Close) {
    let description = match close.reason {
        CloseReason::PolicyDenied | CloseReason::PolicyChanged | CloseReason::IdentityRevoked => {
            AlertDescription::AccessDenied
        }
        CloseReason::NoSnapshot | CloseReason::EndpointRemoved => AlertDescription::UnrecognisedName,
        CloseReason::CertExpired => AlertDescription::CertificateExpired,
        CloseReason::ClientFin
        | CloseReason::ServerFin
        | CloseReason::ClientReset
        | CloseReason::ServerReset
        | CloseReason::IdleTimeout
        | CloseReason::MaxAge
        | CloseReason::TlsFailed
        | CloseReason::ConnectTimeout
        | CloseReason::ConnectRefused
        | CloseReason::NoHealthyEndpoint
        | CloseReason::CircuitOpen
        | CloseReason::DrainDeadline
        | CloseReason::ProxyShutdown
        | CloseReason::Overload
        | CloseReason::Internal => AlertDescription::InternalError,
    };
    // A client that is gone needs no reason.
    let _ = timeout(REFUSAL_TIMEOUT, tunnel.break_off(description)).await;
}
