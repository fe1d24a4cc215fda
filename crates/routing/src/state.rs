//! The fold: every scope's state, and which shards an event touches.

use crate::address::Addresses;
use crate::shard::ShardKey;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use weft_model::ca::{self, CaState};
use weft_model::health::{self, Health, HealthEvent, HealthState};
use weft_model::identity::{self, IdentityState};
use weft_model::membership::{self, InstanceRegistered, MembershipEvent, MembershipState};
use weft_model::mesh::{self, MeshState};
use weft_model::security::{self, SecurityState};
use weft_model::service::{self, ServiceEvent, ServiceState};
use weft_model::token::{self, TokenState};
use weft_model::traffic::{self, TrafficState};
use weft_model::{
    ConfigVersion, Epoch, Event, Fact, InstanceId, Name, Position, Scope, ScopeVersion, SecurityScope,
    ServiceName, Timestamp, TokenId, TrafficScope, Version,
};

/// A scope's state and its last writer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry<S> {
    /// The state.
    pub state: S,
    /// The scope's version and last event; zero if it has none.
    pub source: ScopeVersion,
    /// When that event was recorded.
    pub at: Timestamp,
    /// Who caused it.
    pub actor: String,
}

/// What the data plane sees of an instance's health: forgotten when the instance leaves, so that who comes back has
/// to be observed anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EffectiveHealth {
    pub(crate) health: Health,
    /// The observation that made it so.
    pub(crate) source: ScopeVersion,
}

/// The mesh as of one position: the fold of every event up to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoutingState {
    version: ConfigVersion,
    at: Timestamp,
    services: BTreeMap<ServiceName, Entry<ServiceState>>,
    membership: BTreeMap<InstanceId, Entry<MembershipState>>,
    health: BTreeMap<InstanceId, Entry<HealthState>>,
    traffic: BTreeMap<TrafficScope, Entry<TrafficState>>,
    security: BTreeMap<SecurityScope, Entry<SecurityState>>,
    identities: BTreeMap<InstanceId, Entry<IdentityState>>,
    tokens: BTreeMap<TokenId, Entry<TokenState>>,
    ca: Entry<CaState>,
    mesh: Entry<MeshState>,
    mesh_security: ScopeVersion,
    addresses: Addresses,
    /// The instances that are ready or draining; what an instance costs ends with it.
    live: BTreeMap<ServiceName, BTreeSet<Name>>,
    effective_health: BTreeMap<InstanceId, EffectiveHealth>,
}

/// An event does not follow the ones before it: the log is damaged, or was read wrongly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FoldError {
    /// A position is missing or repeated.
    #[error("position {found} follows position {last}")]
    Position {
        /// The last one that was folded.
        last: Position,
        /// The one that came.
        found: Position,
    },
    /// An epoch is older than the one before.
    #[error("epoch {found} follows epoch {last} at position {position}")]
    Epoch {
        /// Where.
        position: Position,
        /// The last one.
        last: Epoch,
        /// The one that came.
        found: Epoch,
    },
    /// A version of a scope is missing or repeated.
    #[error("version {found} of {scope} follows version {last} at position {position}")]
    Version {
        /// Where.
        position: Position,
        /// The scope.
        scope: Scope,
        /// Its last version.
        last: Version,
        /// The one that came.
        found: Version,
    },
    /// An event does not belong to the kind of scope that it names.
    #[error("the event at position {position} does not belong in {scope}")]
    Family {
        /// Where.
        position: Position,
        /// The scope that it names.
        scope: Scope,
    },
}

/// What an event touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// The shards that are built from what changed.
    pub shards: BTreeSet<ShardKey>,
    /// The instance whose registration changed.
    pub instance: Option<InstanceId>,
}

impl RoutingState {
    /// The last event that was folded.
    #[must_use]
    pub const fn version(&self) -> ConfigVersion {
        self.version
    }

    /// When it was recorded.
    #[must_use]
    pub const fn at(&self) -> Timestamp {
        self.at
    }

    /// Takes in the next event and says what it touched.
    ///
    /// # Errors
    /// If the event is not the next one of the log and of its scope. Nothing was changed.
    pub fn apply(&mut self, fact: &Fact) -> Result<Touched, FoldError> {
        self.check_order(fact)?;
        let touched = self.apply_event(fact)?;
        self.version = fact.config_version();
        self.at = fact.at;
        Ok(touched)
    }

