//! The tunnel between two sidecars: mTLS with ALPN `weft/1`, one exchange of frames ([`frame`]), then the application's
//! bytes ([`copy`]). The format is described in `docs/tunnel.md`.

pub(crate) mod copy;
pub(crate) mod frame;

/// What two sidecars agree to speak inside TLS.
pub(crate) const ALPN: &[u8] = b"weft/1";
