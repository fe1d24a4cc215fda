//! How the sidecar learns who it is and what to run: [`join`] gets an identity and keeps it fresh, [`own`] holds it,
//! [`subscribe`] registers the instance and follows the controller's notices,
//! [`keep`] and [`disk`] keep the last good one; [`witness`] keeps what it was told of the log's end.
//!
//! The data path never waits for anything here. Without a controller all of it fails and is tried again, and the last
//! good snapshot goes on (I5).

pub(crate) mod canary;
pub(crate) mod disk;
pub(crate) mod join;
pub(crate) mod keep;
pub(crate) mod own;
pub(crate) mod subscribe;
pub(crate) mod witness;

use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Response, Status};
use weft_client::CallError;

/// Longest that a call may take; a full snapshot over a slow line fits.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// The answer to a call, within [`CALL_TIMEOUT`].
async fn answer<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, CallError> {
    match timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(CallError::Unreachable(format!("no answer within {CALL_TIMEOUT:?}"))),
    }
}

/// A channel on which a controller sends notices to the registered instance. Each new one, and each registration on
/// one, has a higher number.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) channel: Channel,
    pub(crate) number: u64,
}

/// The session of the moment; none before the first. It may be broken: its users see that when they call.
pub(crate) type Sessions = watch::Receiver<Option<Session>>;
