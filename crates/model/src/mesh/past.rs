//! Past shapes of events of the `mesh` scope.

use super::{MeshDefaults, MeshDefaultsSet};
use crate::damping::DampingSettings;
use crate::security::Action;
use serde::Deserialize;

/// From before damping could be set.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MeshDefaultsSetV1 {
    defaults: MeshDefaultsV1,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MeshDefaultsV1 {
    security: Action,
    propagation_bound_ms: u32,
}

impl From<MeshDefaultsSetV1> for MeshDefaultsSet {
    fn from(past: MeshDefaultsSetV1) -> Self {
        let MeshDefaultsSetV1 { defaults: MeshDefaultsV1 { security, propagation_bound_ms } } = past;
        Self {
            defaults: MeshDefaults { security, propagation_bound_ms, damping: DampingSettings::default() },
        }
    }
}
