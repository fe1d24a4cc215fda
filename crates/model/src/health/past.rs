//! Past shapes of events of the `health` scope.

use super::{Health, HealthReported};
use serde::Deserialize;

/// From before there was damping.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HealthReportedV1 {
    health: Health,
    revision: u64,
    #[serde(default)]
    detail: String,
}

impl From<HealthReportedV1> for HealthReported {
    fn from(past: HealthReportedV1) -> Self {
        let HealthReportedV1 { health, revision, detail } = past;
        Self { health, revision, doubt: None, detail }
    }
}
