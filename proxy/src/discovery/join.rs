//! The sidecar's identity: the one on disk, or a first one for the join token; and a new leaf before the old one ends.
//!
//! Renewal replaces the leaf in place: handshakes from then on show the new one, live connections never notice. A
//! controller that cannot be reached is asked again; what it refuses for good is an error for the operator.
//!
//! A leaf that ended meanwhile (the machine was off, the control plane away) is renewed all the same: no handshake takes
//! it any more, so it is shown inside the request. If it ended too long ago, the join token is the last resort.

use super::own::Own;
use super::{Sessions, answer};
use crate::clock;
use crate::config::Config;
use crate::metrics;
use crate::shared::Shared;
use rand::Rng;
use rustls_pki_types::CertificateDer;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::sleep;
use tonic::Code;
use weft_client::{ALPN, Backoff, CallError, command};
use weft_identity::credential::{Credential, CredentialError};
use weft_identity::fingerprint::Fingerprint;
use weft_identity::key::{KeyError, LeafKey};
use weft_identity::tls::{ExpectedPeer, join_config};
use weft_identity::token::JoinToken;
use weft_model::{Chain, InstanceId};
use weft_proto::v1::identity_client::IdentityClient;
use weft_proto::v1::{JoinRequest, LeafResponse, RenewRequest};

/// The directory of the credential in the state directory.
const IDENTITY_DIR: &str = "identity";

/// What is written to see whether a credential could be: more than one has.
const PROOF_BYTES: usize = 4096;

/// Longest sleep before the clock is looked at again: a machine that was suspended renews soon after it wakes.
const CLOCK_CHECK: Duration = Duration::from_secs(30);

