//! The certificate authority: one self-signed root that signs leaves, and nothing between them.
//!
//! Responsible for making the root and for deciding every field of a leaf. A certificate signing request contributes a
//! public key ([`PublicKey`]); the name comes from the caller, who took it from a join token or from the leaf that is
//! renewed. Who may have which name, and recording what was issued, is the controller's business.
//!
//! Invariants: what is issued passes the rules that peers apply ([`PeerIdentity::from_certificate`]); no leaf outlives
//! the root; the private key is never part of an error, a `Debug` text or a returned value. Files are in [`store`].

pub mod store;
pub mod witness;

use crate::certificate::{PeerIdentity, PeerIdentityError, RootIdentity};
use crate::credential::{Credential, CredentialError};
use crate::fingerprint::Fingerprint;
use crate::key::{KeyError, LeafKey};
use crate::pem;
use crate::public_key::PublicKey;
use crate::spiffe::{self, SpiffeId, Subject};
use crate::tls::verify;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::time::Duration;
use weft_model::DnsName;
use weft_model::id::{InstanceId, TrustDomain};
use weft_model::time::Timestamp;
use zeroize::Zeroize;

/// How long a leaf lives unless something else is asked for. Short, so that a stolen one is soon worthless; long
/// enough to sit out an outage of the controllers, since it is renewed at half of it.
pub const LEAF_LIFETIME: Duration = Duration::from_secs(3600);

/// The longest life of a leaf. Thirty days suits a person's credential; more would need a revocation list.
pub const LEAF_LIFETIME_MAX: Duration = Duration::from_secs(30 * 86_400);

/// How far a certificate's start lies before its issue, so that a peer whose clock is behind by less accepts it.
pub const BACKDATE: Duration = Duration::from_secs(300);

/// How long after its end a leaf can still be renewed, for instances that lived through an outage of all controllers: a
/// weekend and some hours to notice. Later than that, joining again is a person's decision.
pub const EXPIRED_GRACE: Duration = Duration::from_secs(3 * 86_400);

/// Life of a root: ten years of 365 days.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Bytes of a serial number: the most that RFC 5280 (4.1.2.2) allows. 158 bits of it are random.
const SERIAL_BYTES: usize = 20;

/// The last second that X.509 can express: the end of the year 9999.
const SECONDS_MAX: u64 = 253_402_300_799;

