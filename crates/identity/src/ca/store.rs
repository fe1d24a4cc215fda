//! The authority on disk: a directory with `root.crt`, for everybody, and `root.key`, for its owner alone.
//!
//! The directory appears as a whole: it is filled beside its final place and renamed, so there is never a key without
//! its certificate, and of two processes that start at once, one makes the root and the other finds it. The directory
//! itself can therefore not be a mount point; its parent can.

use super::{CertificateAuthority, IssueError, RootKey};
use crate::certificate::RootIdentity;
use crate::file::{self, FileError};
use crate::fingerprint::Fingerprint;
use crate::{key, pem};
use rcgen::{Issuer, KeyPair, PublicKeyData};
use rustls_pki_types::PrivatePkcs8KeyDer;
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use weft_model::id::TrustDomain;
use weft_model::time::Timestamp;
use zeroize::Zeroize;

/// The root certificate's file.
pub const ROOT_CERTIFICATE_FILE: &str = "root.crt";
/// The root key's file.
pub const ROOT_KEY_FILE: &str = "root.key";

/// Largest file of an authority in bytes: a root certificate as PEM has about 800.
const FILE_BYTES_MAX: u64 = 16 * 1024;

/// An authority cannot be kept or found.
#[derive(Debug, thiserror::Error)]
pub enum CaStoreError {
    /// A file cannot be read or written.
    #[error("the certificate authority cannot use its files")]
    File(#[source] FileError),
    /// There is already an authority; a second one would orphan every leaf of the first.
    #[error(
        "{dir} already holds files, and a certificate authority is never overwritten; use an empty directory"
    )]
    Exists {
        /// The directory.
        dir: PathBuf,
    },
    /// A file is there but is not what it should be.
    #[error("{path} is not {what}; restore it from a backup")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What belongs there.
        what: &'static str,
    },
    /// The certificate and the key are not a pair.
    #[error(
        "{ROOT_CERTIFICATE_FILE} and {ROOT_KEY_FILE} in {dir} are not a pair; restore both from one backup"
    )]
    KeyMismatch {
        /// The directory.
        dir: PathBuf,
    },
    /// The authority found belongs to another mesh.
    #[error(
        "the certificate authority in {dir} is for {found}, not {wanted}; name that trust domain or another directory"
    )]
    TrustDomain {
        /// The directory.
        dir: PathBuf,
        /// The trust domain asked for.
        wanted: TrustDomain,
        /// The trust domain of the root there.
        found: TrustDomain,
    },
    /// A new authority cannot be made.
    #[error("a certificate authority cannot be made")]
    Create(#[source] IssueError),
}

impl CertificateAuthority {
    /// Keeps the authority in `dir`, which must not exist or be empty, and becomes mode 0700.
    ///
    /// # Errors
    ///
    /// [`CaStoreError::Exists`] if there is something in `dir`, and what the file system refuses.
    pub fn save(&self, dir: &Path) -> Result<(), CaStoreError> {
        let parent = match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if !parent.exists() {
            file::create_private_dir(parent).map_err(CaStoreError::File)?;
        }
        let filled = tempfile::Builder::new()
            .prefix(".new-")
            .permissions(Permissions::from_mode(file::PRIVATE_DIR_MODE))
            .tempdir_in(parent)
            .map_err(file::io_error("create a directory in", parent))
            .map_err(CaStoreError::File)?;
        self.write(filled.path()).map_err(CaStoreError::File)?;
        // Renaming over a directory succeeds only if that is empty: here a race has its one winner.
        if let Err(error) = fs::rename(filled.path(), dir) {
            return Err(match error.kind() {
                ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
                    CaStoreError::Exists { dir: dir.to_owned() }
                }
                _ => CaStoreError::File(file::io_error("create", dir)(error)),
            });
        }
        // It has a new name, and nothing is left to clean up under the old one.
        let _ = filled.keep();
        file::sync_dir(parent).map_err(CaStoreError::File)
    }

    /// Finds the authority that [`save`](Self::save) left in `dir`.
    ///
    /// # Errors
    ///
    /// A file is missing, malformed, too large, or the key's file can be read by others; the two are not a pair.
    pub fn load(dir: &Path) -> Result<Self, CaStoreError> {
        let (certificate_path, key_path) = (dir.join(ROOT_CERTIFICATE_FILE), dir.join(ROOT_KEY_FILE));
        let not_a_root = || malformed(&certificate_path, "a Weft root certificate");
        let not_a_key = || malformed(&key_path, "a private key in PKCS#8 PEM");

        let certificate = file::read_public(&certificate_path, FILE_BYTES_MAX).map_err(CaStoreError::File)?;
        let root = pem::only_certificate(&certificate).ok_or_else(not_a_root)?;
        let identity = RootIdentity::from_certificate(&root).ok_or_else(not_a_root)?;

        let bytes = file::read_private(&key_path, FILE_BYTES_MAX).map_err(CaStoreError::File)?;
        let mut der = pem::private_key(&bytes).ok_or_else(not_a_key)?;
        let pair = KeyPair::try_from(&PrivatePkcs8KeyDer::from(der.secret_pkcs8_der()));
        der.zeroize();
        let key = RootKey(pair.map_err(|_| not_a_key())?);

        if Fingerprint::of_public_key(&key.subject_public_key_info()) != identity.public_key_sha256 {
            return Err(CaStoreError::KeyMismatch { dir: dir.to_owned() });
        }
        let issuer = Issuer::from_ca_cert_der(&root, key).map_err(|_| not_a_root())?;
        Ok(Self { root, identity, issuer })
    }

    /// Finds the authority in `dir`, or makes one there if `dir` is empty or absent. Where something of one is left,
    /// a new one is never made.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load) and [`save`](Self::save); [`CaStoreError::TrustDomain`] if the one found is another
    /// mesh's.
    pub fn load_or_create(
        dir: &Path,
        trust_domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<Self, CaStoreError> {
        let authority = match Self::create_in_empty(dir, trust_domain, now)? {
            Some(authority) => authority,
            None => Self::load(dir)?,
        };
        if authority.trust_domain() == trust_domain {
            return Ok(authority);
        }
        Err(CaStoreError::TrustDomain {
            dir: dir.to_owned(),
            wanted: trust_domain.clone(),
            found: authority.trust_domain().clone(),
        })
    }

    /// A new authority in `dir`, unless there is something in it.
    fn create_in_empty(
        dir: &Path,
        trust_domain: &TrustDomain,
        now: Timestamp,
    ) -> Result<Option<Self>, CaStoreError> {
        let empty = match fs::read_dir(dir) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) if error.kind() == ErrorKind::NotFound => true,
            Err(error) => return Err(CaStoreError::File(file::io_error("read", dir)(error))),
        };
        if !empty {
            return Ok(None);
        }
        let authority = Self::create(trust_domain, now).map_err(CaStoreError::Create)?;
        match authority.save(dir) {
            Ok(()) => Ok(Some(authority)),
            Err(CaStoreError::Exists { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write(&self, dir: &Path) -> Result<(), FileError> {
        let key = key::pkcs8_pem(&self.issuer.key().0);
        file::create(&dir.join(ROOT_KEY_FILE), file::PRIVATE_FILE_MODE, key.as_bytes())?;
        let certificate = pem::certificate(&self.root);
        let path = dir.join(ROOT_CERTIFICATE_FILE);
        file::create(&path, file::PUBLIC_FILE_MODE, certificate.as_bytes())?;
        file::sync_dir(dir)
    }
}

fn malformed(path: &Path, what: &'static str) -> CaStoreError {
    CaStoreError::Malformed { path: path.to_owned(), what }
}
