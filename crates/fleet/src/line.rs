//! The connection that some sidecars share; or the one of a single sidecar.
//!
//! It is opened by whoever needs it first, with that one's leaf, and again by whoever first finds it broken.

use tokio::sync::Mutex;
use weft_client::{ALPN, CallError, Introduced, Relay};
use weft_identity::tls::{ExpectedPeer, TlsIdentity};

use crate::Mesh;

#[derive(Debug)]
pub(crate) struct Line {
    mesh: Mesh,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    /// How often it was opened.
    number: u64,
    relay: Option<Relay>,
    /// Whose leaf it was opened with.
    owner: usize,
}

/// A sidecar's share of a line.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    /// Which opening of the line it is of.
    pub(crate) number: u64,
    pub(crate) channel: Introduced,
}

impl Line {
    pub(crate) fn new(mesh: &Mesh) -> Self {
        Self { mesh: mesh.clone(), open: Mutex::default() }
    }

    /// A session of the sidecar `index`, on an opening of the line after number `after`.
    pub(crate) async fn session(
        &self,
        index: usize,
        identity: &TlsIdentity,
        after: u64,
    ) -> Result<Session, CallError> {
        let (relay, number, owner) = {
            let mut open = self.open.lock().await;
            if open.number <= after || open.relay.is_none() {
                open.relay = None;
                let tls = identity.client_config(ExpectedPeer::Controller, ALPN);
                let relay = Relay::connect(self.mesh.controllers.clone(), tls).await?;
                *open = Open { number: open.number + 1, relay: Some(relay), owner: index };
            }
            // It was put there, or was there.
            (open.relay.clone(), open.number, open.owner)
        };
        let relay = relay.ok_or_else(|| CallError::Unreachable("the line is not open".into()))?;
        let channel = if owner == index { relay.own() } else { relay.introduce(&identity.current()).await? };
        Ok(Session { number, channel })
    }
}