/// A certificate cannot be issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The asked lifetime is shorter than a second or longer than [`LEAF_LIFETIME_MAX`].
    #[error("a leaf lives from one second to {} days, not {asked:?}", LEAF_LIFETIME_MAX.as_secs() / 86_400)]
    Lifetime {
        /// What was asked for.
        asked: Duration,
    },
    /// The root is not valid now: it has expired, or this machine's clock is wrong.
    #[error("the root is valid from {} to {}, and it is {} now; set this machine's clock, or replace the root",
        date(*not_before), date(*not_after), date(*now))]
    RootNotValid {
        /// The root's first moment.
        not_before: Timestamp,
        /// The root's last second.
        not_after: Timestamp,
        /// The time that was given.
        now: Timestamp,
    },
    /// The given time has no place in a certificate.
    #[error("the clock says {} ms since 1970, which no certificate can hold", now.0)]
    Clock {
        /// The time that was given.
        now: Timestamp,
    },
    /// The cryptographic library has no randomness.
    #[error("no randomness for a serial number")]
    Randomness,
    /// The cryptographic library refused to sign.
    #[error("the cryptographic library failed to sign")]
    Crypto(#[source] rcgen::Error),
    /// The issued certificate would be refused by peers.
    #[error("the issued certificate breaks the rules for leaves")]
    Unusable(#[source] PeerIdentityError),
    /// The issuing key cannot be made or used.
    #[error("no key")]
    Key(#[source] KeyError),
    /// The certificate and its key cannot be put together.
    #[error("the issued certificate cannot be used")]
    Credential(#[source] CredentialError),
}

/// An expired leaf does not entitle to a new one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RecognizeError {
    /// It is not a leaf of the mesh.
    #[error("the certificate is not a leaf of the mesh")]
    Leaf(#[source] PeerIdentityError),
    /// The root did not sign it.
    #[error("the certificate is not signed by the root")]
    Untrusted(#[source] rustls::Error),
    /// The signing request is for another key, so its sender need not be the leaf's holder.
    #[error("the certificate signing request is not for the certificate's key")]
    KeyMismatch,
    /// The proof is not by the leaf's key, or for another connection.
    #[error("the proof was not made with the certificate's key for this connection")]
    Proof,
    /// It is not valid yet, or ended longer than [`EXPIRED_GRACE`] ago.
    #[error("the certificate was valid until {}, too long ago to be renewed; join again with a new token", date(*not_after))]
    TooLate {
        /// The last second in which it was valid.
        not_after: Timestamp,
    },
}

/// A root certificate with its private key.
pub struct CertificateAuthority {
    root: CertificateDer<'static>,
    identity: RootIdentity,
    issuer: Issuer<'static, RootKey>,
}

/// A leaf, as its authority made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedLeaf {
    /// The certificate, in DER.
    pub certificate: CertificateDer<'static>,
    /// What it says: id, serial number, validity, key.
    pub identity: PeerIdentity,
}

impl IssuedLeaf {
    /// The certificate as PEM.
    #[must_use]
    pub fn to_pem(&self) -> String {
        pem::certificate(&self.certificate)
    }
}

impl CertificateAuthority {
    /// Makes a new root: P-256, ten years from `now`, allowed to sign leaves only.
    ///
    /// # Errors
    ///
    /// `now` has no place in a certificate, or the cryptographic library fails.
    pub fn create(trust_domain: &TrustDomain, now: Timestamp) -> Result<Self, IssueError> {
        let key = RootKey(KeyPair::generate().map_err(IssueError::Crypto)?);
        let serial = random_serial()?;
        let mut params = params(now, now.after(ROOT_LIFETIME)).ok_or(IssueError::Clock { now })?;
        // Roots of one mesh differ in name, so that a verifier that knows two of them tries the right one.
        let name = format!("weft root {}", hex::encode(&serial[..4]));
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.subject_alt_names = vec![uri(&spiffe::root_uri(trust_domain))?];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key.0).map_err(IssueError::Crypto)?.der().clone();
        let identity = RootIdentity::from_certificate(&root).ok_or(IssueError::Clock { now })?;
        Ok(Self { root, identity, issuer: Issuer::new(params, key) })
    }

    /// The mesh that this authority speaks for.
    #[must_use]
    pub const fn trust_domain(&self) -> &TrustDomain {
        &self.identity.trust_domain
    }

    /// The root certificate, which every member of the mesh trusts.
    #[must_use]
    pub const fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// The fingerprint of the root, as join tokens carry it.
    #[must_use]
    pub fn root_fingerprint(&self) -> Fingerprint {
        Fingerprint::of_certificate(&self.root)
    }

    /// The last second in which the root is valid; nothing can be issued afterwards.
    #[must_use]
    pub const fn not_after(&self) -> Timestamp {
        self.identity.not_after
    }

    /// Issues a leaf that names `subject` and carries `key`. It starts [`BACKDATE`] before `now` and ends `lifetime`
    /// after it, in whole seconds, or with the root if that ends earlier.
    ///
    /// # Errors
    ///
    /// A lifetime out of bounds, a root that is not valid at `now`, or a failure of the cryptographic library.
    pub fn issue_leaf(
        &self,
        subject: &Subject,
        key: &PublicKey,
        now: Timestamp,
        lifetime: Duration,
    ) -> Result<IssuedLeaf, IssueError> {
        if lifetime < Duration::from_secs(1) || lifetime > LEAF_LIFETIME_MAX {
            return Err(IssueError::Lifetime { asked: lifetime });
        }
        let RootIdentity { not_before, not_after, .. } = self.identity;
        if now < not_before || now >= not_after {
            return Err(IssueError::RootNotValid { not_before, not_after, now });
        }
        let id = SpiffeId { trust_domain: self.trust_domain().clone(), subject: subject.clone() };
        let mut params = params(now, now.after(lifetime).min(not_after)).ok_or(IssueError::Clock { now })?;
        params.serial_number = Some(SerialNumber::from_slice(&random_serial()?));
        params.subject_alt_names = names(&id)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate =
            params.signed_by(key.spki(), &self.issuer).map_err(IssueError::Crypto)?.der().clone();
        let identity = PeerIdentity::from_certificate(&certificate).map_err(IssueError::Unusable)?;
        Ok(IssuedLeaf { certificate, identity })
    }

    /// Who holds a leaf that has expired, if it ended at most [`EXPIRED_GRACE`] before `now`. In a handshake such a leaf
    /// proves nothing; here its holder proves itself by a signing request for the same key. A request that was
    /// overheard gains nobody anything: what is issued for it fits only the key of the one who made it. Whether the
    /// holder still belongs to the mesh is the caller's to check.
    ///
    /// # Errors
    ///
    /// The leaf is not this authority's, has another key, or ended too long ago.
    pub fn recognize_expired(
        &self,
        leaf: &CertificateDer<'_>,
        key: &PublicKey,
        now: Timestamp,
    ) -> Result<PeerIdentity, RecognizeError> {
        let identity = PeerIdentity::from_certificate(leaf).map_err(RecognizeError::Leaf)?;
        verify::chain_when_issued(leaf, &identity, &self.roots()?).map_err(RecognizeError::Untrusted)?;
        if identity.public_key_sha256 != key.fingerprint() {
            return Err(RecognizeError::KeyMismatch);
        }
        let (from, until) = (identity.not_before, identity.not_after.after(EXPIRED_GRACE));
        if now < from || now > until {
            return Err(RecognizeError::TooLate { not_after: identity.not_after });
        }
        Ok(identity)
    }

    pub(crate) fn roots(&self) -> Result<RootCertStore, RecognizeError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).map_err(RecognizeError::Untrusted)?;
        Ok(roots)
    }

    /// Makes a key and a leaf for it in one step: for a controller's own identity, and for operators on its machine.
    ///
    /// # Errors
    ///
    /// As [`issue_leaf`](Self::issue_leaf), and if no key can be made.
    pub fn issue_credential(
        &self,
        subject: &Subject,
        now: Timestamp,
        lifetime: Duration,
    ) -> Result<Credential, IssueError> {
        let key = LeafKey::generate().map_err(IssueError::Key)?;
        let public_key = key.public_key().map_err(IssueError::Key)?;
        let leaf = self.issue_leaf(subject, &public_key, now, lifetime)?;
        Credential::new(leaf.certificate, key, vec![self.root.clone()]).map_err(IssueError::Credential)
    }
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateAuthority")
            .field("trust_domain", self.trust_domain())
            .field("root", &self.root_fingerprint())
            .finish_non_exhaustive()
    }
}