/// The sidecar cannot become who it is to be.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// There is no identity and no way to get one.
    #[error(
        "{instance} has no identity in {dir} and no join token; create one with `weft token create --service {}` and give it with --join-token-file",
        instance.service
    )]
    NoToken {
        /// Who it is to be.
        instance: InstanceId,
        /// The state directory.
        dir: PathBuf,
    },
    /// The controller does not take the token.
    #[error("the controller refuses the join token: {reason}; create a new one with `weft token create --service {}`", instance.service)]
    Refused {
        /// Who it is to be.
        instance: InstanceId,
        /// The controller's words.
        reason: String,
    },
    /// The identity in the state directory is somebody else's.
    #[error("the identity in {dir} is {found}, not {instance}; give each instance its own --state-dir")]
    Foreign {
        /// Who it is to be.
        instance: InstanceId,
        /// Whose identity it is.
        found: String,
        /// The state directory.
        dir: PathBuf,
    },
    /// What is on disk, or what the controller sent, is no credential.
    #[error("the identity cannot be used")]
    Credential(#[from] CredentialError),
    /// What the token gives could not be kept. It was not used.
    #[error("cannot write the state directory {dir}; make it writable or give another --state-dir")]
    StateDir {
        /// The state directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No key can be made.
    #[error("no private key can be made")]
    Key(#[from] KeyError),
}

/// The identity on disk, or a new one for the token. Waits for a controller if it needs one and none is there.
///
/// # Errors
/// If waiting does not help.
pub(crate) async fn obtain(config: &Config, rng: &mut impl Rng) -> Result<Credential, JoinError> {
    let dir = identity_dir(config);
    match Credential::load(&dir) {
        Ok(credential) => {
            check_name(&credential, config)?;
            match &config.join_token {
                Some(token) if !knows(&credential, token) => {
                    rejoin(config, token, credential, &dir, rng).await
                }
                Some(_) | None => Ok(credential),
            }
        }
        Err(error) if error.is_absent() => {
            let token = config.join_token.as_ref().ok_or_else(|| JoinError::NoToken {
                instance: config.instance.clone(),
                dir: config.state_dir.clone(),
            })?;
            join(config, token, &dir, rng).await
        }
        Err(error) => Err(error.into()),
    }
}

/// The identity on disk.
///
/// # Errors
/// If there is none, or it is another instance's.
pub(crate) fn stored(config: &Config) -> Result<Credential, JoinError> {
    let credential = Credential::load(&identity_dir(config))?;
    check_name(&credential, config)?;
    Ok(credential)
}

/// Whether the token's authority is one that the credential believes. It is not, if the mesh was made anew.
fn knows(credential: &Credential, token: &JoinToken) -> bool {
    credential.roots().iter().any(|root| Fingerprint::of_certificate(root) == token.root())
}

/// Joins the mesh of another authority. A token that this one does not take is an old one, left in the configuration.
async fn rejoin(
    config: &Config,
    token: &JoinToken,
    credential: Credential,
    dir: &Path,
    rng: &mut impl Rng,
) -> Result<Credential, JoinError> {
    tracing::info!("the join token is of another authority than the stored identity; joining anew");
    match join(config, token, dir, rng).await {
        Err(error @ JoinError::Refused { .. }) => {
            tracing::warn!(%error, "going on with the stored identity");
            Ok(credential)
        }
        joined => joined,
    }
}

/// A token works once: what it gives shall not be lost to a directory that cannot be written. Leaves nothing behind.
fn prove_writable(state_dir: &Path, dir: &Path) -> io::Result<()> {
    let (new_state_dir, new_dir) = (!state_dir.exists(), !dir.exists());
    let proof = dir.join("write-proof");
    let written = DirBuilder::new().recursive(true).mode(0o700).create(dir).and_then(|()| {
        let mut file = File::create(&proof)?;
        file.write_all(&[0; PROOF_BYTES])?;
        file.sync_all()
    });
    // What is not there cannot be removed, and need not be.
    let _ = fs::remove_file(&proof);
    if new_dir {
        let _ = fs::remove_dir(dir);
    }
    if new_state_dir {
        let _ = fs::remove_dir(state_dir);
    }
    written
}

async fn join(
    config: &Config,
    token: &JoinToken,
    dir: &Path,
    rng: &mut impl Rng,
) -> Result<Credential, JoinError> {
    prove_writable(&config.state_dir, dir)
        .map_err(|source| JoinError::StateDir { dir: config.state_dir.clone(), source })?;
    let key = LeafKey::generate()?;
    // Repeated with the same id and key: if the answer to the first attempt was lost, the next one gets it.
    let request = JoinRequest {
        meta: Some(command("the sidecar starts")),
        token: token.reveal().to_string(),
        instance: config.instance.to_string(),
        csr: key.csr_der()?.into(),
    };
    let tls = join_config(token.root(), ALPN);
    let mut client = IdentityClient::new(weft_client::channel(config.controllers.clone(), tls));
    let mut backoff = Backoff::new();
    loop {
        match answer(client.join(request.clone())).await {
            Ok(answer) => {
                let credential = credential(&answer, key)?;
                check_name(&credential, config)?;
                credential.save(dir)?;
                tracing::info!(identity = %credential.spiffe_id(), "joined the mesh");
                return Ok(credential);
            }
            Err(error) if is_passing(&error) => {
                let wait = backoff.next(rng);
                tracing::warn!(%error, ?wait, "cannot join yet; is a controller running at --controller?");
                sleep(wait).await;
            }
            Err(error) => {
                let instance = config.instance.clone();
                return Err(JoinError::Refused { instance, reason: error.to_string() });
            }
        }
    }
}

/// Whether asking again may help.
fn is_passing(error: &CallError) -> bool {
    match error {
        // Until an operator has decided, nothing is recorded, a leaf neither.
        error if error.is_rewound() => true,
        CallError::Other { code, .. } => {
            matches!(
                code,
                Code::DeadlineExceeded | Code::Internal | Code::Unknown | Code::Cancelled | Code::Aborted
            )
        }
        error => error.is_transient(),
    }
}

fn check_name(credential: &Credential, config: &Config) -> Result<(), JoinError> {
    let id = credential.spiffe_id();
    if id.as_instance() == Some(&config.instance) {
        return Ok(());
    }
    let found = id.to_string();
    Err(JoinError::Foreign { instance: config.instance.clone(), found, dir: config.state_dir.clone() })
}

fn credential(answer: &LeafResponse, key: LeafKey) -> Result<Credential, CredentialError> {
    let der = |bytes: &[u8]| CertificateDer::from(bytes.to_vec());
    let leaf = answer.chain.first().map(|leaf| der(leaf)).unwrap_or_else(|| der(&[]));
    Credential::new(leaf, key, answer.roots.iter().map(|root| der(root)).collect())
}

/// Keeps the leaf fresh, for ever: renews it from half of its life on, as spread as the fleet's leaves are.
pub(crate) async fn keep_fresh(
    config: &Config,
    own: &Own,
    shared: &Shared,
    sessions: &Sessions,
    rng: &mut impl Rng,
) {
    let mut backoff = Backoff::new();
    loop {
        let current = own.tls.current();
        metrics::leaf(current.expires_at());
        let renew_at = current.renew_at(rng.next_u32());
        loop {
            let left = renew_at.since(clock::now());
            if left.is_zero() {
                break;
            }
            sleep(left.min(CLOCK_CHECK)).await;
        }
        let mut told = false;
        while let Err(error) = renew(config, own, sessions).await {
            if has_ended(&own.tls.current())
                && error.is_final()
                && let Some(token) = &config.join_token
            {
                tracing::warn!(%error, "the ended leaf is not renewed, joining anew");
                match join(config, token, &identity_dir(config), rng).await {
                    Ok(credential) => match own.renew(credential).await {
                        Ok(()) => break,
                        Err(error) => tracing::error!(%error, "the new identity cannot be used"),
                    },
                    Err(error) => tracing::error!(error = %Chain(&error), "cannot join anew"),
                }
            }
            let wait = backoff.next(rng);
            if told {
                tracing::debug!(%error, ?wait, "leaf still not renewed");
            } else {
                tracing::warn!(%error, expires = %clock::rfc3339(current.expires_at()), "leaf not renewed; trying on");
                told = true;
            }
            sleep(wait).await;
        }
        // The answer may have been under way while a snapshot brought newer roots.
        if let Some(snapshot) = shared.snapshot() {
            own.trust(&snapshot.trust).await;
        }
        backoff.reset();
    }
}

/// Where the credential is.
pub(crate) fn identity_dir(config: &Config) -> PathBuf {
    config.state_dir.join(IDENTITY_DIR)
}

/// A renewal did not work this time.
#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error("not connected to a controller")]
    NoSession,
    #[error("{0}")]
    Call(#[from] CallError),
    #[error("the new leaf cannot be used: {0}")]
    Credential(#[from] CredentialError),
    #[error("{0}")]
    Key(#[from] KeyError),
    #[error("{0}")]
    Identity(#[from] weft_identity::tls::IdentityChanged),
}

impl RenewError {
    /// Whether the controller will say the same again.
    fn is_final(&self) -> bool {
        matches!(self, Self::Call(error) if !is_passing(error))
    }
}

fn has_ended(credential: &Credential) -> bool {
    clock::now() > credential.expires_at()
}

async fn renew(config: &Config, own: &Own, sessions: &Sessions) -> Result<(), RenewError> {
    let current = own.tls.current();
    let (channel, key, ended_leaf, why) = if has_ended(&current) {
        let tls = own.tls.anonymous_client_config(ExpectedPeer::Controller, ALPN);
        let channel = weft_client::channel(config.controllers.clone(), tls);
        (channel, current.key().clone(), current.leaf().to_vec(), "the leaf has ended")
    } else {
        let session = sessions.borrow().clone().ok_or(RenewError::NoSession)?;
        (session.channel, LeafKey::generate()?, Vec::new(), "half of the leaf's life is over")
    };
    let csr = key.csr_der()?.into();
    let request = RenewRequest { meta: Some(command(why)), csr, ended_leaf: ended_leaf.into() };
    let answer = answer(IdentityClient::new(channel).renew(request)).await?;
    let credential = credential(&answer, key)?;
    let expires = clock::rfc3339(credential.expires_at());
    own.renew(credential).await?;
    tracing::info!(%expires, "leaf renewed");
    Ok(())
}
