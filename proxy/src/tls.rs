//! TLS between sidecars: handshakes, and what they say about the peer. All use of `rustls` on the data path is here and below.
//!
//! The identity comes late: a sidecar that has not joined yet has none, and then nothing passes (I6). Once it is there
//! it never goes away; its leaf and roots are replaced in place, and live connections never notice.

pub(crate) mod handshake;
pub(crate) mod hello;
pub(crate) mod record;

use crate::connections::{Close, ClosedBy, Direction};
use crate::metrics;
use crate::tunnel::pool::Basis;
use crate::tunnel::{ALPN, Tunnel};
use handshake::{Established, Failure, Negotiated};
use hello::{Listening, Offered};
use rustls_pki_types::ServerName;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tokio::net::TcpStream;
use tokio_rustls::rustls::server::ResolvesServerCert;
use tokio_rustls::rustls::{ClientConfig, ServerConfig};
use weft_identity::certificate::PeerIdentity;
use weft_identity::credential::Credential;
use weft_identity::tls::{ClientAuth, ExpectedPeer, HandshakeFault, TlsIdentity};
use weft_model::{CloseReason, DnsName, InstanceId};

/// Most endpoints whose client configuration a thread keeps. Making one costs microseconds, keeping one about 1 KiB.
const CONNECTORS_MAX: usize = 4096;

/// The sidecar's identity, once it has one.
#[derive(Default)]
pub(crate) struct Tls(OnceLock<Identified>);

struct Identified {
    identity: TlsIdentity,
    server: Arc<ServerConfig>,
    /// What the server shows.
    certificates: Arc<dyn ResolvesServerCert>,
    /// The sidecar's own full name.
    own: Arc<str>,
}

impl Tls {
    /// The sidecar has an identity from now on. Only the first call counts; later leaves go through
    /// [`TlsIdentity::replace`].
    pub(crate) fn set(&self, identity: TlsIdentity) {
        let config = identity.server_config(ClientAuth::Required, ExpectedPeer::AnyInstance, &[ALPN]);
        let mut server = Arc::unwrap_or_clone(config);
        server.enable_secret_extraction = true;
        let certificates = Arc::clone(&server.cert_resolver);
        let current = identity.current();
        if let Some(own) = current.spiffe_id().as_instance() {
            let listening = Listening { certificates: Arc::clone(&certificates), own: own.service.clone() };
            server.cert_resolver = Arc::new(listening);
        }
        let own = current.spiffe_id().to_string().into();
        let _ = self.0.set(Identified { identity, server: Arc::new(server), certificates, own });
    }

    /// The identity; none before the sidecar has joined.
    pub(crate) fn identity(&self) -> Option<&TlsIdentity> {
        self.0.get().map(|identified| &identified.identity)
    }

    /// The sidecar's own full name.
    pub(crate) fn own_spiffe_id(&self) -> Option<Arc<str>> {
        self.0.get().map(|identified| Arc::clone(&identified.own))
    }

    /// Takes a connection of another sidecar, or of a standard client.
    pub(crate) async fn accept(&self, mut socket: TcpStream) -> Result<Accepted, Close> {
        let identified = self.0.get().ok_or_else(no_identity)?;
        let own = identified.identity.current();
        let server = Arc::clone(&identified.server);
        let mut established = handshake::accept(server, |offered| identified.other(offered), &mut socket)
            .await
            .map_err(|failure| match failure {
                Failure::Io(error) => handshake_failed(Direction::Inbound, &error),
                Failure::Name(detail) => Close::local(CloseReason::NoSnapshot, detail),
            })?;
        match established.negotiated.wanted.take() {
            None => agreed(socket, established, own)
                .map(|(tunnel, basis, peer)| Accepted::Sidecar(tunnel, basis, peer)),
            Some(wanted) => {
                let Established { session, negotiated, received, unsent } = established;
                let Negotiated { tls, key_exchange, peer, .. } = negotiated;
                let basis = Basis { own, peer_expires: peer.not_after, tls, key_exchange };
                let tunnel = Box::new(Tunnel::unframed(socket, session, received, unsent));
                Ok(Accepted::Standard(tunnel, basis, peer, wanted))
            }
        }
    }
}

