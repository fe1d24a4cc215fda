//! TLS between sidecars: handshakes, and what they say about the peer. All use of `rustls` on the data path is here.
//!
//! The identity comes late: a sidecar that has not joined yet has none, and then nothing passes (I6). Once it is there
//! it never goes away; its leaf and roots are replaced in place, and live connections never notice.

use crate::connections::{Close, ClosedBy, Direction, Facts};
use crate::metrics;
use crate::tunnel::ALPN;
use rustls_pki_types::ServerName;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tokio::net::TcpStream;
use tokio_rustls::rustls::{ClientConfig, ConnectionCommon, SideData};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use weft_identity::spiffe::{SpiffeId, Subject};
use weft_identity::tls::{ClientAuth, ExpectedPeer, HandshakeFault, TlsIdentity, peer_identity};
use weft_model::{CloseReason, InstanceId};

/// Most endpoints whose client configuration a thread keeps. Making one costs microseconds, keeping one about 1 KiB.
const CONNECTORS_MAX: usize = 4096;

/// The sidecar's identity, once it has one.
#[derive(Default)]
pub(crate) struct Tls(OnceLock<Identified>);

struct Identified {
    identity: TlsIdentity,
    acceptor: TlsAcceptor,
}

impl Tls {
    /// The sidecar has an identity from now on. Only the first call counts; later leaves go through
    /// [`TlsIdentity::replace`].
    pub(crate) fn set(&self, identity: TlsIdentity) {
        let config = identity.server_config(ClientAuth::Required, ExpectedPeer::AnyInstance, &[ALPN]);
        let _ = self.0.set(Identified { identity, acceptor: TlsAcceptor::from(config) });
    }

    /// The identity; none before the sidecar has joined.
    pub(crate) fn identity(&self) -> Option<&TlsIdentity> {
        self.0.get().map(|identified| &identified.identity)
    }

    /// An instance's full name in the own trust domain.
    pub(crate) fn spiffe_id(&self, instance: &InstanceId) -> Option<String> {
        let trust_domain = self.identity()?.current().spiffe_id().trust_domain.clone();
        Some(SpiffeId { trust_domain, subject: Subject::Instance(instance.clone()) }.to_string())
    }

    /// Takes a connection of another sidecar.
    pub(crate) async fn accept(&self, stream: TcpStream) -> Result<server::TlsStream<TcpStream>, Close> {
        let identified = self.0.get().ok_or_else(no_identity)?;
        let tunnel = identified.acceptor.accept(stream).await;
        tunnel.map_err(|error| handshake_failed(Direction::Inbound, &error))
    }
}

pub(crate) fn no_identity() -> Close {
    Close::local(CloseReason::NoSnapshot, "this sidecar has not joined the mesh yet")
}

/// Client configurations, one for each instance that is connected to: each accepts that instance only.
#[derive(Default)]
pub(crate) struct Connectors(Mutex<BTreeMap<InstanceId, Arc<ClientConfig>>>);

impl Connectors {
    /// Connects to exactly this instance.
    pub(crate) async fn connect(
        &self,
        identity: &TlsIdentity,
        instance: &InstanceId,
        stream: TcpStream,
    ) -> Result<client::TlsStream<TcpStream>, Close> {
        let connector = TlsConnector::from(self.config(identity, instance));
        let tunnel = connector.connect(server_name(instance), stream).await;
        tunnel.map_err(|error| handshake_failed(Direction::Outbound, &error))
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

/// Who the other end is, from its leaf.
pub(crate) fn peer<S: SideData>(session: &ConnectionCommon<S>) -> Result<InstanceId, Close> {
    let refused = || Close::local(CloseReason::TlsFailed, "the peer is no instance of the mesh");
    let peer = peer_identity(session.peer_certificates()).ok().flatten().ok_or_else(refused)?;
    peer.id.as_instance().cloned().ok_or_else(refused)
}

/// Notes what was negotiated. Refuses what does not speak the tunnel's protocol.
pub(crate) fn negotiated<S: SideData>(session: &ConnectionCommon<S>, facts: &mut Facts) -> Result<(), Close> {
    facts.tls = session.protocol_version().and_then(|version| version.as_str());
    facts.key_exchange = session.negotiated_key_exchange_group().and_then(|group| group.name().as_str());
    if session.alpn_protocol() == Some(ALPN) {
        Ok(())
    } else {
        Err(Close::local(CloseReason::TlsFailed, "the peer does not speak weft/1"))
    }
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
