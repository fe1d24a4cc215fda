//! The `ca` scope: the roots that the mesh trusts.

use crate::event::event_family;
use crate::id::TrustDomain;
use crate::rejection::Rejection;
use serde::{Deserialize, Serialize};

/// Most roots that are trusted at once: the old one, the new one, and room for a rotation that was broken off.
pub const ROOTS_MAX: usize = 4;
/// Longest root certificate, PEM, in bytes; one with a P-256 key has about 700.
pub const CERTIFICATE_BYTES_MAX: usize = 8 * 1024;

event_family! {
    /// What can happen in the `ca` scope.
    CaEvent { RootAdded = 1 }
}

/// The mesh trusts one more root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootAdded {
    /// The name that all its identities start with.
    pub trust_domain: TrustDomain,
    /// The root certificate, PEM.
    pub certificate_pem: String,
    /// SHA-256 of the certificate's DER form, in hex.
    pub sha256: String,
}

/// A root that someone wants to be trusted.
pub type CaCommand = RootAdded;

/// The trusted roots, oldest first.
pub type CaState = Vec<RootAdded>;

/// Decides a command.
///
/// # Errors
/// If the root cannot be trusted beside those that are.
pub fn decide(state: &CaState, wanted: &CaCommand) -> Result<Vec<CaEvent>, Rejection> {
    if state.iter().any(|root| root.sha256 == wanted.sha256) {
        return Ok(Vec::new());
    }
    if let Some(other) = state.iter().find(|root| root.trust_domain != wanted.trust_domain) {
        let rule =
            format!("this mesh is {}; a root of another trust domain cannot join it", other.trust_domain);
        return Err(Rejection::invalid("trust_domain", rule));
    }
    if wanted.certificate_pem.len() > CERTIFICATE_BYTES_MAX {
        return Err(Rejection::invalid("certificate_pem", format!("at most {CERTIFICATE_BYTES_MAX} bytes")));
    }
    if state.len() >= ROOTS_MAX {
        return Err(Rejection::invalid("roots", format!("at most {ROOTS_MAX} are trusted at once")));
    }
    Ok(vec![wanted.clone().into()])
}

/// The state after an event.
#[must_use]
pub fn apply(mut state: CaState, event: &CaEvent) -> CaState {
    match event {
        CaEvent::RootAdded(root) => state.push(root.clone()),
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(domain: &str, sha256: &str) -> RootAdded {
        RootAdded {
            trust_domain: domain.parse().unwrap(),
            certificate_pem: String::new(),
            sha256: sha256.into(),
        }
    }

    #[test]
    fn roots_of_one_trust_domain_add_up_within_a_bound() {
        let mut state = CaState::new();
        for n in 0..ROOTS_MAX {
            let events = decide(&state, &root("weft.local", &n.to_string())).unwrap();
            assert_eq!(events.len(), 1);
            state = events.iter().fold(state, apply);
        }
        assert_eq!(decide(&state, &root("weft.local", "0")), Ok(vec![]));
        assert!(decide(&state, &root("weft.local", "new")).is_err());
        assert!(decide(&state[..1].to_vec(), &root("other.local", "new")).is_err());
    }
}
