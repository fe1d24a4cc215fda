//! The fold: every scope's state. What an event does to it, and which shards it touches, is in `state/apply.rs`.

mod apply;
mod health;
mod instances;

pub use apply::{FoldError, Touched, TouchedShards};

use crate::address::Addresses;
use crate::damping::Damping;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use weft_model::ca::CaState;
use weft_model::health::{Health, HealthState};
use weft_model::identity::IdentityState;
use weft_model::membership::{InstanceRegistered, MembershipState};
use weft_model::mesh::MeshState;
use weft_model::rollout::RolloutState;
use weft_model::security::SecurityState;
use weft_model::service::ServiceState;
use weft_model::token::TokenState;
use weft_model::traffic::TrafficState;
use weft_model::{
    ConfigVersion, InstanceId, Name, Scope, ScopeVersion, SecurityScope, ServiceName, Timestamp, TokenId,
    TrafficScope,
};

pub(crate) use instances::{Instance, Instances, Place};

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

impl<S> Entry<S> {
    /// Whether the scope has an event.
    const fn exists(&self) -> bool {
        self.source.version.0 > 0
    }
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
    pub(crate) version: ConfigVersion,
    pub(crate) at: Timestamp,
    pub(crate) services: BTreeMap<ServiceName, Entry<ServiceState>>,
    pub(crate) instances: Instances,
    pub(crate) traffic: BTreeMap<TrafficScope, Entry<TrafficState>>,
    pub(crate) security: BTreeMap<SecurityScope, Entry<SecurityState>>,
    /// Shared with clones, as instances are: of all that a mesh remembers, tokens only become more.
    pub(crate) tokens: BTreeMap<TokenId, Arc<Entry<TokenState>>>,
    pub(crate) ca: Entry<CaState>,
    pub(crate) mesh: Entry<MeshState>,
    pub(crate) mesh_security: ScopeVersion,
    pub(crate) rollout: Entry<RolloutState>,
    pub(crate) addresses: Addresses,
    /// The instances that are ready or draining; what an instance costs ends with it.
    pub(crate) live: BTreeMap<ServiceName, BTreeMap<Name, Place>>,
    /// The endpoints that damping holds down.
    pub(crate) held: BTreeSet<InstanceId>,
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

    /// The version and last event of a scope; zero if it has none.
    #[must_use]
    pub fn source(&self, scope: &Scope) -> ScopeVersion {
        fn of<K: Ord, S>(map: &BTreeMap<K, Entry<S>>, key: &K) -> ScopeVersion {
            map.get(key).map(|entry| entry.source).unwrap_or_default()
        }
        match scope {
            Scope::Service(service) => of(&self.services, service),
            Scope::Membership(id) => {
                self.instances.get(id).map(|it| it.membership.source).unwrap_or_default()
            }
            Scope::Health(id) => self.instances.get(id).map(|it| it.health.source).unwrap_or_default(),
            Scope::Traffic(scope) => of(&self.traffic, scope),
            Scope::Security(scope) => of(&self.security, scope),
            Scope::Identity(id) => self.instances.get(id).map(|it| it.identity.source).unwrap_or_default(),
            Scope::Token(id) => self.tokens.get(id).map(|it| it.source).unwrap_or_default(),
            Scope::Ca => self.ca.source,
            Scope::Mesh => self.mesh.source,
            Scope::Rollout => self.rollout.source,
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
        let entries = self.instances.iter().map(|(id, instance)| (id, &instance.membership));
        entries.filter(|(_, entry)| entry.exists())
    }

    /// The ready and draining instances of a service, by name.
    pub fn live_instances_of<'a>(
        &'a self,
        service: &'a ServiceName,
    ) -> impl Iterator<Item = (InstanceId, &'a Entry<MembershipState>, &'a InstanceRegistered)> {
        self.live_of(service).filter_map(|(id, instance)| {
            let entry = &instance.membership;
            Some((id, entry, entry.state.registration()?))
        })
    }

    pub(crate) fn live_of<'a>(
        &'a self,
        service: &'a ServiceName,
    ) -> impl Iterator<Item = (InstanceId, &'a Instance)> {
        self.live.get(service).into_iter().flatten().filter_map(move |(name, place)| {
            let id = InstanceId { service: service.clone(), instance: name.clone() };
            Some((id, self.instances.at(*place)?))
        })
    }

    /// How many instances of a service are ready or draining.
    #[must_use]
    pub fn live_count(&self, service: &ServiceName) -> usize {
        self.live.get(service).map_or(0, BTreeMap::len)
    }

    /// Every ready or draining instance, by name.
    pub(crate) fn live_instances(&self) -> impl Iterator<Item = InstanceId> {
        self.live.iter().flat_map(|(service, names)| {
            let id = |name: &Name| InstanceId { service: service.clone(), instance: name.clone() };
            names.keys().map(id)
        })
    }

    /// Every service that was ever declared, deleted ones too, by name.
    pub(crate) fn services_ever(&self) -> impl ExactSizeIterator<Item = &ServiceName> {
        self.services.keys()
    }

    /// An instance's membership, if it ever took part.
    #[must_use]
    pub fn membership(&self, instance: &InstanceId) -> Option<&Entry<MembershipState>> {
        self.instances.get(instance).map(|it| &it.membership).filter(|entry| entry.exists())
    }

    /// What was last reported of an instance.
    #[must_use]
    pub fn health(&self, instance: &InstanceId) -> Option<&Entry<HealthState>> {
        self.instances.get(instance).map(|it| &it.health).filter(|entry| entry.exists())
    }

    pub(crate) fn effective_health(&self, instance: &InstanceId) -> EffectiveHealth {
        self.instances.get(instance).map(|it| it.seen).unwrap_or_default()
    }

    /// What is reported of an instance's health since it takes part.
    #[must_use]
    pub fn health_reported(&self, instance: &InstanceId) -> Health {
        self.instances.get(instance).map(Instance::reported).unwrap_or_default()
    }

    /// How much an endpoint flapped; none if it never got points since it takes part.
    #[must_use]
    pub fn damping(&self, instance: &InstanceId) -> Option<&Damping> {
        self.instances.get(instance)?.damping.as_deref()
    }

    /// The endpoints that damping holds down, by name.
    pub fn held(&self) -> impl ExactSizeIterator<Item = &InstanceId> {
        self.held.iter()
    }

    /// Every endpoint that got points since it takes part, by name.
    pub fn damped(&self) -> impl Iterator<Item = (InstanceId, &Damping)> {
        self.live_instances().filter_map(|id| Some((id.clone(), self.damping(&id)?)))
    }

    pub(crate) fn instance(&self, instance: &InstanceId) -> Option<&Instance> {
        self.instances.get(instance)
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
        self.instances.get(instance).map(|it| &it.identity).filter(|entry| entry.exists())
    }

    /// A join token's life so far.
    #[must_use]
    pub fn token(&self, id: &TokenId) -> Option<&Entry<TokenState>> {
        self.tokens.get(id).map(AsRef::as_ref)
    }

    /// The trusted roots.
    #[must_use]
    pub const fn ca(&self) -> &Entry<CaState> {
        &self.ca
    }

    /// The rollout of the moment, or how the last one ended.
    #[must_use]
    pub const fn rollout(&self) -> &Entry<RolloutState> {
        &self.rollout
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
}
