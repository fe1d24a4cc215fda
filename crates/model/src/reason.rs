//! Why a connection ended or was refused: one closed set of words, the same in logs, metric labels and SQL.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

macro_rules! close_reasons {
    ($($(#[$doc:meta])* $variant:ident = $word:literal,)+) => {
        /// Why a connection ended or never began.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum CloseReason {
            $($(#[$doc])* #[serde(rename = $word)] $variant,)+
        }

        impl CloseReason {
            /// Every reason, in the order in which they are documented.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The word that stands for the reason on every surface.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl FromStr for CloseReason {
            type Err = UnknownReason;

            fn from_str(s: &str) -> Result<Self, UnknownReason> {
                match s { $($word => Ok(Self::$variant),)+ _ => Err(UnknownReason) }
            }
        }
    };
}

close_reasons! {
    /// The downstream finished first, and both directions ended cleanly.
    ClientFin = "client_fin",
    /// The upstream finished first, and both directions ended cleanly.
    ServerFin = "server_fin",
    /// The downstream broke the connection off.
    ClientReset = "client_reset",
    /// The upstream broke the connection off.
    ServerReset = "server_reset",
    /// No byte moved for the configured time.
    IdleTimeout = "idle_timeout",
    /// The connection reached the configured age.
    MaxAge = "max_age",
    /// A security policy refuses the connection.
    PolicyDenied = "policy_denied",
    /// A security policy that came later refuses a connection that was live.
    PolicyChanged = "policy_changed",
    /// The peer's identity was revoked.
    IdentityRevoked = "identity_revoked",
    /// A leaf was past its lifetime.
    CertExpired = "cert_expired",
    /// The TLS handshake failed, or the peer is not who the snapshot says.
    TlsFailed = "tls_failed",
    /// The upstream did not answer in time.
    ConnectTimeout = "connect_timeout",
    /// The upstream refused the connection or could not be reached.
    ConnectRefused = "connect_refused",
    /// The snapshot names no eligible endpoint.
    NoHealthyEndpoint = "no_healthy_endpoint",
    /// A circuit limit is reached.
    CircuitOpen = "circuit_open",
    /// The endpoint left the mesh.
    EndpointRemoved = "endpoint_removed",
    /// The drain ended before the connection did.
    DrainDeadline = "drain_deadline",
    /// The sidecar stopped.
    ProxyShutdown = "proxy_shutdown",
    /// The sidecar has no usable snapshot yet, or the snapshot does not know the service or port.
    NoSnapshot = "no_snapshot",
    /// A limit on connections or memory is reached.
    Overload = "overload",
    /// A fault of the sidecar itself.
    Internal = "internal",
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word is not one of the close reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a close reason")]
pub struct UnknownReason;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_read_back_from_its_word() {
        for reason in CloseReason::ALL {
            assert_eq!(reason.as_str().parse(), Ok(*reason));
            assert_eq!(serde_json::to_string(reason).unwrap(), format!("{:?}", reason.as_str()));
        }
        assert_eq!("reset by peer".parse::<CloseReason>(), Err(UnknownReason));
    }
}
