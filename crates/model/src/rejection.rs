//! Why a command is refused by a rule of the mesh. Nothing was changed.

use crate::id::{InstanceId, Port, ServiceName};
use crate::scope::Scope;
use crate::time::Timestamp;
use std::net::Ipv4Addr;

/// A command that a rule refuses, with what to do next.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The command needs something in the scope, and there is nothing.
    #[error("{0} does not exist")]
    Absent(Scope),
    /// The command names a service that nobody declared.
    #[error("service {0} is not declared; declare it first, or in the same apply")]
    UnknownService(ServiceName),
    /// A service with instances cannot be deleted.
    #[error("service {service} still has {instances} instance(s); deregister them first")]
    ServiceInUse {
        /// The service.
        service: ServiceName,
        /// How many instances are ready or draining.
        instances: usize,
    },
    /// Two services cannot share a virtual address.
    #[error("address {address} already belongs to {owner}; choose another, or leave it out to get one")]
    AddressTaken {
        /// The wanted address.
        address: Ipv4Addr,
        /// Who has it.
        owner: ServiceName,
    },
    /// The instance left the mesh; it can only register anew.
    #[error("instance {0} is gone; register it again")]
    Gone(InstanceId),
    /// A newer observation is already recorded.
    #[error("observation is stale: revision {current} is already recorded; report with a higher revision")]
    StaleObservation {
        /// The revision that is recorded.
        current: u64,
    },
    /// No such token, or not with this secret.
    #[error("join token is not known; create one with `weft token create`")]
    TokenUnknown,
    /// The token was used before.
    #[error("join token was already used by {by}; create a new one with `weft token create`")]
    TokenUsed {
        /// Who used it.
        by: InstanceId,
    },
    /// The token's time is over.
    #[error("join token expired; create a new one with `weft token create`")]
    TokenExpired {
        /// When it expired.
        at: Timestamp,
    },
    /// The token is for another service or instance.
    #[error("join token is not for {wanted}")]
    TokenElsewhere {
        /// What the caller asked for.
        wanted: InstanceId,
    },
    /// Policies let nobody of the service connect there.
    #[error("{by} refuses connections from {from} to {to}:{port}")]
    NotAdmitted {
        /// Who would connect.
        from: ServiceName,
        /// To whom.
        to: ServiceName,
        /// To which port.
        port: Port,
        /// The rule or default that says so, such as `security/default/db#deny-all`.
        by: String,
    },
    /// One policy of a rollout is refused.
    #[error("{rejection}")]
    Candidate {
        /// Its place in the rollout, from 0.
        index: usize,
        /// Its scope.
        scope: Scope,
        /// Why.
        rejection: Box<Self>,
    },
    /// A rollout is running: another one cannot begin.
    #[error(
        "a rollout is running; wait for its end, or end it with `weft rollout advance` or `weft rollout abort`"
    )]
    RolloutRunning,
    /// There is no rollout to end.
    #[error("no rollout is running")]
    NoRollout,
    /// The scope's policy is part of the running rollout.
    #[error(
        "{0} is part of the running rollout; wait for its end, or take it back with `weft rollout abort`"
    )]
    InRollout(Scope),
    /// Nobody would be a canary.
    #[error("no ready instance is concerned by {0}, so there is nobody to try it; apply it without a canary")]
    NoCanary(Scope),
    /// A field's value breaks a rule.
    #[error("{field}: {rule}")]
    Invalid {
        /// The field, as a path such as `rules[2].ports`.
        field: String,
        /// What must hold.
        rule: String,
    },
}

impl Rejection {
    /// A field's value breaks a rule.
    #[must_use]
    pub fn invalid(field: impl Into<String>, rule: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), rule: rule.into() }
    }
}
