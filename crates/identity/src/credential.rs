//! What a member of the mesh holds: a leaf, its private key, and the roots it trusts; in memory and on disk.
//!
//! A [`Credential`] is checked when it is made: the key is the leaf's, the leaf follows the rules for leaves and is
//! signed by one of the roots. Whether it is valid *now* is not checked, since an expired one is what a renewal starts
//! from. On disk it is one file, replaced as a whole, so key, leaf and roots always belong together.

use crate::certificate::{PeerIdentity, PeerIdentityError, RootIdentity};
use crate::file::{self, FileError};
use crate::key::LeafKey;
use crate::spiffe::{SpiffeId, Subject};
use crate::tls::verify;
use crate::{ca, pem};
use rustls::RootCertStore;
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use weft_model::time::Timestamp;
use zeroize::{Zeroize, Zeroizing};

/// The file in a credential's directory.
pub const CREDENTIAL_FILE: &str = "identity.pem";

pub use weft_model::ca::ROOTS_MAX;

/// Largest credential file in bytes: a key, a leaf and [`ROOTS_MAX`] roots of about 1 KiB each, several times over.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Renewal falls into the middle fifth of a leaf's life: as soon as half of it is over, give or take a tenth.
const RENEWAL_SPREAD_TENTHS: u128 = 2;