    /// The version and last event of a scope; zero if it has none.
    #[must_use]
    pub fn source(&self, scope: &Scope) -> ScopeVersion {
        fn of<K: Ord, S>(map: &BTreeMap<K, Entry<S>>, key: &K) -> ScopeVersion {
            map.get(key).map(|entry| entry.source).unwrap_or_default()
        }
        match scope {
            Scope::Service(service) => of(&self.services, service),
            Scope::Membership(instance) => of(&self.membership, instance),
            Scope::Health(instance) => of(&self.health, instance),
            Scope::Traffic(scope) => of(&self.traffic, scope),
            Scope::Security(scope) => of(&self.security, scope),
            Scope::Identity(instance) => of(&self.identities, instance),
            Scope::Token(id) => of(&self.tokens, id),
            Scope::Ca => self.ca.source,
            Scope::Mesh => self.mesh.source,
        }
    }

    /// Services that exist, by name.
    pub fn services(&self) -> impl Iterator<Item = (&ServiceName, &Entry<ServiceState>)> {
        self.services.iter().filter(|(_, entry)| entry.state.is_some())
    }

    /// A service, if it ever existed.
    #[must_use]
    pub fn service(&self, service: &ServiceName) -> Option<&Entry<ServiceState>> {
        self.services.get(service)
    }

    /// Whether the service is declared now.
    #[must_use]
    pub fn is_declared(&self, service: &ServiceName) -> bool {
        self.services.get(service).is_some_and(|entry| entry.state.is_some())
    }

    /// The loopback address of a service that exists.
    #[must_use]
    pub fn address(&self, service: &ServiceName) -> Option<Ipv4Addr> {
        self.addresses.of(service)
    }

    /// Who is reached at an address.
    #[must_use]
    pub fn address_owner(&self, address: Ipv4Addr) -> Option<&ServiceName> {
        self.addresses.owner(address)
    }

    /// Every instance that ever took part, by name.
    pub fn instances(&self) -> impl Iterator<Item = (&InstanceId, &Entry<MembershipState>)> {
        self.membership.iter()
    }

