//! Decides commands against the whole mesh: each by its own scope's state machine, and by the few rules that look at
//! other scopes. All commands of a batch are decided against the state before it, as if they came at once, so a batch
//! may declare a service and its policies together.

use crate::state::RoutingState;
use std::collections::{BTreeMap, BTreeSet};
use weft_model::health::HealthState;
use weft_model::membership::{MembershipCommand, MembershipState};
use weft_model::service::{ServiceCommand, ServiceDeclared};
use weft_model::{
    Command, Event, Rejection, Scope, SecurityScope, ServiceName, Timestamp, TrafficScope, Version, ca,
    health, identity, membership, mesh, security, service, token, traffic,
};

/// What became of one command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The scope that it is about.
    pub scope: Scope,
    /// The scope's version when it was decided; the append must find it unchanged.
    pub seen: Version,
    /// What happens; nothing if the scope already is as wanted.
    pub events: Vec<Event>,
    /// Other scopes that the decision rests on, with their versions; the append must find them unchanged too.
    pub guards: BTreeMap<Scope, Version>,
}

/// The command of a batch that a rule refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{scope}: {rejection}")]
pub struct Refused {
    /// Its place in the batch, from 0.
    pub index: usize,
    /// The scope that it is about.
    pub scope: Scope,
    /// Why.
    pub rejection: Box<Rejection>,
}

/// Decides a batch: every command passes, or the first that does not is named.
///
/// # Errors
/// If a rule refuses a command. Nothing is to be appended.
pub fn decide(state: &RoutingState, batch: &[Command], now: Timestamp) -> Result<Vec<Decision>, Refused> {
    let mut scopes = BTreeSet::new();
    let view = BatchView { state, batch };
    let mut decisions = Vec::with_capacity(batch.len());
    for (index, command) in batch.iter().enumerate() {
        let scope = command.scope();
        let refused = |rejection| Refused { index, scope: scope.clone(), rejection: Box::new(rejection) };
        if !scopes.insert(scope.clone()) {
            return Err(refused(Rejection::invalid("scope", "appears twice in one batch")));
        }
        let guards = view.admit(command).map_err(refused)?;
        let events = view.decide_one(command, now).map_err(refused)?;
        let guards = guards.into_iter().map(|scope| {
            let version = state.source(&scope).version;
            (scope, version)
        });
        decisions.push(Decision {
            seen: state.source(&scope).version,
            scope,
            events,
            guards: guards.collect(),
        });
    }
    // What the batch itself changes is guarded by its own expected version.
    for decision in &mut decisions {
        decision.guards.retain(|scope, _| !scopes.contains(scope));
    }
    Ok(decisions)
}

/// The state as the rest of the batch will leave it.
struct BatchView<'a> {
    state: &'a RoutingState,
    batch: &'a [Command],
}

