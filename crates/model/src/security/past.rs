//! Past shapes of events of the `security` scope.

use super::{Action, Mode, Rule, SecurityPolicy, SecurityPolicySet};
use serde::Deserialize;

/// From before it could be said what happens to live connections.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SecurityPolicySetV1 {
    policy: SecurityPolicyV1,
}

/// A policy of that time.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SecurityPolicyV1 {
    #[serde(default)]
    default: Option<Action>,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    rules: Vec<Rule>,
}

impl From<SecurityPolicySetV1> for SecurityPolicySet {
    fn from(past: SecurityPolicySetV1) -> Self {
        Self { policy: past.policy.into() }
    }
}

impl From<SecurityPolicyV1> for SecurityPolicy {
    /// Nobody said anything, and they were cut, as they are now if nobody does.
    fn from(past: SecurityPolicyV1) -> Self {
        let SecurityPolicyV1 { default, mode, rules } = past;
        Self { default, mode, on_change: None, rules }
    }
}
