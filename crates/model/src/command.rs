//! Everything that someone can want of the mesh: a scope's name and a command to its state machine.

use crate::ca::CaCommand;
use crate::health::HealthCommand;
use crate::id::{InstanceId, ServiceName};
use crate::identity::IdentityCommand;
use crate::membership::MembershipCommand;
use crate::mesh::MeshCommand;
use crate::rollout::RolloutCommand;
use crate::scope::{Scope, SecurityScope, TokenId, TrafficScope};
use crate::security::SecurityCommand;
use crate::service::ServiceCommand;
use crate::token::TokenCommand;
use crate::traffic::TrafficCommand;

/// Something that someone wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Of a service.
    Service(ServiceName, ServiceCommand),
    /// Of an instance's membership.
    Membership(InstanceId, MembershipCommand),
    /// Of an instance's health.
    Health(InstanceId, HealthCommand),
    /// Of a traffic policy.
    Traffic(TrafficScope, TrafficCommand),
    /// Of a security policy.
    Security(SecurityScope, SecurityCommand),
    /// Of an instance's leaves.
    Identity(InstanceId, IdentityCommand),
    /// Of a join token.
    Token(TokenId, TokenCommand),
    /// Of the trusted roots.
    Ca(CaCommand),
    /// Of the mesh's defaults.
    Mesh(MeshCommand),
    /// Of the rollout of policies.
    Rollout(RolloutCommand),
}

impl Command {
    /// The scope whose state machine decides it.
    #[must_use]
    pub fn scope(&self) -> Scope {
        match self {
            Self::Service(service, _) => Scope::Service(service.clone()),
            Self::Membership(instance, _) => Scope::Membership(instance.clone()),
            Self::Health(instance, _) => Scope::Health(instance.clone()),
            Self::Traffic(scope, _) => Scope::Traffic(scope.clone()),
            Self::Security(scope, _) => Scope::Security(scope.clone()),
            Self::Identity(instance, _) => Scope::Identity(instance.clone()),
            Self::Token(id, _) => Scope::Token(id.clone()),
            Self::Ca(_) => Scope::Ca,
            Self::Mesh(_) => Scope::Mesh,
            Self::Rollout(_) => Scope::Rollout,
        }
    }
}