impl BatchView<'_> {
    fn decide_one(&self, command: &Command, now: Timestamp) -> Result<Vec<Event>, Rejection> {
        let state = self.state;
        match command {
            Command::Service(name, command) => {
                let current = state.service(name).and_then(|entry| entry.state.clone());
                into_events(service::decide(name, &current, command)?)
            }
            Command::Membership(instance, command) => {
                let current = state.membership(instance).map(|entry| entry.state.clone()).unwrap_or_default();
                into_events(membership::decide(instance, &current, command)?)
            }
            Command::Health(instance, report) => {
                let current: HealthState = state.health(instance).and_then(|entry| entry.state.clone());
                into_events(health::decide(instance, &current, report)?)
            }
            Command::Traffic(scope, command) => {
                let current = state.traffic_policy(scope).and_then(|entry| entry.state);
                into_events(traffic::decide(scope, &current, command)?)
            }
            Command::Security(scope, command) => {
                let current = state.security_policy(scope).and_then(|entry| entry.state.clone());
                into_events(security::decide(scope, &current, command)?)
            }
            Command::Identity(instance, leaf) => {
                let current = state.identity(instance).and_then(|entry| entry.state.clone());
                into_events(identity::decide(&current, leaf))
            }
            Command::Token(id, command) => {
                let current = state.token(id).map(|entry| entry.state.clone()).unwrap_or_default();
                into_events(token::decide(&current, command, now)?)
            }
            Command::Ca(root) => into_events(ca::decide(&state.ca().state, root)?),
            Command::Mesh(defaults) => into_events(mesh::decide(&state.mesh().state, defaults)?),
        }
    }

    /// Checks the rules that look beyond the command's own scope, and names the scopes that they looked at.
    fn admit(&self, command: &Command) -> Result<BTreeSet<Scope>, Rejection> {
        match command {
            Command::Service(name, ServiceCommand::Declare(declared)) => self.admit_address(name, declared),
            Command::Service(name, ServiceCommand::Delete) => self.admit_deletion(name),
            Command::Membership(instance, MembershipCommand::Register(_)) => self.needs([&instance.service]),
            Command::Membership(_, MembershipCommand::Drain | MembershipCommand::Deregister) => {
                Ok(BTreeSet::new())
            }
            Command::Health(instance, _) => {
                let scope = Scope::Membership(instance.clone());
                let current = self.state.membership(instance).map(|entry| &entry.state);
                match current {
                    Some(MembershipState::Ready(_) | MembershipState::Draining(_)) => Ok([scope].into()),
                    Some(MembershipState::Gone) => Err(Rejection::Gone(instance.clone())),
                    Some(MembershipState::Absent) | None => Err(Rejection::Absent(scope)),
                }
            }
            Command::Traffic(TrafficScope { source, destination }, traffic::TrafficCommand::Put(_)) => {
                self.needs(source.iter().chain([destination]))
            }
            Command::Security(scope, security::SecurityCommand::Put(policy)) => {
                let named = policy.rules.iter().flat_map(|rule| &rule.from.services);
                let own = match scope {
                    SecurityScope::Service(service) => Some(service),
                    SecurityScope::Mesh | SecurityScope::Namespace(_) => None,
                };
                self.needs(named.chain(own))
            }
            Command::Token(_, token::TokenCommand::Create(token)) => self.needs([&token.service]),
            Command::Token(_, token::TokenCommand::Redeem { .. })
            | Command::Traffic(_, traffic::TrafficCommand::Delete)
            | Command::Security(_, security::SecurityCommand::Delete)
            | Command::Identity(..)
            | Command::Ca(_)
            | Command::Mesh(_) => Ok(BTreeSet::new()),
        }
    }

    fn needs<'s>(
        &self,
        services: impl IntoIterator<Item = &'s ServiceName>,
    ) -> Result<BTreeSet<Scope>, Rejection> {
        let mut scopes = BTreeSet::new();
        for service in services {
            if !self.is_declared(service) {
                return Err(Rejection::UnknownService(service.clone()));
            }
            scopes.insert(Scope::Service(service.clone()));
        }
        Ok(scopes)
    }

    fn admit_address(
        &self,
        name: &ServiceName,
        declared: &ServiceDeclared,
    ) -> Result<BTreeSet<Scope>, Rejection> {
        let Some(address) = declared.address else { return Ok(BTreeSet::new()) };
        let in_batch = self.batch.iter().find_map(|command| match command {
            Command::Service(other, ServiceCommand::Declare(declared))
                if other != name && declared.address == Some(address) =>
            {
                Some(other)
            }
            _ => None,
        });
        let owner = in_batch.or_else(|| self.state.address_owner(address).filter(|owner| *owner != name));
        match owner {
            Some(owner) => Err(Rejection::AddressTaken { address, owner: owner.clone() }),
            None => Ok(BTreeSet::new()),
        }
    }

    fn admit_deletion(&self, name: &ServiceName) -> Result<BTreeSet<Scope>, Rejection> {
        let leaves = |id: &_| {
            self.batch.iter().any(|command| {
                matches!(command, Command::Membership(other, MembershipCommand::Deregister) if other == id)
            })
        };
        let live = self.state.instances_of(name).filter(|(_, entry)| entry.state.registration().is_some());
        match live.filter(|(id, _)| !leaves(*id)).count() {
            0 => Ok(BTreeSet::new()),
            instances => Err(Rejection::ServiceInUse { service: name.clone(), instances }),
        }
    }

    fn is_declared(&self, service: &ServiceName) -> bool {
        let in_batch = self.batch.iter().find_map(|command| match command {
            Command::Service(name, command) if name == service => {
                Some(matches!(command, ServiceCommand::Declare(_)))
            }
            _ => None,
        });
        in_batch.unwrap_or_else(|| self.state.is_declared(service))
    }
}

#[expect(clippy::unnecessary_wraps, reason = "every arm of the caller ends with it, after a fallible decide")]
fn into_events<E: Into<Event>>(events: Vec<E>) -> Result<Vec<Event>, Rejection> {
    Ok(events.into_iter().map(Into::into).collect())
}
