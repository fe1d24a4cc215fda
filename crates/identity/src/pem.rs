//! The text form of certificates and keys (RFC 7468).

use pem::{EncodeConfig, LineEnding, Pem};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

/// A certificate as PEM.
pub(crate) fn certificate(der: &CertificateDer<'_>) -> String {
    let pem = Pem::new("CERTIFICATE", der.as_ref());
    pem::encode_config(&pem, EncodeConfig::new().set_line_ending(LineEnding::LF))
}

/// All certificates of a file in their order, or `None` if one of them is malformed.
pub(crate) fn certificates(bytes: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(bytes).collect::<Result<_, _>>().ok()
}

/// The certificate of a file that holds one.
pub(crate) fn only_certificate(bytes: &[u8]) -> Option<CertificateDer<'static>> {
    let [certificate] = <[_; 1]>::try_from(certificates(bytes)?).ok()?;
    Some(certificate)
}

/// The first PKCS#8 key of a file. The caller wipes it.
pub(crate) fn private_key(bytes: &[u8]) -> Option<PrivatePkcs8KeyDer<'static>> {
    PrivatePkcs8KeyDer::from_pem_slice(bytes).ok()
}
