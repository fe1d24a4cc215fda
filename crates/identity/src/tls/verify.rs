//! What is checked in a handshake, in this order: the leaf is signed by a trusted root and valid now; it follows the
//! rules for leaves; it is of the own trust domain; it is an expected peer. The proof that the peer holds the leaf's
//! key follows, by rustls.
//!
//! The mesh has no intermediate certificates: roots sign leaves, and say so (path length zero). Whatever a peer sends
//! beside its leaf is therefore not looked at, and a chain of a thousand certificates costs nothing. The one exception
//! is a joiner, who looks there for the root that it knows by fingerprint.

use super::expected::ExpectedPeer;
use super::fault::PeerRejection;
use super::provider::{self, SIGNATURE_SCHEMES};
use super::{ClientAuth, Source};
use crate::certificate::{PeerIdentity, RootIdentity};
use crate::fingerprint::Fingerprint;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::sync::Arc;
use std::time::Duration;
use weft_model::id::TrustDomain;

/// Most certificates that a joiner looks through for its root: a leaf's presenter sends at most
/// [`ROOTS_MAX`](crate::credential::ROOTS_MAX).
const JOIN_CHAIN_MAX: usize = crate::credential::ROOTS_MAX;

/// Checks that a leaf is signed by one of the roots and valid at `now`. Leaves are for clients and servers alike
/// ([`PeerIdentity::from_certificate`] demands both usages), so one check serves both directions.
pub(crate) fn chain(leaf: &CertificateDer<'_>, roots: &RootCertStore, now: UnixTime) -> Result<(), Error> {
    let algorithms = provider::provider().signature_verification_algorithms;
    let parsed = ParsedCertificate::try_from(leaf)?;
    verify_server_cert_signed_by_trust_anchor(&parsed, roots, &[], now, algorithms.all)
}

/// Checks that one of the roots signed a leaf at all, whether or not it is valid today.
pub(crate) fn chain_when_issued(
    leaf: &CertificateDer<'_>,
    identity: &PeerIdentity,
    roots: &RootCertStore,
) -> Result<(), Error> {
    let issued_ms = u64::try_from(identity.not_before.0).unwrap_or_default();
    chain(leaf, roots, UnixTime::since_unix_epoch(Duration::from_millis(issued_ms)))
}

/// Checks the names, once the chain is known to be good.
fn identity(
    leaf: &CertificateDer<'_>,
    trust_domain: &TrustDomain,
    expected: &ExpectedPeer,
) -> Result<PeerIdentity, PeerRejection> {
    let identity = PeerIdentity::from_certificate(leaf).map_err(PeerRejection::Certificate)?;
    let found = || identity.id.clone();
    if identity.id.trust_domain != *trust_domain {
        return Err(PeerRejection::TrustDomain { expected: trust_domain.clone(), found: found() });
    }
    if !expected.admits(&identity.id) {
        return Err(PeerRejection::Identity { expected: expected.to_string(), found: found() });
    }
    Ok(identity)
}

fn verify(
    source: &Source,
    expected: &ExpectedPeer,
    leaf: &CertificateDer<'_>,
    now: UnixTime,
) -> Result<(), Error> {
    let own = source.0.load();
    let fingerprint = Fingerprint::of_certificate(leaf);
    let known = own.checked.holds(fingerprint, now);
    if !known {
        chain(leaf, own.credential.anchors(), now)?;
    }
    let identity = identity(leaf, &own.credential.spiffe_id().trust_domain, expected)?;
    if !known {
        own.checked.add(fingerprint, &identity);
    }
    Ok(())
}

fn verify_pinned(
    pin: Fingerprint,
    leaf: &CertificateDer<'_>,
    sent: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), Error> {
    let (root, roots) = find_root(pin, sent).ok_or(PeerRejection::PinnedRootMissing { root: pin })?;
    chain(leaf, &roots, now)?;
    identity(leaf, &root.trust_domain, &ExpectedPeer::Controller)?;
    Ok(())
}

fn find_root(pin: Fingerprint, sent: &[CertificateDer<'_>]) -> Option<(RootIdentity, RootCertStore)> {
    let mut sent = sent.iter().take(JOIN_CHAIN_MAX);
    let root = sent.find(|certificate| Fingerprint::of_certificate(certificate) == pin)?;
    let mut roots = RootCertStore::empty();
    roots.add(root.clone().into_owned()).ok()?;
    Some((RootIdentity::from_certificate(root)?, roots))
}

fn verify_signature(
    message: &[u8],
    leaf: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    let algorithms = provider::provider().signature_verification_algorithms;
    rustls::crypto::verify_tls13_signature(message, leaf, signed, &algorithms)
}

/// TLS 1.2 is never negotiated; should it ever be, it ends here.
fn refuse_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
}

/// How a client checks a server.
#[derive(Debug)]
pub(super) enum ServerVerifier {
    /// By the roots of its credential.
    Member {
        /// Where the credential is.
        source: Arc<Source>,
        /// Whom it wants to reach.
        expected: ExpectedPeer,
    },
    /// A joiner: by the fingerprint of the controller's root, which is all that it knows.
    Joiner {
        /// The fingerprint in its join token.
        root: Fingerprint,
    },
}

impl ServerVerifier {
    /// Checks a server's leaf.
    pub(super) fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        sent: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        match self {
            Self::Member { source, expected } => verify(source, expected, leaf, now),
            Self::Joiner { root } => verify_pinned(*root, leaf, sent, now),
        }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        sent: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(leaf, sent, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SIGNATURE_SCHEMES.to_vec()
    }
}

/// How a server checks its clients.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    source: Arc<Source>,
    expected: ExpectedPeer,
    auth: ClientAuth,
}

impl ClientVerifier {
    pub(super) const fn new(source: Arc<Source>, expected: ExpectedPeer, auth: ClientAuth) -> Self {
        Self { source, expected, auth }
    }

    /// Checks a client's leaf.
    pub(super) fn verify(&self, leaf: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
        verify(&self.source, &self.expected, leaf, now)
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.auth == ClientAuth::Required
    }

    /// No hints: the roots change under way, and every client has one certificate to choose from.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(leaf, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SIGNATURE_SCHEMES.to_vec()
    }
}
