//! The `health` scope: what an instance's sidecar last observed of its app. Newer observations replace older ones,
//! ordered by a revision that the observer raises.
//!
//! Of an endpoint that flaps, observations are counted and recorded together. When that begins and ends depends on more
//! than this scope (its service, the settings), so it is decided in `weft-routing`'s `damping`.

mod past;

use crate::event::event_family;
use crate::rejection::Rejection;
use past::HealthReportedV1;
use serde::{Deserialize, Serialize};

/// Longest detail text of an observation, in bytes; longer ones are refused, not cut.
pub const DETAIL_BYTES_MAX: usize = 256;
/// Highest degree in which an observer doubts itself.
pub const DOUBT_MAX: u8 = 7;

event_family! {
    /// What can happen in a `health` scope.
    HealthEvent {
        HealthReported = 2 from [HealthReportedV1],
        FlapsSummarized = 1,
        DampingReleased = 1,
        DampingOverridden = 1,
    }
}

/// Someone observed the instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealthReported {
    /// What was seen.
    pub health: Health,
    /// Orders the observations of this instance; a later one has a higher revision.
    pub revision: u64,
    /// How much the observer doubted itself, from 0 to [`DOUBT_MAX`]. None if it could not say: those are observations from
    /// before there was damping, which does not count them, so that their log folds to what it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doubt: Option<u8>,
    /// What was seen, in words, such as `connection refused`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// The instance was observed so often, while it flapped, that a controller counted and recorded only this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlapsSummarized {
    /// How often it went from healthy to unhealthy.
    pub downs: u32,
    /// How often it went from unhealthy to healthy.
    pub ups: u32,
    /// Within how long, in milliseconds.
    pub over_ms: u32,
    /// The last observation, which is as if it had been recorded by itself.
    pub last: HealthReported,
}

/// The endpoint is not held down any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DampingReleased {
    /// Why.
    pub cause: ReleaseCause,
    /// The points that it had left.
    pub penalty: u64,
}

/// Why an endpoint is not held down any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseCause {
    /// It calmed down.
    Calm,
    /// Damping was switched off.
    Off,
}

impl ReleaseCause {
    /// The cause in words.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Calm => "it calmed down",
            Self::Off => "damping was switched off",
        }
    }
}

/// The endpoint is not held down any more, because its service needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DampingOverridden {
    /// The points that it had.
    pub penalty: u64,
    /// How many endpoints of its service took new connections.
    pub usable: u32,
    /// Out of so many that were ready and observed.
    pub of: u32,
    /// How many were held down.
    pub held: u32,
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

/// What someone wants of an instance's health.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthCommand {
    /// Record an observation.
    Report(HealthReported),
    /// Record what a controller counted.
    Summarize(FlapsSummarized),
    /// Let an endpoint go that is held down, if it is time.
    Reconsider,
}

/// The last observation, if there is one.
pub type HealthState = Option<HealthReported>;

/// Decides a report. That the instance takes part is checked where all scopes are seen.
///
/// # Errors
/// If the report is stale, or says nothing that can be recorded.
pub fn decide(state: &HealthState, report: &HealthReported) -> Result<Vec<HealthEvent>, Rejection> {
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
    check(report)?;
    Ok(vec![report.clone().into()])
}

/// Decides what a controller counted.
///
/// # Errors
/// If a later observation is recorded already, in which case the counts say nothing new about how the instance is.
pub fn decide_summary(state: &HealthState, summary: &FlapsSummarized) -> Result<Vec<HealthEvent>, Rejection> {
    if let Some(current) = state
        && summary.last.revision <= current.revision
    {
        return Err(Rejection::StaleObservation { current: current.revision });
    }
    check(&summary.last)?;
    Ok(vec![summary.clone().into()])
}

/// Whether an observation says something that can be recorded.
///
/// # Errors
/// If it does not.
pub fn check(report: &HealthReported) -> Result<(), Rejection> {
    if report.revision == u64::MAX {
        return Err(Rejection::invalid("revision", "leaves no room for a higher one"));
    }
    if report.health == Health::Unknown {
        return Err(Rejection::invalid("health", "healthy or unhealthy"));
    }
    if report.doubt.is_some_and(|doubt| doubt > DOUBT_MAX) {
        return Err(Rejection::invalid("doubt", format!("from 0 to {DOUBT_MAX}")));
    }
    if report.detail.len() > DETAIL_BYTES_MAX || report.detail.chars().any(char::is_control) {
        let rule = format!("printable, at most {DETAIL_BYTES_MAX} bytes");
        return Err(Rejection::invalid("detail", rule));
    }
    Ok(())
}

/// The state after an event.
#[must_use]
pub fn apply(state: HealthState, event: &HealthEvent) -> HealthState {
    match event {
        HealthEvent::HealthReported(report) => Some(report.clone()),
        HealthEvent::FlapsSummarized(summary) => Some(summary.last.clone()),
        HealthEvent::DampingReleased(_) | HealthEvent::DampingOverridden(_) => state,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(health: Health, revision: u64) -> HealthReported {
        HealthReported { health, revision, doubt: Some(0), detail: String::new() }
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
        let doubtful = HealthReported { doubt: Some(8), ..report(Health::Healthy, 1) };
        assert!(decide(&None, &doubtful).is_err());
    }

    #[test]
    fn counts_come_with_the_last_observation_or_not_at_all() {
        let summary = |revision| {
            let last = report(Health::Healthy, revision);
            FlapsSummarized { downs: 5, ups: 5, over_ms: 10_000, last }
        };
        let state = Some(report(Health::Unhealthy, 5));
        let events = decide_summary(&state, &summary(6)).unwrap();
        assert_eq!(apply(state.clone(), &events[0]), Some(report(Health::Healthy, 6)));
        assert_eq!(decide_summary(&state, &summary(5)), Err(Rejection::StaleObservation { current: 5 }));
    }
}
