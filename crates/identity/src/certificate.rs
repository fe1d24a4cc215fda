//! Reading certificates: the rules a leaf must follow before its name means anything (X509-SVID, sections 2 to 5).
//!
//! Nothing here checks a signature or a clock; the TLS verifiers do that first, and the authority runs every leaf it
//! issues through [`PeerIdentity::from_certificate`], so that it cannot issue what a peer would refuse.

use crate::fingerprint::Fingerprint;
use crate::public_key;
use crate::spiffe::{self, SpiffeId, SpiffeIdError};
use rustls_pki_types::CertificateDer;
use weft_model::id::TrustDomain;
use weft_model::time::Timestamp;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

/// Largest certificate that is looked at, in bytes. The mesh's own are under 1 KiB; a SPIFFE id of the longest
/// allowed size still fits.
pub const CERTIFICATE_BYTES_MAX: usize = 8 * 1024;

/// A certificate does not identify anybody in the mesh.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerIdentityError {
    /// Longer than [`CERTIFICATE_BYTES_MAX`].
    #[error("the certificate has {bytes} bytes, more than {CERTIFICATE_BYTES_MAX}")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// Not one DER certificate, or one with an extension that is malformed or present twice.
    #[error("the certificate is malformed")]
    Malformed,
    /// No URI among its subject alternative names. A common name identifies nobody.
    #[error("the certificate names no URI")]
    NoUri,
    /// More than one URI: which one would be meant?
    #[error("the certificate names {count} URIs, a leaf names exactly one")]
    SeveralUris {
        /// How many there are.
        count: usize,
    },
    /// The URI is not the SPIFFE id of an instance, a controller or an operator.
    #[error("the URI in the certificate is not a SPIFFE id of the mesh")]
    SpiffeId(#[source] SpiffeIdError),
    /// It may sign certificates, or does not say that it may not.
    #[error("the certificate is an authority's, or does not say that it is a leaf")]
    Authority,
    /// Its key usage lacks digitalSignature or adds a right to sign certificates or revocation lists.
    #[error("the key usage of the certificate is not that of a leaf")]
    KeyUsage,
    /// Its extended key usage lacks clientAuth or serverAuth; every member of the mesh is both.
    #[error("the extended key usage of the certificate lacks client or server authentication")]
    ExtendedKeyUsage,
    /// Its key is none of P-256, P-384 and Ed25519.
    #[error("the key of the certificate is none of P-256, P-384 and Ed25519")]
    KeyAlgorithm,
}

/// What a leaf says about its holder. Proof of anything only after its chain and signature were verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// Who it is.
    pub id: SpiffeId,
    /// The certificate's serial number, in lower case hexadecimal digits.
    pub serial: String,
    /// From when it is valid, in whole seconds.
    pub not_before: Timestamp,
    /// The last second in which it is valid.
    pub not_after: Timestamp,
    /// The fingerprint of its SubjectPublicKeyInfo.
    pub public_key_sha256: Fingerprint,
}

impl PeerIdentity {
    /// Reads a leaf by the X509-SVID rules: exactly one URI, which is a SPIFFE id of the mesh; explicitly no
    /// authority; key usage digitalSignature without certificate signing; usable by clients and by servers.
    ///
    /// # Errors
    ///
    /// The first rule that it breaks.
    pub fn from_certificate(der: &CertificateDer<'_>) -> Result<Self, PeerIdentityError> {
        let certificate = parse(der)?;
        check_not_authority(&certificate)?;
        check_usages(&certificate)?;
        let id = the_uri(&certificate)?.parse().map_err(PeerIdentityError::SpiffeId)?;
        if !public_key::is_accepted(certificate.public_key()) {
            return Err(PeerIdentityError::KeyAlgorithm);
        }
        let validity = certificate.validity();
        Ok(Self {
            id,
            serial: hex::encode(certificate.raw_serial()),
            not_before: timestamp(validity.not_before.timestamp()),
            not_after: timestamp(validity.not_after.timestamp()),
            public_key_sha256: Fingerprint::of_public_key(certificate.public_key().raw),
        })
    }
}

/// What a root says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RootIdentity {
    pub(crate) trust_domain: TrustDomain,
    pub(crate) not_before: Timestamp,
    pub(crate) not_after: Timestamp,
    pub(crate) public_key_sha256: Fingerprint,
}

impl RootIdentity {
    /// Reads a root: an authority whose one URI is a trust domain. `None` for anything else.
    pub(crate) fn from_certificate(der: &CertificateDer<'_>) -> Option<Self> {
        let certificate = parse(der).ok()?;
        let authority = certificate.basic_constraints().ok()??.value.ca;
        let trust_domain = spiffe::parse_root_uri(the_uri(&certificate).ok()?).ok()?;
        let validity = certificate.validity();
        authority.then(|| Self {
            trust_domain,
            not_before: timestamp(validity.not_before.timestamp()),
            not_after: timestamp(validity.not_after.timestamp()),
            public_key_sha256: Fingerprint::of_public_key(certificate.public_key().raw),
        })
    }
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PeerIdentityError> {
    if der.len() > CERTIFICATE_BYTES_MAX {
        return Err(PeerIdentityError::TooLarge { bytes: der.len() });
    }
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(PeerIdentityError::Malformed),
    }
}

fn check_not_authority(certificate: &X509Certificate<'_>) -> Result<(), PeerIdentityError> {
    // The parser reports an undecodable basicConstraints as an absent one, so absence cannot mean "not an authority".
    match certificate.basic_constraints() {
        Ok(Some(constraints)) if !constraints.value.ca => Ok(()),
        Ok(_) => Err(PeerIdentityError::Authority),
        Err(_) => Err(PeerIdentityError::Malformed),
    }
}

fn check_usages(certificate: &X509Certificate<'_>) -> Result<(), PeerIdentityError> {
    let malformed = |_| PeerIdentityError::Malformed;
    let usage = certificate.key_usage().map_err(malformed)?.ok_or(PeerIdentityError::KeyUsage)?.value;
    if !usage.digital_signature() || usage.key_cert_sign() || usage.crl_sign() {
        return Err(PeerIdentityError::KeyUsage);
    }
    let extended = certificate.extended_key_usage().map_err(malformed)?;
    let both = extended.is_some_and(|usage| usage.value.client_auth && usage.value.server_auth);
    if both { Ok(()) } else { Err(PeerIdentityError::ExtendedKeyUsage) }
}

/// The one URI of the certificate. Other kinds of names are allowed beside it and mean nothing.
fn the_uri<'a>(certificate: &X509Certificate<'a>) -> Result<&'a str, PeerIdentityError> {
    let names = certificate.subject_alternative_name().map_err(|_| PeerIdentityError::Malformed)?;
    let mut uris = Vec::new();
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            GeneralName::Invalid(..) => return Err(PeerIdentityError::Malformed),
            _ => {}
        }
    }
    match uris.as_slice() {
        [] => Err(PeerIdentityError::NoUri),
        [uri] => Ok(uri),
        several => Err(PeerIdentityError::SeveralUris { count: several.len() }),
    }
}

fn timestamp(seconds: i64) -> Timestamp {
    Timestamp(seconds.saturating_mul(1000))
}