/// Parts of a credential do not belong together, or its file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The certificate is not a leaf of the mesh.
    #[error("the certificate is not a leaf of the mesh")]
    Leaf(#[source] PeerIdentityError),
    /// There are no roots, or more than [`ROOTS_MAX`].
    #[error("a credential has 1 to {ROOTS_MAX} roots, not {count}")]
    RootCount {
        /// How many were given.
        count: usize,
    },
    /// A root is not an authority's certificate for the leaf's trust domain.
    #[error("root {index} of the credential is not a root of the leaf's trust domain")]
    Root {
        /// Which one, from zero.
        index: usize,
    },
    /// The key is not the one in the leaf.
    #[error("the private key does not belong to the certificate")]
    KeyMismatch,
    /// No root signed the leaf.
    #[error("the certificate is signed by none of the roots")]
    Untrusted(#[source] rustls::Error),
    /// The file cannot be read or written.
    #[error("the credential's file cannot be used")]
    File(#[source] FileError),
    /// The file is not a private key followed by certificates.
    #[error("{path} is not a private key and certificates in PEM; remove it and join again with a new token")]
    Malformed {
        /// The file.
        path: PathBuf,
    },
}

impl CredentialError {
    /// Whether there is no credential on disk at all, so that joining is the next step.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::File(error) if error.is_absent())
    }
}

/// A leaf with its private key and the roots that its holder trusts. `Debug` shows the name and the dates only.
pub struct Credential {
    identity: PeerIdentity,
    key: LeafKey,
    roots: Vec<CertificateDer<'static>>,
    certified: Arc<CertifiedKey>,
    anchors: RootCertStore,
}

impl Credential {
    /// Puts a leaf, its key and the roots together.
    ///
    /// # Errors
    ///
    /// They do not belong together, or one of them is not what it should be.
    pub fn new(
        leaf: CertificateDer<'static>,
        key: LeafKey,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, CredentialError> {
        let identity = PeerIdentity::from_certificate(&leaf).map_err(CredentialError::Leaf)?;
        let anchors = anchors(&roots, &identity.id)?;
        verify::chain_when_issued(&leaf, &identity, &anchors).map_err(CredentialError::Untrusted)?;

        let mut presented = vec![leaf];
        if let Subject::Controller(_) = identity.id.subject {
            // Who joins knows a root by its fingerprint only, and gets the root itself from the controller.
            presented.extend(roots.iter().cloned());
        }
        let certified = CertifiedKey::new(presented, key.signer());
        certified.keys_match().map_err(|_| CredentialError::KeyMismatch)?;
        Ok(Self { identity, key, roots, certified: Arc::new(certified), anchors })
    }

    /// The same leaf and key with other roots: a step of a root rotation.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); above all, the leaf's own root must stay among them.
    pub fn with_roots(&self, roots: Vec<CertificateDer<'static>>) -> Result<Self, CredentialError> {
        Self::new(self.leaf().clone(), self.key.clone(), roots)
    }

    /// Who the holder is.
    #[must_use]
    pub const fn spiffe_id(&self) -> &SpiffeId {
        &self.identity.id
    }

    /// What the leaf says: id, serial number, validity, key.
    #[must_use]
    pub const fn identity(&self) -> &PeerIdentity {
        &self.identity
    }

    /// The leaf, in DER.
    #[must_use]
    pub fn leaf(&self) -> &CertificateDer<'static> {
        // The leaf comes first in what is presented, by construction.
        &self.certified.cert[0]
    }

    /// The private key: a renewal of an expired leaf is asked for with the same one.
    #[must_use]
    pub const fn key(&self) -> &LeafKey {
        &self.key
    }

    /// The roots that the holder trusts.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// The last second in which the leaf is valid.
    #[must_use]
    pub const fn expires_at(&self) -> Timestamp {
        self.identity.not_after
    }

    /// When to renew: half of the leaf's life after its issue, give or take a tenth of it. `random` is any number,
    /// drawn anew per leaf; it spreads a fleet that joined at once.
    #[must_use]
    pub fn renew_at(&self, random: u32) -> Timestamp {
        // The life began with the issue, not with the backdated start. A leaf of foreign make may be shorter than that.
        let issued = self.identity.not_before.after(ca::BACKDATE).min(self.expires_at());
        let lifetime_ms = self.expires_at().since(issued).as_millis();
        let spread_ms = lifetime_ms * RENEWAL_SPREAD_TENTHS / 10;
        let offset_ms = (spread_ms * u128::from(random)) >> 32;
        let earliest_ms = (lifetime_ms - spread_ms) / 2;
        issued.after(Duration::from_millis(u64::try_from(earliest_ms + offset_ms).unwrap_or(u64::MAX)))
    }

    /// Keeps the credential in `dir`, in place of the one that was there. The directory is made if needed (0700); the
    /// file is 0600, and after a crash holds the old credential or the new one.
    ///
    /// # Errors
    ///
    /// What the file system refuses.
    pub fn save(&self, dir: &Path) -> Result<(), CredentialError> {
        let mut text: Zeroizing<String> = self.key.to_pem();
        let certificates = std::iter::once(self.leaf()).chain(&self.roots).map(pem::certificate);
        // One allocation for the whole, so that growing it does not leave the key behind.
        let certificates: String = certificates.collect();
        let mut file = Zeroizing::new(String::with_capacity(text.len() + 1 + certificates.len()));
        file.push_str(text.trim_end());
        file.push('\n');
        file.push_str(&certificates);
        text.zeroize();
        file::replace_private(&dir.join(CREDENTIAL_FILE), file.as_bytes()).map_err(CredentialError::File)
    }

    /// Finds the credential that [`save`](Self::save) left in `dir`, expired or not.
    ///
    /// # Errors
    ///
    /// [`CredentialError::is_absent`] if there is none; else the file is damaged, or readable by others.
    pub fn load(dir: &Path) -> Result<Self, CredentialError> {
        let path = dir.join(CREDENTIAL_FILE);
        let bytes = file::read_private(&path, FILE_BYTES_MAX).map_err(CredentialError::File)?;
        let malformed = || CredentialError::Malformed { path: path.clone() };
        let mut der = pem::private_key(&bytes).ok_or_else(malformed)?;
        let key = LeafKey::from_pkcs8(der.secret_pkcs8_der());
        der.zeroize();
        let mut certificates = pem::certificates(&bytes).ok_or_else(malformed)?.into_iter();
        let leaf = certificates.next().ok_or_else(malformed)?;
        Self::new(leaf, key.map_err(|_| malformed())?, certificates.collect())
    }

    pub(crate) const fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }

    pub(crate) const fn anchors(&self) -> &RootCertStore {
        &self.anchors
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("identity", &self.identity)
            .field("roots", &self.roots.len())
            .finish_non_exhaustive()
    }
}

fn anchors(roots: &[CertificateDer<'static>], id: &SpiffeId) -> Result<RootCertStore, CredentialError> {
    if roots.is_empty() || roots.len() > ROOTS_MAX {
        return Err(CredentialError::RootCount { count: roots.len() });
    }
    let mut anchors = RootCertStore::empty();
    for (index, root) in roots.iter().enumerate() {
        let known =
            RootIdentity::from_certificate(root).is_some_and(|root| root.trust_domain == id.trust_domain);
        if !known || anchors.add(root.clone()).is_err() {
            return Err(CredentialError::Root { index });
        }
    }
    Ok(anchors)
}

#[cfg(test)]
mod tests;
