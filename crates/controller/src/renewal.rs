//! The controller's own leaf: issued by itself, replaced from half of its life.

use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use weft_identity::ca::{CertificateAuthority, IssueError, LEAF_LIFETIME};
use weft_identity::credential::Credential;
use weft_identity::spiffe::Subject;
use weft_identity::tls::TlsIdentity;
use weft_model::Name;
use weft_projector::Chain;

use crate::clock;

/// Pause after a renewal failed; there is half an hour to repeat it.
const RETRY: Duration = Duration::from_secs(10);

/// A fresh leaf for the controller called `name`.
pub(crate) fn own_credential(
    authority: &CertificateAuthority,
    name: &Name,
) -> Result<Credential, IssueError> {
    authority.issue_credential(&Subject::Controller(name.clone()), clock::now(), LEAF_LIFETIME)
}

/// Renews the leaf in time, until `drain`.
pub(crate) async fn keep_renewed(
    identity: TlsIdentity,
    authority: Arc<CertificateAuthority>,
    name: Name,
    drain: CancellationToken,
) {
    let work = async {
        loop {
            // The middle of the window: a controller has no fleet to spread.
            let due = identity.current().renew_at(u32::MAX / 2);
            sleep(due.since(clock::now())).await;
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
