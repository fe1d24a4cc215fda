//! Introductions: who is on a connection besides the one that opened it. A relay on a node carries the calls of the node's
//! sidecars over one connection, and is trusted with nothing for it: each sidecar proves with its own key that it
//! wants to be on exactly that connection.
//!
//! The proof is a signature with the leaf's key over [`DOMAIN`] and the connection's [`Binding`], a value that both ends of one
//! TLS connection derive from its secrets (RFC 8446, section 7.5) and nobody else knows beforehand. So a proof that somebody
//! overheard, or kept, is good for no other connection, and a relay can introduce nobody who did not ask for it.
//!
//! Called by the controller's API ([`CertificateAuthority::recognize_introduced`]) and by whoever shares a connection ([`prove`]).

use crate::ca::{CertificateAuthority, RecognizeError};
use crate::certificate::PeerIdentity;
use crate::credential::Credential;
use crate::tls::provider::SIGNATURE_SCHEMES;
use crate::tls::verify;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, ED25519, UnparsedPublicKey, VerificationAlgorithm,
};
use rustls::{ConnectionCommon, SideData};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::time::Duration;
use weft_model::Timestamp;
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::{OID_EC_P256, OID_NIST_EC_P384, OID_SIG_ED25519};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

/// What tells one connection from every other.
pub type Binding = [u8; 32];

/// The metadata in which a call says whose it is, of those who were introduced on its connection: by their number.
pub const AS: &str = "weft-as";

/// What every proof begins with. Part of the format: another layout has another number.
const DOMAIN: &[u8] = b"weft introduction 1\n";
/// The exporter's label; for private use, as the registry of labels asks for it.
const LABEL: &[u8] = b"EXPERIMENTAL weft introduction";

/// The binding of a connection whose handshake is done; the same at both ends.
///
/// # Errors
/// The handshake is not done.
pub fn binding<S: SideData>(connection: &ConnectionCommon<S>) -> Result<Binding, rustls::Error> {
    connection.export_keying_material(Binding::default(), LABEL, None)
}

/// Proves that the holder of this credential wants to be on that connection.
///
/// # Errors
/// The cryptographic library fails to sign.
pub fn prove(credential: &Credential, binding: &Binding) -> Result<Vec<u8>, rustls::Error> {
    let signer = credential.key().signer();
    let signer = signer.choose_scheme(&SIGNATURE_SCHEMES);
    let signer = signer.ok_or_else(|| rustls::Error::General("the leaf's key signs nothing".into()))?;
    signer.sign(&message(binding))
}

fn message(binding: &Binding) -> Vec<u8> {
    [DOMAIN, binding].concat()
}

impl CertificateAuthority {
    /// Who is introduced: the leaf's subject, if the leaf is this authority's and valid, and its key made the proof for this
    /// connection.
    ///
    /// # Errors
    /// It is not.
    pub fn recognize_introduced(
        &self,
        leaf: &CertificateDer<'_>,
        proof: &[u8],
        binding: &Binding,
        now: Timestamp,
    ) -> Result<PeerIdentity, RecognizeError> {
        let identity = PeerIdentity::from_certificate(leaf).map_err(RecognizeError::Leaf)?;
        let since_epoch = Duration::from_millis(u64::try_from(now.0).unwrap_or_default());
        let now = UnixTime::since_unix_epoch(since_epoch);
        verify::chain(leaf, &self.roots()?, now).map_err(RecognizeError::Untrusted)?;
        if !signed_by(leaf, &message(binding), proof) {
            return Err(RecognizeError::Proof);
        }
        Ok(identity)
    }
}

/// Whether the leaf's key signed the message, with the scheme that TLS 1.3 has for such a key.
fn signed_by(leaf: &CertificateDer<'_>, message: &[u8], signature: &[u8]) -> bool {
    let Ok(([], certificate)) = X509Certificate::from_der(leaf) else { return false };
    let key = certificate.public_key();
    let Some(algorithm) = algorithm(key) else { return false };
    UnparsedPublicKey::new(algorithm, key.subject_public_key.data.as_ref()).verify(message, signature).is_ok()
}

fn algorithm(key: &SubjectPublicKeyInfo<'_>) -> Option<&'static dyn VerificationAlgorithm> {
    if key.algorithm.algorithm == OID_SIG_ED25519 {
        return Some(&ED25519);
    }
    let curve = key.algorithm.parameters.as_ref()?.as_oid().ok()?;
    if curve == OID_EC_P256 {
        Some(&ECDSA_P256_SHA256_ASN1)
    } else if curve == OID_NIST_EC_P384 {
        Some(&ECDSA_P384_SHA384_ASN1)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spiffe::SpiffeId;

    const NOW: Timestamp = Timestamp(1_772_366_400_000);
    const HOUR: Duration = Duration::from_secs(3_600);

    fn authority() -> CertificateAuthority {
        CertificateAuthority::create(&"weft.test".parse().unwrap(), NOW).unwrap()
    }

    fn credential(authority: &CertificateAuthority) -> Credential {
        let id: SpiffeId = "spiffe://weft.test/ns/default/svc/api/inst/api-1".parse().unwrap();
        authority.issue_credential(&id.subject, NOW, HOUR).unwrap()
    }

    #[test]
    fn a_proof_is_good_for_its_connection_its_leaf_and_its_authority_only() {
        let authority = authority();
        let (own, other) = (credential(&authority), credential(&authority));
        let proof = prove(&own, &[7; 32]).unwrap();
        let recognized = |leaf: &Credential, proof: &[u8], binding: u8, now| {
            authority.recognize_introduced(leaf.leaf(), proof, &[binding; 32], now)
        };
        assert_eq!(recognized(&own, &proof, 7, NOW).unwrap().id, *own.spiffe_id());
        assert!(matches!(recognized(&own, &proof, 8, NOW), Err(RecognizeError::Proof)));
        assert!(matches!(recognized(&other, &proof, 7, NOW), Err(RecognizeError::Proof)));
        assert!(matches!(recognized(&own, &[], 7, NOW), Err(RecognizeError::Proof)));
        let after = NOW.after(HOUR * 2);
        assert!(matches!(recognized(&own, &proof, 7, after), Err(RecognizeError::Untrusted(_))));
        let elsewhere = self::authority();
        let foreign = elsewhere.recognize_introduced(own.leaf(), &proof, &[7; 32], NOW);
        assert!(matches!(foreign, Err(RecognizeError::Untrusted(_))));
    }

    #[test]
    fn what_is_no_leaf_introduces_nobody() {
        let authority = authority();
        let proof = prove(&credential(&authority), &[7; 32]).unwrap();
        for der in [&[][..], b"leaf", authority.root()] {
            let refused = authority.recognize_introduced(&der.into(), &proof, &[7; 32], NOW);
            assert!(matches!(refused, Err(RecognizeError::Leaf(_))));
        }
    }
}
