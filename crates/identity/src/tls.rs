//! TLS configurations of the mesh: TLS 1.3 only, hybrid post-quantum key exchange first, both ends named by SPIFFE ids.
//!
//! [`TlsIdentity`] holds the one credential of a process. Configurations made from it read the credential at every
//! handshake, so a renewed leaf or a changed set of roots counts from the next handshake on, no listener is rebuilt,
//! and live connections never notice. A client configuration is bound to the peer that it expects: a proxy makes one
//! per upstream instance ([`ExpectedPeer::instance`]; a few small allocations) and keeps it with the endpoint.
//!
//! A peer that is not the expected one fails the handshake. For a server that means: before any byte of the
//! application is read or written. A TLS 1.3 client finishes before the server has judged its certificate, so it may
//! learn of a refusal only from its first read; [`HandshakeFault::of_io`] reads both.
//!
//! Sessions are not resumed, but for those who come back to a controller, and there both ends check each other all the same
//! ([`ResumingServer`], [`ResumingClient`]).
//!
//! Deliberately absent: early data, TLS 1.2, DNS names, revocation lists (revocation reaches sidecars as policy), the
//! process-wide default crypto provider, and all I/O. To read: `verify.rs` for what is checked, `resume.rs` for what a resumed
//! session rests on, `fault.rs` for how failures are told, `tests.rs` for what fails how.

mod checked;
mod expected;
mod fault;
pub(crate) mod provider;
mod resume;
pub(crate) mod verify;

pub use expected::ExpectedPeer;
pub use fault::{HandshakeFault, PeerRejection};
pub use resume::{Attempt, ResumingClient, ResumingServer};

use crate::certificate::{PeerIdentity, PeerIdentityError};
use crate::credential::Credential;
use crate::fingerprint::Fingerprint;
use crate::spiffe::SpiffeId;
use arc_swap::ArcSwap;
use checked::Checked;
use rustls::client::{ResolvesClientCert, Resumption, WantsClientCert};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls::{ClientConfig, ConfigBuilder, ConfigSide, ServerConfig, SignatureScheme, WantsVerifier};
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::sync::Arc;
use verify::{ClientVerifier, ServerVerifier};

/// Whether a server insists on a certificate from its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// No certificate, no connection: sidecars among themselves.
    Required,
    /// A client may come without one, and is then nobody: the controller's API, for those who join. A certificate
    /// that is sent is checked all the same.
    Optional,
}

/// A credential was offered that names somebody else than the one in use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the new credential is for {offered}, but this process is {current}")]
pub struct IdentityChanged {
    /// Whom the credential in use names.
    pub current: Box<SpiffeId>,
    /// Whom the refused credential names.
    pub offered: Box<SpiffeId>,
}

/// The credential of this process, shared by all its TLS configurations and replaced while they are in use. Cheap to
/// clone; clones share the credential.
#[derive(Clone)]
pub struct TlsIdentity {
    source: Arc<Source>,
    clock: Arc<dyn TimeProvider>,
}

impl TlsIdentity {
    /// Starts with this credential and judges certificates by the system's clock.
    #[must_use]
    pub fn new(credential: Credential) -> Self {
        Self::with_clock(credential, Arc::new(DefaultTimeProvider))
    }

    /// Starts with this credential and judges certificates by `clock`.
    #[must_use]
    pub fn with_clock(credential: Credential, clock: Arc<dyn TimeProvider>) -> Self {
        Self { source: Arc::new(Source(ArcSwap::from_pointee(InUse::new(credential)))), clock }
    }

    /// The credential in use.
    #[must_use]
    pub fn current(&self) -> Arc<Credential> {
        self.source.0.load().credential.clone()
    }

    /// Uses another credential from the next handshake on: a renewed leaf, other roots, or both at once.
    ///
    /// # Errors
    ///
    /// It names somebody else: what was decided for the old name would silently hold for the new one.
    pub fn replace(&self, credential: Credential) -> Result<(), IdentityChanged> {
        let current = self.current();
        if current.spiffe_id() != credential.spiffe_id() {
            return Err(IdentityChanged {
                current: Box::new(current.spiffe_id().clone()),
                offered: Box::new(credential.spiffe_id().clone()),
            });
        }
        self.source.0.store(Arc::new(InUse::new(credential)));
        Ok(())
    }

    /// A configuration for accepting connections from `expected` peers, with these application protocols, the
    /// preferred one first. Without any, none is negotiated.
    #[must_use]
    pub fn server_config(
        &self,
        auth: ClientAuth,
        expected: ExpectedPeer,
        alpn: &[&[u8]],
    ) -> Arc<ServerConfig> {
        let verifier = Arc::new(ClientVerifier::new(self.source.clone(), expected, auth));
        Arc::new(self.server_builder(verifier, alpn))
    }

    /// As [`server_config`](Self::server_config), but clients that come back may resume.
    ///
    /// # Errors
    ///
    /// The system has no random numbers.
    pub fn resuming_server(
        &self,
        auth: ClientAuth,
        expected: ExpectedPeer,
        alpn: &[&[u8]],
    ) -> Result<ResumingServer, rustls::Error> {
        ResumingServer::new(self, auth, expected, alpn)
    }

