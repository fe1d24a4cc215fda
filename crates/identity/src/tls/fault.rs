//! Why a handshake failed, in the few words that callers treat differently.

use crate::certificate::PeerIdentityError;
use crate::fingerprint::Fingerprint;
use crate::spiffe::SpiffeId;
use rustls::{AlertDescription, CertificateError, Error, OtherError};
use std::fmt;
use std::io;
use std::sync::Arc;
use weft_model::id::TrustDomain;

/// Why a peer with a properly signed certificate was turned away. Reaches callers inside rustls' error;
/// [`PeerRejection::of_io`] gets it out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerRejection {
    /// Its certificate is not a leaf of the mesh.
    #[error("the peer's certificate does not identify a member of the mesh")]
    Certificate(#[source] PeerIdentityError),
    /// It belongs to another mesh.
    #[error("the peer is {found}, of another trust domain than {expected}")]
    TrustDomain {
        /// The own trust domain.
        expected: TrustDomain,
        /// Who it is.
        found: SpiffeId,
    },
    /// It is a member of the mesh, but not the one that was to be reached.
    #[error("the peer is {found}, not {expected}")]
    Identity {
        /// Who was expected, in words.
        expected: String,
        /// Who it is.
        found: SpiffeId,
    },
    /// The controller did not present the root that the join token names.
    #[error(
        "the peer did not present the root {root} that the join token names, so it is not the token's controller"
    )]
    PinnedRootMissing {
        /// The fingerprint in the token.
        root: Fingerprint,
    },
}

impl PeerRejection {
    /// The rejection inside an error of a TLS stream, if that is what it is.
    #[must_use]
    pub fn of_io(error: &io::Error) -> Option<&Self> {
        Self::of_rustls(error.get_ref()?.downcast_ref()?)
    }

    /// The rejection inside an error of rustls, if that is what it is.
    #[must_use]
    pub fn of_rustls(error: &Error) -> Option<&Self> {
        match error {
            Error::InvalidCertificate(CertificateError::Other(OtherError(source))) => source.downcast_ref(),
            _ => None,
        }
    }
}

impl From<PeerRejection> for Error {
    fn from(rejection: PeerRejection) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(rejection))))
    }
}

/// Why a TLS connection failed while it was set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HandshakeFault {
    /// The peer's leaf has expired.
    PeerExpired,
    /// The peer's leaf is not valid yet: one of the two clocks is wrong by more than the backdating allows.
    PeerNotYetValid,
    /// The peer has no certificate, or not one that a trusted root signed for a leaf.
    PeerUntrusted,
    /// The peer is a member of a mesh, but not the one that was expected.
    PeerWrongIdentity,
    /// The peer says that the own leaf has expired or is not valid yet.
    OwnExpired,
    /// The peer turned the own certificate down, or wants one.
    OwnRefused,
    /// The two do not speak the same protocol, or one of them breaks it.
    Protocol,
    /// The connection broke.
    Io,
}

impl HandshakeFault {
    /// The fault behind an error of a TLS stream, from the handshake or from the first read after it.
    #[must_use]
    pub fn of_io(error: &io::Error) -> Self {
        error.get_ref().and_then(|source| source.downcast_ref()).map_or(Self::Io, Self::of_rustls)
    }

    /// The fault behind an error of rustls.
    #[must_use]
    pub fn of_rustls(error: &Error) -> Self {
        match error {
            Error::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. },
            ) => Self::PeerExpired,
            Error::InvalidCertificate(
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
            ) => Self::PeerNotYetValid,
            Error::InvalidCertificate(_) => match PeerRejection::of_rustls(error) {
                Some(PeerRejection::TrustDomain { .. } | PeerRejection::Identity { .. }) => {
                    Self::PeerWrongIdentity
                }
                Some(PeerRejection::Certificate(_) | PeerRejection::PinnedRootMissing { .. }) | None => {
                    Self::PeerUntrusted
                }
            },
            Error::NoCertificatesPresented => Self::PeerUntrusted,
            Error::AlertReceived(AlertDescription::CertificateExpired) => Self::OwnExpired,
            Error::AlertReceived(
                AlertDescription::AccessDenied
                | AlertDescription::BadCertificate
                | AlertDescription::CertificateRequired
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateUnknown
                | AlertDescription::DecryptError
                | AlertDescription::UnknownCA
                | AlertDescription::UnsupportedCertificate,
            ) => Self::OwnRefused,
            _ => Self::Protocol,
        }
    }

    /// Whether a certificate's dates are the cause, on either side: close reason `cert_expired`.
    #[must_use]
    pub const fn is_expiry(self) -> bool {
        matches!(self, Self::PeerExpired | Self::PeerNotYetValid | Self::OwnExpired)
    }

    /// One word for metrics and records.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PeerExpired => "peer_expired",
            Self::PeerNotYetValid => "peer_not_yet_valid",
            Self::PeerUntrusted => "peer_untrusted",
            Self::PeerWrongIdentity => "peer_wrong_identity",
            Self::OwnExpired => "own_expired",
            Self::OwnRefused => "own_refused",
            Self::Protocol => "protocol",
            Self::Io => "io",
        }
    }
}

impl fmt::Display for HandshakeFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
