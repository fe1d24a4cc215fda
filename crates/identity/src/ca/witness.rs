//! Statements about the log that the authority signs: what a controller has published, for sidecars to keep and to show later.
//!
//! Every controller of a mesh holds the root's key, so each can sign for all and verify what another signed. A sidecar can
//! neither make nor change one: it cannot stop the mesh by a lie about what it has seen.
//!
//! The signature is the root key's, over [`DOMAIN`] and the statement. No certificate begins with these bytes, so neither can
//! be taken for the other. What a statement says is the API's business.

use super::{CertificateAuthority, IssueError};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rcgen::SigningKey as _;
use rustls_pki_types::CertificateDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

/// What every signed statement begins with. Part of the format: another layout has another number.
const DOMAIN: &[u8] = b"weft log witness 1\n";

impl CertificateAuthority {
    /// Signs a statement about the log.
    ///
    /// # Errors
    /// [`IssueError::Crypto`] if the cryptographic library fails.
    pub fn sign_witness(&self, statement: &[u8]) -> Result<Vec<u8>, IssueError> {
        let message = [DOMAIN, statement].concat();
        self.issuer.key().0.sign(&message).map_err(IssueError::Crypto)
    }
}

/// Whether the holder of this root's key signed the statement. Roots are P-256, as [`CertificateAuthority::create`] makes
/// them; one of another kind signed nothing.
#[must_use]
pub fn signed_by(root: &CertificateDer<'_>, statement: &[u8], signature: &[u8]) -> bool {
    let Ok(([], certificate)) = X509Certificate::from_der(root) else { return false };
    let point = &certificate.public_key().subject_public_key.data;
    let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point.as_ref());
    key.verify(&[DOMAIN, statement].concat(), signature).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::time::Timestamp;

    fn authority() -> CertificateAuthority {
        CertificateAuthority::create(&"weft.test".parse().unwrap(), Timestamp(1_772_366_400_000)).unwrap()
    }

    #[test]
    fn a_statement_is_believed_from_its_own_authority_only_and_only_as_it_was() {
        let (authority, other) = (authority(), authority());
        let signature = authority.sign_witness(b"1.7").unwrap();
        assert!(signed_by(authority.root(), b"1.7", &signature));
        assert!(!signed_by(other.root(), b"1.7", &signature));
        assert!(!signed_by(authority.root(), b"1.8", &signature));
        assert!(!signed_by(authority.root(), b"", &signature));
        assert!(!signed_by(authority.root(), b"1.7", &[]));
        let mut forged = signature.clone();
        for at in 0..forged.len() {
            forged[at] ^= 1;
            assert!(!signed_by(authority.root(), b"1.7", &forged), "{at}");
            forged[at] ^= 1;
        }
    }

    #[test]
    fn what_the_key_signs_elsewhere_is_no_statement() {
        let authority = authority();
        let bare = authority.issuer.key().0.sign(b"1.7").unwrap();
        assert!(!signed_by(authority.root(), b"1.7", &bare));
        assert!(!signed_by(&CertificateDer::from(vec![0x30]), b"1.7", &bare));
    }
}