    /// One that resumes nothing.
    fn server_builder(&self, verifier: Arc<ClientVerifier>, alpn: &[&[u8]]) -> ServerConfig {
        let builder = ServerConfig::builder_with_details(provider::provider(), self.clock.clone());
        let mut config =
            only_tls13(builder).with_client_cert_verifier(verifier).with_cert_resolver(self.source.clone());
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        config.alpn_protocols = owned(alpn);
        config
    }

    /// A configuration for connecting to an `expected` peer, with these application protocols, the preferred one
    /// first. The server name given to a connection is sent as SNI and proves nothing.
    #[must_use]
    pub fn client_config(&self, expected: ExpectedPeer, alpn: &[&[u8]]) -> Arc<ClientConfig> {
        let builder = self.client_builder(expected);
        Arc::new(client(builder.with_client_cert_resolver(self.source.clone()), alpn))
    }

    /// As [`client_config`](Self::client_config), but resuming where it was before. Keep it: tickets come and go with it.
    #[must_use]
    pub fn resuming_client(&self, expected: ExpectedPeer, alpn: &[&[u8]]) -> ResumingClient {
        ResumingClient::new(self.clone(), expected, alpn)
    }

    /// As [`client_config`](Self::client_config), but presenting no certificate: how somebody whose leaf has expired
    /// reaches a controller, to show that leaf inside and have it renewed
    /// ([`CertificateAuthority::recognize_expired`](crate::ca::CertificateAuthority::recognize_expired)).
    #[must_use]
    pub fn anonymous_client_config(&self, expected: ExpectedPeer, alpn: &[&[u8]]) -> Arc<ClientConfig> {
        Arc::new(client(self.client_builder(expected).with_no_client_auth(), alpn))
    }

    fn client_builder(&self, expected: ExpectedPeer) -> ConfigBuilder<ClientConfig, WantsClientCert> {
        let verifier = ServerVerifier::Member { source: self.source.clone(), expected };
        let builder = ClientConfig::builder_with_details(provider::provider(), self.clock.clone());
        only_tls13(builder).dangerous().with_custom_certificate_verifier(Arc::new(verifier))
    }
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TlsIdentity").field(&self.current()).finish()
    }
}

/// A configuration for somebody who has no credential yet: it presents nothing, and connects to a controller only, whose
/// chain must hold the root with this fingerprint. It is for the one connection that redeems a join token.
#[must_use]
pub fn join_config(root: Fingerprint, alpn: &[&[u8]]) -> Arc<ClientConfig> {
    join_config_with_clock(root, alpn, Arc::new(DefaultTimeProvider))
}

/// As [`join_config`], judging certificates by `clock`.
#[must_use]
pub fn join_config_with_clock(
    root: Fingerprint,
    alpn: &[&[u8]],
    clock: Arc<dyn TimeProvider>,
) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_details(provider::provider(), clock);
    let config = only_tls13(builder)
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier::Joiner { root }))
        .with_no_client_auth();
    Arc::new(client(config, alpn))
}

/// Who the other end of a connection is, from rustls' `peer_certificates()` after the handshake. `None` if it presented
/// no certificate.
///
/// # Errors
///
/// The certificate is no leaf of the mesh; the verifiers here do not let such a handshake finish.
pub fn peer_identity(
    certificates: Option<&[CertificateDer<'_>]>,
) -> Result<Option<PeerIdentity>, PeerIdentityError> {
    certificates.and_then(<[_]>::first).map(PeerIdentity::from_certificate).transpose()
}

fn client(mut config: ClientConfig, alpn: &[&[u8]]) -> ClientConfig {
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.alpn_protocols = owned(alpn);
    config
}

fn only_tls13<S: ConfigSide>(
    builder: ConfigBuilder<S, rustls::WantsVersions>,
) -> ConfigBuilder<S, WantsVerifier> {
    #[expect(
        clippy::expect_used,
        reason = "fails only if the constant provider has no TLS 1.3 suite or group"
    )]
    builder.with_protocol_versions(&[&rustls::version::TLS13]).expect("the provider speaks TLS 1.3")
}

fn owned(alpn: &[&[u8]]) -> Vec<Vec<u8>> {
    alpn.iter().map(|protocol| protocol.to_vec()).collect()
}

/// The credential in use, as rustls asks for it.
pub(crate) struct Source(ArcSwap<InUse>);

/// A credential, and the leaves that its roots have been found to have signed.
#[derive(Debug)]
struct InUse {
    credential: Arc<Credential>,
    checked: Checked,
}

impl InUse {
    fn new(credential: Credential) -> Self {
        Self { credential: Arc::new(credential), checked: Checked::default() }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Source").field(&self.0.load().credential).finish()
    }
}

impl ResolvesServerCert for Source {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load().credential.certified().clone())
    }
}

impl ResolvesClientCert for Source {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load().credential.certified().clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
