//! The private key of a leaf. It is made where it is used and leaves that machine in no form: what goes out is a
//! certificate signing request.

use crate::public_key::PublicKey;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PublicKeyData, SubjectPublicKeyInfo};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::sign::SigningKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use std::fmt;
use std::sync::Arc;
use zeroize::{Zeroize, Zeroizing};

/// A private key cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The cryptographic library refused to make a key or to sign with it.
    #[error("the cryptographic library failed to make or use a key")]
    Crypto(#[source] rcgen::Error),
    /// The bytes are not a PKCS#8 key of a kind that the mesh uses.
    #[error("the private key is not a PKCS#8 key for P-256, P-384 or Ed25519")]
    Malformed,
}

/// A leaf's private key. Cheap to clone; the encoded key is wiped from memory with the last clone. (The copy inside the
/// cryptographic library is wiped by that library.)
#[derive(Clone)]
pub struct LeafKey(Arc<Inner>);

struct Inner {
    pair: KeyPair,
    signer: Arc<dyn SigningKey>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.pair.zeroize();
    }
}

impl LeafKey {
    /// Makes a new P-256 key.
    ///
    /// # Errors
    ///
    /// The cryptographic library has no randomness.
    pub fn generate() -> Result<Self, KeyError> {
        Self::new(KeyPair::generate().map_err(KeyError::Crypto)?)
    }

    /// A DER certificate signing request for this key. It names nobody: names are the controller's to give.
    ///
    /// # Errors
    ///
    /// The cryptographic library fails to sign.
    pub fn csr_der(&self) -> Result<Vec<u8>, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&self.0.pair).map_err(KeyError::Crypto)?;
        Ok(request.der().to_vec())
    }

    pub(crate) fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError> {
        Self::new(KeyPair::try_from(&PrivatePkcs8KeyDer::from(der)).map_err(|_| KeyError::Malformed)?)
    }

    pub(crate) fn to_pem(&self) -> Zeroizing<String> {
        pkcs8_pem(&self.0.pair)
    }

    pub(crate) fn signer(&self) -> Arc<dyn SigningKey> {
        self.0.signer.clone()
    }

    fn new(pair: KeyPair) -> Result<Self, KeyError> {
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialized_der()));
        let signer = any_supported_type(&der).map_err(|_| KeyError::Malformed)?;
        Ok(Self(Arc::new(Inner { pair, signer })))
    }

    /// The public half. No proof of possession is needed where the key itself is at hand.
    pub(crate) fn public_key(&self) -> Result<PublicKey, KeyError> {
        let spki = SubjectPublicKeyInfo::from_der(&self.0.pair.subject_public_key_info());
        spki.map(PublicKey::from_spki).map_err(KeyError::Crypto)
    }
}

impl fmt::Debug for LeafKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeafKey(private)")
    }
}

/// A key pair as PKCS#8 PEM, in memory that is wiped.
pub(crate) fn pkcs8_pem(pair: &KeyPair) -> Zeroizing<String> {
    Zeroizing::new(pair.serialize_pem())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_carries_the_key_and_no_name() {
        let key = LeafKey::generate().unwrap();
        let csr = key.csr_der().unwrap();
        assert_eq!(PublicKey::from_csr(&csr).unwrap(), key.public_key().unwrap());
        assert!(!csr.windows(5).any(|bytes| bytes == b"rcgen"));
    }

    #[test]
    fn debug_shows_no_key() {
        assert_eq!(format!("{:?}", LeafKey::generate().unwrap()), "LeafKey(private)");
    }
}