/// The root's key pair, whose encoding is wiped from memory when it is dropped.
struct RootKey(KeyPair);

impl Drop for RootKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl rcgen::PublicKeyData for RootKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        rcgen::PublicKeyData::algorithm(&self.0)
    }
}

impl rcgen::SigningKey for RootKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

/// What all certificates have in common. `None` if a time has no place in a certificate.
fn params(now: Timestamp, not_after: Timestamp) -> Option<CertificateParams> {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let seconds =
        |time: Timestamp| u64::try_from(time.0 / 1000).ok().filter(|seconds| *seconds <= SECONDS_MAX);
    let not_before = seconds(now)?.checked_sub(BACKDATE.as_secs())?;
    let mut params = CertificateParams::default();
    params.not_before = epoch + Duration::from_secs(not_before);
    params.not_after = epoch + Duration::from_secs(seconds(not_after)?);
    // No common name in a leaf: some clients would take it for a host name.
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "weft");
    Some(params)
}

/// A time for people. One that has no date is shown as the number that it is.
fn date(time: Timestamp) -> String {
    match u64::try_from(time.0 / 1000) {
        Ok(seconds @ ..=SECONDS_MAX) => {
            (rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds)).to_string()
        }
        _ => format!("{} ms since 1970", time.0),
    }
}

/// What a leaf names: who it is, and for clients that know nothing of SPIFFE how DNS spells the service. All of it follows from the identity;
/// what a request asks for is never looked at.
fn names(id: &SpiffeId) -> Result<Vec<SanType>, IssueError> {
    let mut names = vec![uri(&id.to_string())?];
    if let Some(InstanceId { service, .. }) = id.as_instance() {
        for name in [DnsName::of(service.clone()).to_string(), DnsName::ports_of(service)] {
            names.push(SanType::DnsName(name.try_into().map_err(IssueError::Crypto)?));
        }
    }
    Ok(names)
}

fn uri(text: &str) -> Result<SanType, IssueError> {
    text.try_into().map(SanType::URI).map_err(IssueError::Crypto)
}

fn random_serial() -> Result<[u8; SERIAL_BYTES], IssueError> {
    let mut serial = [0; SERIAL_BYTES];
    aws_lc_rs::rand::fill(&mut serial).map_err(|_| IssueError::Randomness)?;
    // The first bit says that the number is positive, the second that it has its full length.
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(serial)
}

#[cfg(test)]
mod tests;
