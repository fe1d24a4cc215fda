//! Past shapes of events of the `rollout` scope.

use super::{Candidate, RolloutBegun};
use crate::id::InstanceId;
use crate::scope::{SecurityScope, TrafficScope};
use crate::security::SecurityPolicy;
use crate::traffic::TrafficPolicyV1;
use serde::Deserialize;
use std::collections::BTreeSet;

/// With traffic policies of their schema 1.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RolloutBegunV1 {
    candidates: Vec<CandidateV1>,
    canaries: BTreeSet<InstanceId>,
    watch_ms: u32,
    tolerance_ppm: u32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum CandidateV1 {
    Traffic {
        scope: TrafficScope,
        #[serde(default)]
        policy: Option<TrafficPolicyV1>,
    },
    Security {
        scope: SecurityScope,
        #[serde(default)]
        policy: Option<SecurityPolicy>,
    },
}

impl From<RolloutBegunV1> for RolloutBegun {
    fn from(past: RolloutBegunV1) -> Self {
        let RolloutBegunV1 { candidates, canaries, watch_ms, tolerance_ppm } = past;
        let candidates = candidates.into_iter().map(Candidate::from).collect();
        Self { candidates, canaries, watch_ms, tolerance_ppm }
    }
}

impl From<CandidateV1> for Candidate {
    fn from(past: CandidateV1) -> Self {
        match past {
            CandidateV1::Traffic { scope, policy } => Self::Traffic { scope, policy: policy.map(Into::into) },
            CandidateV1::Security { scope, policy } => Self::Security { scope, policy },
        }
    }
}