impl Identified {
    /// The configuration for clients that are no sidecars and offer these protocols.
    fn other(&self, offered: Offered) -> Arc<ServerConfig> {
        let mut server = ServerConfig::clone(&self.server);
        server.alpn_protocols = offered.agreed();
        server.cert_resolver = Arc::clone(&self.certificates);
        Arc::new(server)
    }
}

/// Who connected, over what, and what that rests on.
pub(crate) enum Accepted {
    /// Another sidecar.
    Sidecar(Box<Tunnel>, Basis, PeerIdentity),
    /// A client that speaks TLS and nothing of the mesh, and what it asks for.
    Standard(Box<Tunnel>, Basis, PeerIdentity, DnsName),
}

/// A tunnel over a connection whose handshake is done, unless the ends do not agree.
fn agreed(
    socket: TcpStream,
    established: Established,
    own: Arc<Credential>,
) -> Result<(Box<Tunnel>, Basis, PeerIdentity), Close> {
    let Established { session, negotiated, received, unsent } = established;
    if negotiated.protocol.as_deref() != Some(ALPN) {
        return Err(Close::local(CloseReason::TlsFailed, "the peer does not speak weft/1"));
    }
    let Negotiated { tls, key_exchange, peer, .. } = negotiated;
    let basis = Basis { own, peer_expires: peer.not_after, tls, key_exchange };
    Ok((Box::new(Tunnel::new(socket, session, received, unsent)), basis, peer))
}

pub(crate) fn no_identity() -> Close {
    Close::local(CloseReason::NoSnapshot, "this sidecar has not joined the mesh yet")
}

/// Client configurations, one for each instance that is connected to: each accepts that instance only.
#[derive(Default)]
pub(crate) struct Connectors(Mutex<BTreeMap<InstanceId, Arc<ClientConfig>>>);

impl Connectors {
    /// Connects to exactly this instance. Also tells what the tunnel rests on.
    pub(crate) async fn connect(
        &self,
        identity: &TlsIdentity,
        instance: &InstanceId,
        mut socket: TcpStream,
    ) -> Result<(Box<Tunnel>, Basis, PeerIdentity), Close> {
        let own = identity.current();
        let config = self.config(identity, instance);
        let connected = handshake::connect(config, server_name(instance), &mut socket).await;
        let established = connected.map_err(|error| handshake_failed(Direction::Outbound, &error))?;
        agreed(socket, established, own)
    }

    fn config(&self, identity: &TlsIdentity, instance: &InstanceId) -> Arc<ClientConfig> {
        let mut configs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = configs.get(instance) {
            return Arc::clone(config);
        }
        if configs.len() >= CONNECTORS_MAX {
            // Who meets so many endpoints makes them anew; no worse victim is worth a list of uses.
            configs.pop_first();
        }
        let config = identity.client_config(ExpectedPeer::instance(instance.clone()), &[ALPN]);
        let mut config = Arc::unwrap_or_clone(config);
        config.enable_secret_extraction = true;
        let config = Arc::new(config);
        configs.insert(instance.clone(), Arc::clone(&config));
        config
    }
}

/// What is sent as SNI, `<service>.<ns>`, for whoever looks at packets. It proves nothing.
fn server_name(instance: &InstanceId) -> ServerName<'static> {
    let name = format!("{}.{}", instance.service.name, instance.service.namespace);
    // Two labels of letters, digits and dashes are a DNS name.
    ServerName::try_from(name).unwrap_or_else(|_| ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()))
}

/// A TLS stream that failed before it carried the application's bytes: in the handshake, or in the first frame, which
/// is where a client learns that the server does not accept its certificate.
pub(crate) fn handshake_failed(direction: Direction, error: &io::Error) -> Close {
    let fault = HandshakeFault::of_io(error);
    metrics::handshake_failed(direction, fault.as_str());
    let by = match (fault, direction) {
        (
            HandshakeFault::OwnExpired | HandshakeFault::OwnRefused | HandshakeFault::Io,
            Direction::Inbound,
        ) => ClosedBy::Client,
        (
            HandshakeFault::OwnExpired | HandshakeFault::OwnRefused | HandshakeFault::Io,
            Direction::Outbound,
        ) => ClosedBy::Server,
        _ => ClosedBy::Local,
    };
    let reason = if fault.is_expiry() { CloseReason::CertExpired } else { CloseReason::TlsFailed };
    Close::new(reason, by, format!("{fault}: {error}"))
}
