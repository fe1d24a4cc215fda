//! How soon an event has to reach sidecars: at once if somebody may lose something by it, else a moment later together with what
//! else happens. By the event alone, so every controller says the same. The order of events never changes: what is urgent takes
//! along whatever waits before it.

use weft_model::Event;
use weft_model::ca::CaEvent;
use weft_model::health::{Health, HealthEvent};
use weft_model::identity::IdentityEvent;
use weft_model::membership::MembershipEvent;
use weft_model::mesh::MeshEvent;
use weft_model::rollout::RolloutEvent;
use weft_model::security::{Action, SecurityEvent};
use weft_model::service::ServiceEvent;
use weft_model::token::TokenEvent;
use weft_model::traffic::TrafficEvent;

/// See the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// It may wait a moment for company: an endpoint that comes, a policy that only steers, what no sidecar sees at all.
    Coalesced,
    /// At once: an endpoint that goes, what may not be passed any more.
    Urgent,
}

impl Lane {
    /// The lane of an event.
    #[must_use]
    pub const fn of(event: &Event) -> Self {
        match event {
            Event::Service(ServiceEvent::ServiceDeleted(_))
            | Event::Membership(
                MembershipEvent::InstanceDraining(_)
                | MembershipEvent::InstanceDeregistered(_)
                // A connection waits for it.
                | MembershipEvent::UpstreamAdded(_),
            )
            // Every one of them may deny: a rule says so, or an allowing one is not there any more. Which it is takes the state
            // before, and they are too few to be worth a wait.
            | Event::Security(
                SecurityEvent::SecurityPolicySet(_) | SecurityEvent::SecurityPolicyDeleted(_),
            )
            // It may deny, as its policies may, or take back what does.
            | Event::Rollout(
                RolloutEvent::RolloutBegun(_)
                | RolloutEvent::RolloutAdvanced(_)
                | RolloutEvent::RolloutAborted(_),
            )
            // A service needs it.
            | Event::Health(HealthEvent::DampingOverridden(_))
            // It ends an outage.
            | Event::Mesh(MeshEvent::HistoryAdopted(_)) => Self::Urgent,
            Event::Health(HealthEvent::HealthReported(report)) => Self::of_health(report.health),
            Event::Health(HealthEvent::FlapsSummarized(summary)) => Self::of_health(summary.last.health),
            Event::Mesh(MeshEvent::MeshDefaultsSet(set)) => match set.defaults.security {
                Action::Deny => Self::Urgent,
                Action::Allow => Self::Coalesced,
            },
            Event::Service(ServiceEvent::ServiceDeclared(_))
            | Event::Membership(MembershipEvent::InstanceRegistered(_))
            | Event::Health(HealthEvent::DampingReleased(_))
            | Event::Traffic(TrafficEvent::TrafficPolicySet(_) | TrafficEvent::TrafficPolicyDeleted(_))
            | Event::Ca(CaEvent::RootAdded(_))
            | Event::Identity(IdentityEvent::LeafIssued(_))
            | Event::Token(TokenEvent::JoinTokenCreated(_) | TokenEvent::JoinTokenRedeemed(_)) => {
                Self::Coalesced
            }
        }
    }

    const fn of_health(health: Health) -> Self {
        match health {
            Health::Unhealthy | Health::Unknown => Self::Urgent,
            Health::Healthy => Self::Coalesced,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_model::health::HealthReported;
    use weft_model::membership::InstanceDraining;
    use weft_model::mesh::{MeshDefaults, MeshDefaultsSet};
    use weft_model::security::{SecurityPolicy, SecurityPolicySet};

    #[test]
    fn who_loses_something_does_not_wait() {
        let report = |health| {
            let detail = String::new();
            Event::Health(HealthReported { health, revision: 1, doubt: Some(0), detail }.into())
        };
        let defaults = |security| {
            let defaults = MeshDefaults { security, ..MeshDefaults::default() };
            Event::Mesh(MeshDefaultsSet { defaults }.into())
        };
        for urgent in [
            report(Health::Unhealthy),
            Event::Membership(InstanceDraining {}.into()),
            Event::Security(SecurityPolicySet { policy: SecurityPolicy::default() }.into()),
            defaults(Action::Deny),
        ] {
            assert_eq!(Lane::of(&urgent), Lane::Urgent, "{urgent:?}");
        }
        for calm in [report(Health::Healthy), defaults(Action::Allow)] {
            assert_eq!(Lane::of(&calm), Lane::Coalesced, "{calm:?}");
        }
    }
}
