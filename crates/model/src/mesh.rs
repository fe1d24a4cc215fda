//! The `mesh` scope: defaults that hold where nothing nearer says otherwise, and what happened to the mesh as a whole.

mod past;

use crate::damping::{self, DampingSettings};
use crate::event::event_family;
use crate::rejection::Rejection;
use crate::security::Action;
use past::MeshDefaultsSetV1;
use serde::{Deserialize, Serialize};

/// Bounds of the propagation bound, in milliseconds: below, a healthy mesh would always be late; above, the
/// bound says nothing.
const PROPAGATION_BOUND_MS: std::ops::RangeInclusive<u32> = 10..=3_600_000;

event_family! {
    /// What can happen in the `mesh` scope.
    MeshEvent { MeshDefaultsSet = 2 from [MeshDefaultsSetV1], HistoryAdopted = 1 }
}

/// These defaults hold from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeshDefaultsSet {
    /// All of them.
    pub defaults: MeshDefaults,
}

/// The log had lost events that were seen, and an operator decided to go on without them. The first event of the epoch that
/// the decision opened: with it every sidecar's wanted version is newer than any of the lost history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistoryAdopted {
    /// The epoch that was opened.
    pub epoch: u64,
    /// The last position that the lost history and the adopted one can have in common.
    pub fork_position: u64,
}

/// Defaults of the whole mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeshDefaults {
    /// What happens to a connection that no rule and no policy's default decides.
    pub security: Action,
    /// How soon after its append a change shall be applied by every sidecar, in milliseconds.
    pub propagation_bound_ms: u32,
    /// How endpoints are damped whose health flaps.
    pub damping: DampingSettings,
}

impl Default for MeshDefaults {
    /// Nobody may connect until a rule says so; one second to reach everybody; flapping endpoints are damped.
    fn default() -> Self {
        Self { security: Action::Deny, propagation_bound_ms: 1_000, damping: DampingSettings::default() }
    }
}

/// The defaults that someone wants.
pub type MeshCommand = MeshDefaults;

/// The defaults in force.
pub type MeshState = MeshDefaults;

/// Decides a command.
///
/// # Errors
/// If a value is out of its range.
pub fn decide(state: &MeshState, wanted: &MeshCommand) -> Result<Vec<MeshEvent>, Rejection> {
    if !PROPAGATION_BOUND_MS.contains(&wanted.propagation_bound_ms) {
        return Err(Rejection::invalid("propagation_bound", "from 10 ms to 1 h"));
    }
    damping::check(&wanted.damping)?;
    if wanted == state { Ok(Vec::new()) } else { Ok(vec![MeshDefaultsSet { defaults: *wanted }.into()]) }
}

/// The state after an event.
#[must_use]
pub const fn apply(state: MeshState, event: &MeshEvent) -> MeshState {
    match event {
        MeshEvent::MeshDefaultsSet(MeshDefaultsSet { defaults }) => *defaults,
        MeshEvent::HistoryAdopted(_) => state,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_deny() {
        assert_eq!(MeshDefaults::default().security, Action::Deny);
    }

    #[test]
    fn a_bound_that_nobody_could_keep_is_refused() {
        let wanted = MeshDefaults { propagation_bound_ms: 1, ..MeshDefaults::default() };
        assert!(decide(&MeshDefaults::default(), &wanted).is_err());
    }

    #[test]
    fn an_adopted_history_keeps_the_defaults() {
        let state = MeshState { propagation_bound_ms: 70, ..MeshState::default() };
        let event = HistoryAdopted { epoch: 3, fork_position: 7 }.into();
        assert_eq!(apply(state, &event), state);
    }

    #[test]
    fn setting_what_holds_already_changes_nothing() {
        let state = MeshDefaults::default();
        assert_eq!(decide(&state, &state), Ok(vec![]));
    }
}
