//! The sidecar's own identity: what is in use, and its copy on disk. Two tasks change it, a renewal and a snapshot with
//! other roots; here they do it one after the other, so that neither undoes what the other did.
//!
//! What is in use comes first: a disk that refuses or hangs costs a restart its newest leaf, never the running sidecar.

use super::keep::DISK_WAIT;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use weft_identity::credential::Credential;
use weft_identity::tls::{IdentityChanged, TlsIdentity};
use weft_model::Chain;
use weft_routing::shard::TrustShard;

/// See the module's documentation.
pub(crate) struct Own {
    pub(crate) tls: TlsIdentity,
    /// There is a new leaf: connections that live long are to be opened again with it.
    pub(crate) renewed: Notify,
    dir: PathBuf,
    changing: Mutex<()>,
    writing: Arc<Mutex<()>>,
}

impl Own {
    pub(crate) fn new(tls: TlsIdentity, dir: PathBuf) -> Self {
        Self { tls, renewed: Notify::new(), dir, changing: Mutex::default(), writing: Arc::default() }
    }

    /// Uses another leaf from the next handshake on, and keeps it.
    pub(crate) async fn renew(&self, credential: Credential) -> Result<(), IdentityChanged> {
        {
            let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
            self.tls.replace(credential)?;
        }
        self.renewed.notify_one();
        self.save().await;
        Ok(())
    }

    /// Believes the roots that a snapshot lists, from the next handshake on, and keeps them.
    pub(crate) async fn trust(&self, trust: &TrustShard) {
        match self.believe(trust) {
            Ok(false) => {}
            Ok(true) => {
                tracing::info!(roots = trust.roots_pem.len(), "trusted roots changed");
                self.save().await;
            }
            Err(error) => {
                tracing::error!(error, "the snapshot's roots cannot be used; those in use stay");
            }
        }
    }

    /// True if they are others than before.
    fn believe(&self, trust: &TrustShard) -> Result<bool, String> {
        let roots = roots(trust).ok_or("one is no certificate")?;
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.tls.current();
        if current.roots() == roots {
            return Ok(false);
        }
        // A set without the own root would make this sidecar a stranger; such a set is not taken.
        let credential = current.with_roots(roots).map_err(|error| Chain(&error).to_string())?;
        self.tls.replace(credential).map_err(|error| error.to_string())?;
        Ok(true)
    }

    /// Waits until nothing is being written.
    pub(crate) async fn written(&self) {
        let writing = Arc::clone(&self.writing);
        let wait = move || drop(writing.lock().unwrap_or_else(PoisonError::into_inner));
        if let Err(error) = spawn_blocking(wait).await {
            tracing::error!(%error, "it is not known whether the identity is on disk");
        }
    }

    /// Writes what is in use at that moment: who writes last writes the newest.
    async fn save(&self) {
        let (tls, dir, writing) = (self.tls.clone(), self.dir.clone(), Arc::clone(&self.writing));
        let write = spawn_blocking(move || {
            let _one = writing.lock().unwrap_or_else(PoisonError::into_inner);
            tls.current().save(&dir)
        });
        let error = match timeout(DISK_WAIT, write).await {
            Ok(Ok(Ok(()))) => return,
            Ok(Ok(Err(error))) => Chain(&error).to_string(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("the disk did not take it within {DISK_WAIT:?}"),
        };
        tracing::error!(error, "the identity in use is not on disk; a restart may have to join anew");
    }
}

/// Whether a snapshot is of the authority that the credential is of. A mesh that was made anew may have the same name.
pub(crate) fn same_authority(credential: &Credential, trust: &TrustShard) -> bool {
    roots(trust).is_some_and(|roots| roots.iter().any(|root| credential.roots().contains(root)))
}

fn roots(trust: &TrustShard) -> Option<Vec<CertificateDer<'static>>> {
    let parsed = trust.roots_pem.iter().map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()));
    parsed.map(|root| root.ok().map(CertificateDer::into_owned)).collect()
}
