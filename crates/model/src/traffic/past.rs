//! Past shapes of events of the `traffic` scope.

use super::{
    Balance, CircuitLimits, ConnectPolicy, ConnectionPolicy, LocalityPolicy, OutlierPolicy, TrafficPolicy,
    TrafficPolicySet,
};
use serde::Deserialize;

/// From before anything but the choice and the connect could be set.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TrafficPolicySetV1 {
    policy: TrafficPolicyV1,
}

/// A policy of that time.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TrafficPolicyV1 {
    #[serde(default)]
    balance: BalanceV1,
    #[serde(default)]
    connect: ConnectPolicyV1,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum BalanceV1 {
    #[default]
    LeastConnections,
    RoundRobin,
    Random,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConnectPolicyV1 {
    timeout_ms: u32,
    retries: u8,
}

impl Default for ConnectPolicyV1 {
    fn default() -> Self {
        Self { timeout_ms: 1_000, retries: 2 }
    }
}

/// From before localities and subsets.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TrafficPolicySetV2 {
    policy: TrafficPolicyV2,
}

/// A policy of that time.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TrafficPolicyV2 {
    balance: Balance,
    slow_start_ms: u32,
    connect: ConnectPolicy,
    limits: CircuitLimits,
    outlier_detection: OutlierPolicy,
    connection: ConnectionPolicy,
}

impl From<TrafficPolicySetV1> for TrafficPolicySetV2 {
    fn from(past: TrafficPolicySetV1) -> Self {
        Self { policy: past.policy.into() }
    }
}

impl From<TrafficPolicyV1> for TrafficPolicyV2 {
    /// What was not said then is what nobody says now.
    fn from(past: TrafficPolicyV1) -> Self {
        let TrafficPolicyV1 { balance, connect: ConnectPolicyV1 { timeout_ms, retries } } = past;
        let balance = match balance {
            BalanceV1::LeastConnections => Balance::LeastConnections,
            BalanceV1::RoundRobin => Balance::RoundRobin,
            BalanceV1::Random => Balance::Random,
        };
        Self {
            balance,
            slow_start_ms: 0,
            connect: ConnectPolicy { timeout_ms, retries, ..ConnectPolicy::default() },
            limits: CircuitLimits::default(),
            outlier_detection: OutlierPolicy::default(),
            connection: ConnectionPolicy::default(),
        }
    }
}

impl From<TrafficPolicySetV2> for TrafficPolicySet {
    fn from(past: TrafficPolicySetV2) -> Self {
        Self { policy: past.policy.into() }
    }
}

impl From<TrafficPolicyV2> for TrafficPolicy {
    /// All were alike, as they are now if nobody says otherwise.
    fn from(past: TrafficPolicyV2) -> Self {
        let TrafficPolicyV2 { balance, slow_start_ms, connect, limits, outlier_detection, connection } = past;
        Self {
            balance,
            locality: LocalityPolicy::default(),
            subsets: Vec::new(),
            sticky_sources: false,
            slow_start_ms,
            connect,
            limits,
            outlier_detection,
            connection,
        }
    }
}
