//! Public keys that leaves may carry, taken from certificate signing requests.
//!
//! A request proves that its sender holds a key, and that is all that is taken from it: the names, usages and
//! extensions it asks for are never looked at, since the controller decides them.

use crate::fingerprint::Fingerprint;
use rcgen::{PublicKeyData, SubjectPublicKeyInfo};
use std::fmt;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_SIG_ED25519};
use x509_parser::prelude::FromDer;
use x509_parser::x509;

/// Largest certificate signing request that is looked at, in bytes. An honest one has about 250; the rest is room for
/// the tools that add names of their own.
pub const CSR_BYTES_MAX: usize = 4 * 1024;

/// A certificate signing request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Longer than [`CSR_BYTES_MAX`].
    #[error("the certificate signing request has {bytes} bytes, more than {CSR_BYTES_MAX}")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// Not one DER PKCS#10 request.
    #[error("the certificate signing request is malformed")]
    Malformed,
    /// Its key is none of P-256, P-384 and Ed25519.
    #[error("the key in the certificate signing request is none of P-256, P-384 and Ed25519")]
    KeyAlgorithm,
    /// It is not signed by the key that it carries: the sender may not hold it.
    #[error("the certificate signing request is not signed with its own key")]
    Signature,
}

/// A public key whose holder proved to have the private one.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    spki: SubjectPublicKeyInfo,
    fingerprint: Fingerprint,
}

impl PublicKey {
    /// Takes the public key, and nothing else, from a DER certificate signing request.
    ///
    /// # Errors
    ///
    /// A request that is too large, malformed, not signed with its own key, or for a kind of key that is not accepted.
    pub fn from_csr(der: &[u8]) -> Result<Self, CsrError> {
        if der.len() > CSR_BYTES_MAX {
            return Err(CsrError::TooLarge { bytes: der.len() });
        }
        let request = match X509CertificationRequest::from_der(der) {
            Ok(([], request)) => request,
            _ => return Err(CsrError::Malformed),
        };
        let spki = &request.certification_request_info.subject_pki;
        // Before the signature: what is not accepted costs no public key operation.
        if !is_accepted(spki) {
            return Err(CsrError::KeyAlgorithm);
        }
        request.verify_signature().map_err(|_| CsrError::Signature)?;
        let spki = SubjectPublicKeyInfo::from_der(spki.raw).map_err(|_| CsrError::KeyAlgorithm)?;
        Ok(Self::from_spki(spki))
    }

    pub(crate) fn from_spki(spki: SubjectPublicKeyInfo) -> Self {
        let fingerprint = Fingerprint::of_public_key(&spki.subject_public_key_info());
        Self { spki, fingerprint }
    }

    /// The fingerprint of the key, as leaves with this key carry it.
    #[must_use]
    pub const fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    pub(crate) const fn spki(&self) -> &SubjectPublicKeyInfo {
        &self.spki
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PublicKey").field(&self.fingerprint).finish()
    }
}

/// Whether a key is of a kind that the mesh uses: small, fast, and without a size to choose badly.
pub(crate) fn is_accepted(spki: &x509::SubjectPublicKeyInfo<'_>) -> bool {
    let algorithm = &spki.algorithm;
    if algorithm.algorithm == OID_SIG_ED25519 {
        return true;
    }
    let curve = algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY
        && curve.is_some_and(|curve| curve == OID_EC_P256 || curve == OID_NIST_EC_P384)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair};

    fn csr(key: &KeyPair) -> Vec<u8> {
        CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
    }

    #[test]
    fn the_three_kinds_of_keys_are_accepted() {
        for algorithm in
            [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519]
        {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let public = PublicKey::from_csr(&csr(&key)).unwrap();
            assert_eq!(public.fingerprint(), Fingerprint::of_public_key(&key.subject_public_key_info()));
        }
    }

    #[test]
    fn other_kinds_of_keys_are_refused() {
        for algorithm in [&rcgen::PKCS_RSA_SHA256, &rcgen::PKCS_ECDSA_P521_SHA512] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            assert_eq!(PublicKey::from_csr(&csr(&key)), Err(CsrError::KeyAlgorithm), "{algorithm:?}");
        }
    }

    #[test]
    fn a_request_for_somebody_elses_key_is_refused() {
        let (mine, theirs) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut request = csr(&mine);
        let (mine, theirs) = (mine.public_key_raw(), theirs.public_key_raw());
        let at = request.windows(mine.len()).position(|window| window == mine).unwrap();
        request[at..at + mine.len()].copy_from_slice(theirs);
        assert_eq!(PublicKey::from_csr(&request), Err(CsrError::Signature));
    }

    #[test]
    fn sizes_and_leftovers_are_refused() {
        let good = csr(&KeyPair::generate().unwrap());
        assert_eq!(PublicKey::from_csr(&[]), Err(CsrError::Malformed));
        assert_eq!(PublicKey::from_csr(&good[..good.len() - 1]), Err(CsrError::Malformed));
        assert_eq!(PublicKey::from_csr(&[good.as_slice(), &[0]].concat()), Err(CsrError::Malformed));
        let huge = vec![0x30; CSR_BYTES_MAX + 1];
        assert_eq!(PublicKey::from_csr(&huge), Err(CsrError::TooLarge { bytes: huge.len() }));
    }

    proptest! {
        #[test]
        fn a_damaged_request_never_panics_and_never_yields_another_key(at in 0_usize..200, flip in 1_u8..) {
            let key = KeyPair::generate().unwrap();
            let mut request = csr(&key);
            let at = at % request.len();
            request[at] ^= flip;
            if let Ok(public) = PublicKey::from_csr(&request) {
                prop_assert_eq!(public.spki().der_bytes(), key.public_key_raw());
            }
        }
    }
}
