//! Past shapes of events of the `rollout` scope.

use super::{Candidate, RolloutBegun};
use crate::id::InstanceId;
use crate::scope::{SecurityScope, TrafficScope};
use crate::security::{SecurityPolicy, SecurityPolicyV1};
use crate::traffic::{TrafficPolicyV1, TrafficPolicyV2};
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
        policy: Option<SecurityPolicyV1>,
    },
}

/// With security policies of their schema 1.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RolloutBegunV2 {
    candidates: Vec<CandidateV2>,
    canaries: BTreeSet<InstanceId>,
    watch_ms: u32,
    tolerance_ppm: u32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum CandidateV2 {
    Traffic {
        scope: TrafficScope,
        #[serde(default)]
        policy: Option<TrafficPolicyV2>,
    },
    Security {
        scope: SecurityScope,
        #[serde(default)]
        policy: Option<SecurityPolicyV1>,
    },
}

/// With traffic policies of their schema 2.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RolloutBegunV3 {
    candidates: Vec<CandidateV3>,
    canaries: BTreeSet<InstanceId>,
    watch_ms: u32,
    tolerance_ppm: u32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum CandidateV3 {
    Traffic {
        scope: TrafficScope,
        #[serde(default)]
        policy: Option<TrafficPolicyV2>,
    },
    Security {
        scope: SecurityScope,
        #[serde(default)]
        policy: Option<SecurityPolicy>,
    },
}

impl From<RolloutBegunV1> for RolloutBegunV2 {
    fn from(past: RolloutBegunV1) -> Self {
        let RolloutBegunV1 { candidates, canaries, watch_ms, tolerance_ppm } = past;
        let candidates = candidates.into_iter().map(CandidateV2::from).collect();
        Self { candidates, canaries, watch_ms, tolerance_ppm }
    }
}

impl From<CandidateV1> for CandidateV2 {
    fn from(past: CandidateV1) -> Self {
        match past {
            CandidateV1::Traffic { scope, policy } => Self::Traffic { scope, policy: policy.map(Into::into) },
            CandidateV1::Security { scope, policy } => Self::Security { scope, policy },
        }
    }
}

impl From<RolloutBegunV2> for RolloutBegunV3 {
    fn from(past: RolloutBegunV2) -> Self {
        let RolloutBegunV2 { candidates, canaries, watch_ms, tolerance_ppm } = past;
        let candidates = candidates.into_iter().map(CandidateV3::from).collect();
        Self { candidates, canaries, watch_ms, tolerance_ppm }
    }
}

impl From<CandidateV2> for CandidateV3 {
    fn from(past: CandidateV2) -> Self {
        match past {
            CandidateV2::Traffic { scope, policy } => Self::Traffic { scope, policy },
            CandidateV2::Security { scope, policy } => {
                Self::Security { scope, policy: policy.map(Into::into) }
            }
        }
    }
}

impl From<RolloutBegunV3> for RolloutBegun {
    fn from(past: RolloutBegunV3) -> Self {
        let RolloutBegunV3 { candidates, canaries, watch_ms, tolerance_ppm } = past;
        let candidates = candidates.into_iter().map(Candidate::from).collect();
        Self { candidates, canaries, watch_ms, tolerance_ppm }
    }
}

impl From<CandidateV3> for Candidate {
    fn from(past: CandidateV3) -> Self {
        match past {
            CandidateV3::Traffic { scope, policy } => Self::Traffic { scope, policy: policy.map(Into::into) },
            CandidateV3::Security { scope, policy } => Self::Security { scope, policy },
        }
    }
}
