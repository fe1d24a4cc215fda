//! The `traffic` scope: how connections to a service are spread and opened.

use crate::event::event_family;
use crate::rejection::Rejection;
use crate::scope::{Scope, TrafficScope};
use serde::{Deserialize, Serialize};

/// Longest connect timeout, in milliseconds: past it an application has given up long ago.
pub const CONNECT_TIMEOUT_MS_MAX: u32 = 60_000;
/// Most further endpoints that one connection may be tried on.
pub const CONNECT_RETRIES_MAX: u8 = 10;

event_family! {
    /// What can happen in a `traffic` scope.
    TrafficEvent { TrafficPolicySet = 1, TrafficPolicyDeleted = 1 }
}

/// This policy holds from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrafficPolicySet {
    /// The whole policy.
    pub policy: TrafficPolicy,
}

/// The scope has no policy of its own any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrafficPolicyDeleted {}

/// How connections to a service are spread over its endpoints and opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrafficPolicy {
    /// How an endpoint is chosen.
    #[serde(default)]
    pub balance: Balance,
    /// How a connection to it is opened.
    #[serde(default)]
    pub connect: ConnectPolicy,
}

/// How an endpoint is chosen among the eligible ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// The one with fewer live connections of two random ones (power of two choices).
    #[default]
    LeastConnections,
    /// One after the other.
    RoundRobin,
    /// Any, with equal probability.
    Random,
}

impl Balance {
    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LeastConnections => "least_connections",
            Self::RoundRobin => "round_robin",
            Self::Random => "random",
        }
    }
}

/// How a connection to an endpoint is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectPolicy {
    /// How long one attempt may take, TCP, TLS and the upstream's app together, in milliseconds.
    pub timeout_ms: u32,
    /// How many other endpoints are tried after a failed attempt, before the first byte.
    pub retries: u8,
}

impl Default for ConnectPolicy {
    /// One second is far above any healthy connect inside a region; two retries reach a live endpoint when one
    /// of three is dead, without waiting long when all are.
    fn default() -> Self {
        Self { timeout_ms: 1_000, retries: 2 }
    }
}

/// What someone wants of a traffic policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrafficCommand {
    /// Replace the policy.
    Put(TrafficPolicy),
    /// Remove it.
    Delete,
}

/// The policy, if the scope has one.
pub type TrafficState = Option<TrafficPolicy>;

/// Decides a command. That the services are declared is checked where all scopes are seen.
///
/// # Errors
/// If the policy makes no sense, or there is none to delete.
pub fn decide(
    scope: &TrafficScope,
    state: &TrafficState,
    command: &TrafficCommand,
) -> Result<Vec<TrafficEvent>, Rejection> {
    match (command, state) {
        (TrafficCommand::Put(wanted), Some(current)) if wanted == current => Ok(Vec::new()),
        (TrafficCommand::Put(wanted), _) => {
            validate(wanted)?;
            Ok(vec![TrafficPolicySet { policy: *wanted }.into()])
        }
        (TrafficCommand::Delete, Some(_)) => Ok(vec![TrafficPolicyDeleted {}.into()]),
        (TrafficCommand::Delete, None) => Err(Rejection::Absent(Scope::Traffic(scope.clone()))),
    }
}

/// The state after an event.
#[must_use]
pub fn apply(_state: TrafficState, event: &TrafficEvent) -> TrafficState {
    match event {
        TrafficEvent::TrafficPolicySet(TrafficPolicySet { policy }) => Some(*policy),
        TrafficEvent::TrafficPolicyDeleted(TrafficPolicyDeleted {}) => None,
    }
}

fn validate(policy: &TrafficPolicy) -> Result<(), Rejection> {
    let ConnectPolicy { timeout_ms, retries } = policy.connect;
    if timeout_ms == 0 || timeout_ms > CONNECT_TIMEOUT_MS_MAX {
        let rule = format!("from 1 ms to {} s", CONNECT_TIMEOUT_MS_MAX / 1_000);
        return Err(Rejection::invalid("connect.timeout", rule));
    }
    if retries > CONNECT_RETRIES_MAX {
        return Err(Rejection::invalid("connect.retries", format!("at most {CONNECT_RETRIES_MAX}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope() -> TrafficScope {
        "default/api".parse().unwrap()
    }

    #[test]
    fn a_policy_is_set_kept_replaced_and_deleted() {
        let first = TrafficPolicy::default();
        let second = TrafficPolicy { balance: Balance::Random, ..first };
        let put = |policy| TrafficCommand::Put(policy);
        let set = |policy| vec![TrafficEvent::from(TrafficPolicySet { policy })];
        assert_eq!(decide(&scope(), &None, &put(first)), Ok(set(first)));
        assert_eq!(decide(&scope(), &Some(first), &put(first)), Ok(vec![]));
        assert_eq!(decide(&scope(), &Some(first), &put(second)), Ok(set(second)));
        let deleted = decide(&scope(), &Some(first), &TrafficCommand::Delete).unwrap();
        assert_eq!(deleted.iter().fold(Some(first), apply), None);
        assert!(decide(&scope(), &None, &TrafficCommand::Delete).is_err());
    }

    #[test]
    fn timeouts_and_retries_are_bounded() {
        for (timeout_ms, retries) in [(0, 0), (CONNECT_TIMEOUT_MS_MAX + 1, 0), (1, CONNECT_RETRIES_MAX + 1)] {
            let policy =
                TrafficPolicy { connect: ConnectPolicy { timeout_ms, retries }, ..TrafficPolicy::default() };
            assert!(decide(&scope(), &None, &TrafficCommand::Put(policy)).is_err());
        }
    }
}
