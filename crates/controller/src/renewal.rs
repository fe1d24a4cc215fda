//! The credentials that a controller issues for itself, its own leaf and the admin's: replaced from half of their life.

use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use weft_identity::ca::{CertificateAuthority, IssueError, LEAF_LIFETIME};
use weft_identity::credential::Credential;
use weft_identity::spiffe::Subject;
use weft_identity::tls::TlsIdentity;
use weft_model::Chain;
use weft_model::Name;

use crate::clock;
use crate::operator::AdminCredential;

/// Pause after a renewal failed; there is half an hour to repeat it.
const RETRY: Duration = Duration::from_secs(10);

/// When to renew within the window for it: a controller has no fleet to spread.
pub(crate) const RENEW_MIDDLE: u32 = u32::MAX / 2;

/// A fresh leaf for the controller called `name`.
pub(crate) fn own_credential(
    authority: &CertificateAuthority,
    name: &Name,
) -> Result<Credential, IssueError> {
    authority.issue_credential(&Subject::Controller(name.clone()), clock::now(), LEAF_LIFETIME)
}

/// Renews the leaf in time, until `drain`, and looks each time whether the admin credential is due: that lives for days.
pub(crate) async fn keep_renewed(
    identity: TlsIdentity,
    authority: Arc<CertificateAuthority>,
    name: Name,
    mut admin: AdminCredential,
    drain: CancellationToken,
) {
    let work = async {
        loop {
            let due = identity.current().renew_at(RENEW_MIDDLE);
            sleep(due.since(clock::now())).await;
            match admin.renew_if_due(&authority, clock::now()) {
                Ok(true) => tracing::info!(dir = %admin.dir().display(), "renewed the admin credential"),
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(error = format!("{error:#}"), "the admin credential is not renewed yet");
                }
            }
            let renewed = own_credential(&authority, &name).map(|credential| identity.replace(credential));
            match renewed {
                Ok(Ok(())) => tracing::info!("renewed this controller's leaf"),
                Ok(Err(error)) => {
                    tracing::error!(error = %Chain(&error), "this controller's leaf cannot be replaced");
                    sleep(RETRY).await;
                }
                Err(error) => {
                    tracing::error!(error = %Chain(&error), "this controller's leaf cannot be renewed");
                    sleep(RETRY).await;
                }
            }
        }
    };
    drain.run_until_cancelled(work).await;
}
