//! The `health` scope: what an instance's sidecar last observed of its app. Newer observations replace older ones,
//! ordered by a revision that the observer raises.

use crate::event::event_family;
use crate::rejection::Rejection;
use serde::{Deserialize, Serialize};

/// Longest detail text of an observation, in bytes; longer ones are refused, not cut.
pub const DETAIL_BYTES_MAX: usize = 256;

event_family! {
    /// What can happen in a `health` scope.
    HealthEvent { HealthReported = 1 }
}

/// Someone observed the instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthReported {
    /// What was seen.
    pub health: Health,
    /// Orders the observations of this instance; a later one has a higher revision.
    pub revision: u64,
    /// What was seen, in words, such as `connection refused`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// Whether an instance can serve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Nobody looked yet. Such an instance gets no traffic.
    #[default]
    Unknown,
    /// It can.
    Healthy,
    /// It cannot.
    Unhealthy,
}

impl Health {
    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// What someone observed of an instance.
pub type HealthCommand = HealthReported;

/// The last observation, if there is one.
pub type HealthState = Option<HealthReported>;

/// Decides a report. That the instance takes part is checked where all scopes are seen.
///
/// # Errors
/// If the report is stale, or says nothing that can be recorded.
pub fn decide(state: &HealthState, report: &HealthCommand) -> Result<Vec<HealthEvent>, Rejection> {
    if let Some(current) = state
        && report.revision <= current.revision
    {
        // The same report again is a repeat whose answer was lost, not a stale one.
        return if report == current {
            Ok(Vec::new())
        } else {
            Err(Rejection::StaleObservation { current: current.revision })
        };
    }
    if report.revision == u64::MAX {
        return Err(Rejection::invalid("revision", "leaves no room for a higher one"));
    }
    if report.health == Health::Unknown {
        return Err(Rejection::invalid("health", "healthy or unhealthy"));
    }
    if report.detail.len() > DETAIL_BYTES_MAX || report.detail.chars().any(char::is_control) {
        let rule = format!("printable, at most {DETAIL_BYTES_MAX} bytes");
        return Err(Rejection::invalid("detail", rule));
    }
    Ok(vec![report.clone().into()])
}

/// The state after an event.
#[must_use]
pub fn apply(_state: HealthState, event: &HealthEvent) -> HealthState {
    match event {
        HealthEvent::HealthReported(report) => Some(report.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(health: Health, revision: u64) -> HealthReported {
        HealthReported { health, revision, detail: String::new() }
    }

    #[test]
    fn only_a_higher_revision_counts() {
        let state = Some(report(Health::Healthy, 5));
        let down = report(Health::Unhealthy, 6);
        assert_eq!(decide(&state, &down), Ok(vec![down.clone().into()]));
        for revision in [4, 5] {
            assert_eq!(
                decide(&state, &report(Health::Unhealthy, revision)),
                Err(Rejection::StaleObservation { current: 5 })
            );
        }
        assert_eq!(decide(&state, &report(Health::Healthy, 5)), Ok(vec![]));
    }

    #[test]
    fn an_observation_says_something_printable() {
        assert!(decide(&None, &report(Health::Unknown, 1)).is_err());
        assert!(decide(&None, &report(Health::Healthy, u64::MAX)).is_err());
        let noisy = HealthReported { detail: "a\nb".into(), ..report(Health::Healthy, 1) };
        assert!(decide(&None, &noisy).is_err());
    }
}
