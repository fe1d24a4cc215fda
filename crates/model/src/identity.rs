//! The `identity` scope: the leaves issued to one instance.

use crate::event::event_family;
use crate::time::Timestamp;
use serde::{Deserialize, Serialize};

event_family! {
    /// What can happen in an `identity` scope.
    IdentityEvent { LeafIssued = 1 }
}

/// The instance got a leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeafIssued {
    /// The certificate's serial number, in hex.
    pub serial: String,
    /// SHA-256 of its public key, in hex.
    pub public_key_sha256: String,
    /// First moment of its validity.
    pub not_before: Timestamp,
    /// Last moment of its validity.
    pub not_after: Timestamp,
}

/// A leaf that was signed and shall be recorded before it is handed out.
pub type IdentityCommand = LeafIssued;

/// The newest leaf, if one was issued.
pub type IdentityState = Option<LeafIssued>;

/// Decides a command: every signed leaf is recorded.
#[must_use]
pub fn decide(leaf: &IdentityCommand) -> Vec<IdentityEvent> {
    vec![leaf.clone().into()]
}

/// The state after an event.
#[must_use]
pub fn apply(_state: IdentityState, event: &IdentityEvent) -> IdentityState {
    match event {
        IdentityEvent::LeafIssued(leaf) => Some(leaf.clone()),
    }
}