    /// The ready and draining instances of a service, by name.
    pub fn live_instances_of<'a>(
        &'a self,
        service: &'a ServiceName,
    ) -> impl Iterator<Item = (InstanceId, &'a Entry<MembershipState>, &'a InstanceRegistered)> {
        self.live.get(service).into_iter().flatten().filter_map(move |name| {
            let id = InstanceId { service: service.clone(), instance: name.clone() };
            let entry = self.membership.get(&id)?;
            Some((id, entry, entry.state.registration()?))
        })
    }

    /// How many instances of a service are ready or draining.
    #[must_use]
    pub fn live_count(&self, service: &ServiceName) -> usize {
        self.live.get(service).map_or(0, BTreeSet::len)
    }

    /// Every ready or draining instance, by name.
    pub(crate) fn live_instances(&self) -> impl Iterator<Item = InstanceId> {
        self.live.iter().flat_map(|(service, names)| {
            let id = |name: &Name| InstanceId { service: service.clone(), instance: name.clone() };
            names.iter().map(id)
        })
    }

    /// Every service that was ever declared, deleted ones too, by name.
    pub(crate) fn services_ever(&self) -> impl ExactSizeIterator<Item = &ServiceName> {
        self.services.keys()
    }

    /// An instance's membership, if it ever took part.
    #[must_use]
    pub fn membership(&self, instance: &InstanceId) -> Option<&Entry<MembershipState>> {
        self.membership.get(instance)
    }

    /// What was last reported of an instance.
    #[must_use]
    pub fn health(&self, instance: &InstanceId) -> Option<&Entry<HealthState>> {
        self.health.get(instance)
    }

    pub(crate) fn effective_health(&self, instance: &InstanceId) -> EffectiveHealth {
        self.effective_health.get(instance).copied().unwrap_or_default()
    }

    /// What the data plane sees of an instance's health.
    #[must_use]
    pub fn health_seen(&self, instance: &InstanceId) -> Health {
        self.effective_health(instance).health
    }

    /// Every traffic scope that ever had a policy.
    pub fn traffic(&self) -> impl Iterator<Item = (&TrafficScope, &Entry<TrafficState>)> {
        self.traffic.iter()
    }

    /// The traffic scopes with this destination, the service-wide one first.
    pub(crate) fn traffic_to<'a>(
        &'a self,
        destination: &'a ServiceName,
    ) -> impl Iterator<Item = (&'a TrafficScope, &'a Entry<TrafficState>)> {
        let first = TrafficScope { destination: destination.clone(), source: None };
        self.traffic.range(first..).take_while(move |(scope, _)| scope.destination == *destination)
    }

    /// One traffic scope.
    #[must_use]
    pub fn traffic_policy(&self, scope: &TrafficScope) -> Option<&Entry<TrafficState>> {
        self.traffic.get(scope)
    }

    /// Every security scope that ever had a policy.
    pub fn security(&self) -> impl Iterator<Item = (&SecurityScope, &Entry<SecurityState>)> {
        self.security.iter()
    }

    /// One security scope.
    #[must_use]
    pub fn security_policy(&self, scope: &SecurityScope) -> Option<&Entry<SecurityState>> {
        self.security.get(scope)
    }

    /// The newest leaf of an instance.
    #[must_use]
    pub fn identity(&self, instance: &InstanceId) -> Option<&Entry<IdentityState>> {
        self.identities.get(instance)
    }

    /// A join token's life so far.
    #[must_use]
    pub fn token(&self, id: &TokenId) -> Option<&Entry<TokenState>> {
        self.tokens.get(id)
    }

    /// The trusted roots.
    #[must_use]
    pub const fn ca(&self) -> &Entry<CaState> {
        &self.ca
    }

    /// The mesh's defaults.
    #[must_use]
    pub const fn mesh(&self) -> &Entry<MeshState> {
        &self.mesh
    }

    /// The event that last set the mesh's default action; zero if nobody did.
    pub(crate) const fn mesh_security_source(&self) -> ScopeVersion {
        self.mesh_security
    }

    fn check_order(&self, fact: &Fact) -> Result<(), FoldError> {
        let ConfigVersion { epoch, position } = self.version;
        if fact.position != position.next() {
            return Err(FoldError::Position { last: position, found: fact.position });
        }
        if fact.epoch < epoch {
            return Err(FoldError::Epoch { position: fact.position, last: epoch, found: fact.epoch });
        }
        let last = self.source(&fact.scope).version;
        if fact.version != last.next() {
            let (position, scope) = (fact.position, fact.scope.clone());
            return Err(FoldError::Version { position, scope, last, found: fact.version });
        }
        Ok(())
    }

    fn apply_event(&mut self, fact: &Fact) -> Result<Touched, FoldError> {
        Ok(match (&fact.event, &fact.scope) {
            (Event::Service(event), Scope::Service(service)) => self.apply_service(fact, service, event),
            (Event::Membership(event), Scope::Membership(instance)) => {
                self.apply_membership(fact, instance, event)
            }
            (Event::Health(event), Scope::Health(instance)) => self.apply_health(fact, instance, event),
            (Event::Traffic(event), Scope::Traffic(scope)) => {
                fold(self.traffic.entry(scope.clone()).or_default(), fact, |state| {
                    traffic::apply(state, event)
                });
                Touched::shards([ShardKey::Endpoints(scope.destination.clone())])
            }
            (Event::Security(event), Scope::Security(scope)) => {
                fold(self.security.entry(scope.clone()).or_default(), fact, |state| {
                    security::apply(state, event)
                });
                Touched::shards(self.covered(scope).cloned().map(ShardKey::Inbound))
            }
            (Event::Identity(event), Scope::Identity(instance)) => {
                fold(self.identities.entry(instance.clone()).or_default(), fact, |state| {
                    identity::apply(state, event)
                });
                Touched::default()
            }
            (Event::Token(event), Scope::Token(id)) => {
                fold(self.tokens.entry(id.clone()).or_default(), fact, |state| token::apply(state, event));
                Touched::default()
            }
            (Event::Ca(event), Scope::Ca) => {
                fold(&mut self.ca, fact, |state| ca::apply(state, event));
                Touched::shards([ShardKey::Trust])
            }
            (Event::Mesh(event), Scope::Mesh) => {
                let before = self.mesh.state.security;
                fold(&mut self.mesh, fact, |state| mesh::apply(state, event));
                if self.mesh.state.security == before {
                    return Ok(Touched::default());
                }
                self.mesh_security = self.mesh.source;
                Touched::shards(self.services().map(|(service, _)| ShardKey::Inbound(service.clone())))
            }
            // `Event::decode` takes the family from the scope, so only a fact made by hand comes here.
            (
                Event::Service(_)
                | Event::Membership(_)
                | Event::Health(_)
                | Event::Traffic(_)
                | Event::Security(_)
                | Event::Identity(_)
                | Event::Token(_)
                | Event::Ca(_)
                | Event::Mesh(_),
                _,
            ) => return Err(FoldError::Family { position: fact.position, scope: fact.scope.clone() }),
        })
    }

    /// The services that a security scope covers.
    fn covered<'a>(&'a self, scope: &'a SecurityScope) -> Box<dyn Iterator<Item = &'a ServiceName> + 'a> {
        match scope {
            SecurityScope::Mesh => Box::new(self.services().map(|(service, _)| service)),
            SecurityScope::Namespace(namespace) => Box::new(
                self.services
                    .range(ServiceName::first_of(namespace)..)
                    .take_while(move |(service, _)| service.namespace == *namespace)
                    .filter(|(_, entry)| entry.state.is_some())
                    .map(|(service, _)| service),
            ),
            SecurityScope::Service(service) => {
                Box::new(self.is_declared(service).then_some(service).into_iter())
            }
        }
    }

    fn apply_service(&mut self, fact: &Fact, service: &ServiceName, event: &ServiceEvent) -> Touched {
        match event {
            ServiceEvent::ServiceDeclared(declared) => {
                // A full range leaves the service without a loopback address; its explicit ports still work.
                self.addresses.assign(service, declared.address);
            }
            ServiceEvent::ServiceDeleted(_) => self.addresses.release(service),
        }
        fold(self.services.entry(service.clone()).or_default(), fact, |state| service::apply(state, event));
        Touched::shards([ShardKey::Endpoints(service.clone()), ShardKey::Inbound(service.clone())])
    }

    fn apply_membership(&mut self, fact: &Fact, instance: &InstanceId, event: &MembershipEvent) -> Touched {
        let place = |state: &MembershipState| state.registration().map(|it| (it.address, it.port));
        let entry = self.membership.entry(instance.clone()).or_default();
        let before = place(&entry.state);
        fold(entry, fact, |state| membership::apply(state, event));
        let after = place(&entry.state);
        if before != after {
            // Nobody looked at what is reached there now.
            self.effective_health.remove(instance);
        }
        match after {
            Some(_) => {
                self.live.entry(instance.service.clone()).or_default().insert(instance.instance.clone());
            }
            None => self.leave(instance),
        }
        Touched {
            shards: [ShardKey::Endpoints(instance.service.clone())].into(),
            instance: Some(instance.clone()),
        }
    }

    fn leave(&mut self, instance: &InstanceId) {
        if let Some(names) = self.live.get_mut(&instance.service) {
            names.remove(&instance.instance);
            if names.is_empty() {
                self.live.remove(&instance.service);
            }
        }
    }

    fn apply_health(&mut self, fact: &Fact, instance: &InstanceId, event: &HealthEvent) -> Touched {
        fold(self.health.entry(instance.clone()).or_default(), fact, |state| health::apply(state, event));
        let HealthEvent::HealthReported(report) = event;
        let takes_part = self.membership(instance).is_some_and(|entry| entry.state.registration().is_some());
        if !takes_part || self.health_seen(instance) == report.health {
            return Touched::default();
        }
        let source = ScopeVersion { version: fact.version, position: fact.position };
        let seen = EffectiveHealth { health: report.health, source };
        self.effective_health.insert(instance.clone(), seen);
        Touched::shards([ShardKey::Endpoints(instance.service.clone())])
    }
}

impl Touched {
    fn shards(keys: impl IntoIterator<Item = ShardKey>) -> Self {
        Self { shards: keys.into_iter().collect(), instance: None }
    }
}

fn fold<S: Default>(entry: &mut Entry<S>, fact: &Fact, apply: impl FnOnce(S) -> S) {
    entry.state = apply(std::mem::take(&mut entry.state));
    entry.source = ScopeVersion { version: fact.version, position: fact.position };
    entry.at = fact.at;
    entry.actor.clone_from(&fact.actor);
}
