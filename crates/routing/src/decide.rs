//! Decides commands against the whole mesh: each by its own scope's state machine, and by the few rules that look at
//! other scopes. All commands of a batch are decided against the state before it, as if they came at once, so a batch
//! may declare a service and its policies together.

use crate::damping;
use crate::rollout::Audience;
use crate::shard::build;
use crate::state::RoutingState;
use crate::verdict;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use weft_model::health::{HealthCommand, HealthState};
use weft_model::membership::{MembershipCommand, MembershipState};
use weft_model::rollout::{
    self, Candidate, Plan, RolloutAborted, RolloutAdvanced, RolloutBegun, RolloutCommand, RolloutEvent,
};
use weft_model::security::{SecurityCommand, SecurityPolicy};
use weft_model::service::{ServiceCommand, ServiceDeclared};
use weft_model::traffic::TrafficCommand;
use weft_model::{
    Command, Event, InstanceId, Port, Rejection, Scope, SecurityScope, ServiceName, Timestamp, TrafficScope,
    Version, ca, health, identity, membership, mesh, security, service, token, traffic,
};

/// Most live instances of a service: their shard stays under [`SHARD_BYTES_MAX`](crate::snapshot::SHARD_BYTES_MAX), with
/// at most 160 bytes each.
pub const INSTANCES_PER_SERVICE_MAX: usize = 100_000;
/// Most services that a mesh declares in its life: the manifest of a sidecar that sees all of them, deleted ones too,
/// stays under [`SHARDS_MAX`](crate::manifest::SHARDS_MAX).
pub const SERVICES_MAX: usize = 50_000;

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

/// Decides a batch: every command passes, or the first that does not is named. What an advanced rollout makes of its scopes is
/// decided with it, and comes before the rollout's own end.
///
/// # Errors
/// If a rule refuses a command. Nothing is to be appended.
pub fn decide(state: &RoutingState, batch: &[Command], now: Timestamp) -> Result<Vec<Decision>, Refused> {
    let mut scopes = BTreeSet::new();
    let view = BatchView::new(state, batch);
    let mut decisions = Vec::with_capacity(batch.len());
    let advanced = batch.iter().enumerate().flat_map(|(index, command)| {
        let advances = matches!(command, Command::Rollout(RolloutCommand::Advance(_)));
        let candidates: Vec<_> = state.candidates().filter(|_| advances).map(Candidate::command).collect();
        candidates.into_iter().map(move |command| (index, command))
    });
    let advanced: Vec<_> = advanced.collect();
    let all = advanced.iter().map(|(index, command)| (*index, command)).chain(batch.iter().enumerate());
    for (index, command) in all {
        let scope = command.scope();
        let refused = |rejection| Refused { index, scope: scope.clone(), rejection: Box::new(rejection) };
        if !scopes.insert(scope.clone()) {
            return Err(refused(Rejection::invalid("scope", "appears twice in one batch")));
        }
        let guards = view.admit(command).map_err(refused)?;
        let events = view.decide_one(command, now).map_err(refused)?;
        if !view.advances && !events.is_empty() && state.in_rollout(&scope) {
            return Err(refused(Rejection::InRollout(scope.clone())));
        }
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

/// The state, and what the batch as a whole makes of it.
struct BatchView<'a> {
    state: &'a RoutingState,
    /// Services that it declares (true) or deletes.
    services: BTreeMap<&'a ServiceName, bool>,
    /// Addresses that it asks for.
    addresses: BTreeMap<Ipv4Addr, &'a ServiceName>,
    /// Instances that it deregisters.
    leaving: BTreeSet<&'a InstanceId>,
    /// Whether it gives the running rollout to everybody.
    advances: bool,
}

impl<'a> BatchView<'a> {
    fn new(state: &'a RoutingState, batch: &'a [Command]) -> Self {
        let mut view = Self {
            state,
            services: BTreeMap::new(),
            addresses: BTreeMap::new(),
            leaving: BTreeSet::new(),
            advances: false,
        };
        for command in batch {
            match command {
                Command::Service(name, ServiceCommand::Declare(declared)) => {
                    view.services.insert(name, true);
                    if let Some(address) = declared.address {
                        view.addresses.entry(address).or_insert(name);
                    }
                }
                Command::Service(name, ServiceCommand::Delete) => {
                    view.services.insert(name, false);
                }
                Command::Membership(instance, MembershipCommand::Deregister) => {
                    view.leaving.insert(instance);
                }
                Command::Membership(
                    _,
                    MembershipCommand::Register(_)
                    | MembershipCommand::Drain
                    | MembershipCommand::AddUpstream { .. },
                )
                | Command::Health(..)
                | Command::Traffic(..)
                | Command::Security(..)
                | Command::Identity(..)
                | Command::Token(..)
                | Command::Ca(_)
                | Command::Mesh(_) => {}
                Command::Rollout(command) => view.advances |= matches!(command, RolloutCommand::Advance(_)),
            }
        }
        view
    }

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
            Command::Health(instance, command) => self.decide_health(instance, command, now),
            Command::Traffic(scope, command) => {
                let current = state.traffic_policy(scope).and_then(|entry| entry.state.clone());
                into_events(traffic::decide(scope, &current, command)?)
            }
            Command::Security(scope, command) => {
                let current = state.security_policy(scope).and_then(|entry| entry.state.clone());
                into_events(security::decide(scope, &current, command)?)
            }
            Command::Identity(_, leaf) => into_events(identity::decide(leaf)),
            Command::Token(id, command) => {
                let current = state.token(id).map(|entry| entry.state.clone()).unwrap_or_default();
                into_events(token::decide(&current, command, now)?)
            }
            Command::Ca(root) => into_events(ca::decide(&state.ca().state, root)?),
            Command::Mesh(defaults) => into_events(mesh::decide(&state.mesh().state, defaults)?),
            Command::Rollout(command) => self.decide_rollout(command, now),
        }
    }

    fn decide_rollout(&self, command: &RolloutCommand, now: Timestamp) -> Result<Vec<Event>, Rejection> {
        let current = &self.state.rollout().state;
        match command {
            RolloutCommand::Begin(plan) => {
                rollout::check(current, plan)?;
                let Plan { candidates, share_ppm, watch_ms, tolerance_ppm } = plan;
                let mut changes = Vec::new();
                for (index, candidate) in candidates.iter().enumerate() {
                    // As if everybody were given it now.
                    let decided = self.decide_one(&candidate.command(), now);
                    let events = decided.map_err(|rejection| of_candidate(index, candidate, rejection))?;
                    if !events.is_empty() {
                        changes.push(candidate.clone());
                    }
                }
                if changes.is_empty() {
                    return Ok(Vec::new());
                }
                let canaries = self.state.pick_canaries(&changes, *share_ppm).map_err(Rejection::NoCanary)?;
                let (watch_ms, tolerance_ppm) = (*watch_ms, *tolerance_ppm);
                let begun = RolloutBegun { candidates: changes, canaries, watch_ms, tolerance_ppm };
                Ok(vec![RolloutEvent::from(begun).into()])
            }
            RolloutCommand::Advance(evidence) => {
                into_events(rollout::end(current, RolloutAdvanced { evidence: *evidence })?)
            }
            RolloutCommand::Abort { reason, evidence } => {
                let aborted = RolloutAborted { reason: reason.clone(), evidence: *evidence };
                into_events(rollout::end(current, aborted)?)
            }
        }
    }

    fn decide_health(
        &self,
        instance: &InstanceId,
        command: &HealthCommand,
        now: Timestamp,
    ) -> Result<Vec<Event>, Rejection> {
        let state = self.state;
        let current: HealthState = state.health(instance).and_then(|entry| entry.state.clone());
        match command {
            HealthCommand::Report(report) => {
                let events = health::decide(&current, report)?;
                if events.is_empty() && state.health_reported(instance) != report.health {
                    // The repeat of a report that was forgotten when the instance left or moved: it must be made anew.
                    return Err(Rejection::StaleObservation { current: report.revision });
                }
                into_events(events)
            }
            HealthCommand::Summarize(summary) => into_events(health::decide_summary(&current, summary)?),
            HealthCommand::Reconsider => {
                into_events(damping::reconsider(state, instance, now).into_iter().collect())
            }
        }
    }

    /// Checks the rules that look beyond the command's own scope, and names the scopes that they looked at.
    fn admit(&self, command: &Command) -> Result<BTreeSet<Scope>, Rejection> {
        match command {
            Command::Service(name, ServiceCommand::Declare(declared)) => self.admit_address(name, declared),
            Command::Service(name, ServiceCommand::Delete) => self.admit_deletion(name),
            Command::Membership(instance, MembershipCommand::Register(_)) => self.admit_instance(instance),
            Command::Membership(instance, MembershipCommand::AddUpstream { service, port }) => {
                self.admit_upstream(&instance.service, service, *port)
            }
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
            Command::Traffic(scope, command) => {
                let needs = match command {
                    TrafficCommand::Put(_) => self.traffic_needs(scope)?,
                    TrafficCommand::Delete => BTreeSet::new(),
                };
                Ok(beside_rollout(needs))
            }
            Command::Security(scope, command) => {
                let needs = match command {
                    SecurityCommand::Put(policy) => self.security_needs(scope, policy)?,
                    SecurityCommand::Delete => BTreeSet::new(),
                };
                Ok(beside_rollout(needs))
            }
            Command::Rollout(RolloutCommand::Begin(plan)) => {
                let mut needs = BTreeSet::new();
                for (index, candidate) in plan.candidates.iter().enumerate() {
                    // As if everybody were given it now.
                    let admitted = self.admit(&candidate.command());
                    needs.append(
                        &mut admitted.map_err(|rejection| of_candidate(index, candidate, rejection))?,
                    );
                    needs.insert(candidate.scope());
                }
                Ok(needs)
            }
            Command::Token(_, token::TokenCommand::Create(token)) => self.needs([&token.service]),
            Command::Token(_, token::TokenCommand::Redeem { .. })
            | Command::Identity(..)
            | Command::Ca(_)
            | Command::Mesh(_)
            | Command::Rollout(RolloutCommand::Advance(_) | RolloutCommand::Abort { .. }) => {
                Ok(BTreeSet::new())
            }
        }
    }

    fn traffic_needs(&self, scope: &TrafficScope) -> Result<BTreeSet<Scope>, Rejection> {
        self.needs(scope.source.iter().chain([&scope.destination]))
    }

    fn security_needs(
        &self,
        scope: &SecurityScope,
        policy: &SecurityPolicy,
    ) -> Result<BTreeSet<Scope>, Rejection> {
        let named = policy.rules.iter().flat_map(|rule| &rule.from.services);
        let own = match scope {
            SecurityScope::Service(service) => Some(service),
            SecurityScope::Mesh | SecurityScope::Namespace(_) => None,
        };
        self.needs(named.chain(own))
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

    fn admit_instance(&self, instance: &InstanceId) -> Result<BTreeSet<Scope>, Rejection> {
        let new = self.state.membership(instance).is_none_or(|entry| entry.state.registration().is_none());
        if new && self.state.live_count(&instance.service) >= INSTANCES_PER_SERVICE_MAX {
            return Err(Rejection::invalid(
                "instance",
                format!("a service has at most {INSTANCES_PER_SERVICE_MAX}"),
            ));
        }
        self.needs([&instance.service])
    }

    /// Nobody learns where a service is who may not connect to it. That is asked for the state before the batch, and not
    /// guarded: whoever becomes an upstream is asked for its policy at every connection.
    fn admit_upstream(
        &self,
        from: &ServiceName,
        to: &ServiceName,
        port: Port,
    ) -> Result<BTreeSet<Scope>, Rejection> {
        let guards = self.needs([to])?;
        let Some(inbound) =
            build::inbound(self.state, to, Audience::Everybody).filter(|inbound| inbound.has_port(port))
        else {
            return Err(Rejection::invalid("port", format!("{to} declares no port {port}")));
        };
        let verdict = verdict::authorize(&inbound, from, port);
        if verdict.permitted() {
            return Ok(guards);
        }
        let by = verdict.ruling.by.to_string();
        Err(Rejection::NotAdmitted { from: from.clone(), to: to.clone(), port, by })
    }

    fn admit_address(
        &self,
        name: &ServiceName,
        declared: &ServiceDeclared,
    ) -> Result<BTreeSet<Scope>, Rejection> {
        let current = self.state.service(name);
        if current.is_none() && self.state.services_ever().len() >= SERVICES_MAX {
            return Err(Rejection::invalid(
                "name",
                format!("a mesh has at most {SERVICES_MAX} services in its life"),
            ));
        }
        let unchanged = current.and_then(|entry| entry.state.as_ref()) == Some(declared);
        let Some(address) = declared.address.filter(|_| !unchanged) else { return Ok(BTreeSet::new()) };
        let in_batch = self.addresses.get(&address).copied();
        let owner =
            in_batch.into_iter().chain(self.state.address_owner(address)).find(|owner| *owner != name);
        match owner {
            Some(owner) => Err(Rejection::AddressTaken { address, owner: owner.clone() }),
            None => Ok(BTreeSet::new()),
        }
    }

    /// A registration that is appended between this decision and its own append is not seen. Such an instance gets no
    /// traffic, because its service is gone, and takes part again if the service is declared anew.
    fn admit_deletion(&self, name: &ServiceName) -> Result<BTreeSet<Scope>, Rejection> {
        let staying = self.state.live_instances_of(name).filter(|(id, ..)| !self.leaving.contains(id));
        match staying.count() {
            0 => Ok(BTreeSet::new()),
            instances => Err(Rejection::ServiceInUse { service: name.clone(), instances }),
        }
    }

    fn is_declared(&self, service: &ServiceName) -> bool {
        self.services.get(service).copied().unwrap_or_else(|| self.state.is_declared(service))
    }
}

/// What a policy rests on: that no rollout comes to have one for its scope meanwhile.
fn beside_rollout(mut needs: BTreeSet<Scope>) -> BTreeSet<Scope> {
    needs.insert(Scope::Rollout);
    needs
}

fn of_candidate(index: usize, candidate: &Candidate, rejection: Rejection) -> Rejection {
    Rejection::Candidate { index, scope: candidate.scope(), rejection: Box::new(rejection) }
}

#[expect(clippy::unnecessary_wraps, reason = "every arm of the caller ends with it, after a fallible decide")]
fn into_events<E: Into<Event>>(events: Vec<E>) -> Result<Vec<Event>, Rejection> {
    Ok(events.into_iter().map(Into::into).collect())
}
