//! What an event does to the state, and which shards it touches.
//!
//! Every event finds its scope once: the entry that is checked is the one that is changed. Nothing is copied to say what
//! was touched; most events touch nothing or one service's endpoints.

use super::{EffectiveHealth, Entry, RoutingState};
use std::collections::BTreeMap;
use std::collections::btree_map;
use std::sync::Arc;
use weft_model::membership::{self, MembershipEvent, MembershipState};
use weft_model::rollout::{self, RolloutBegun};
use weft_model::service::{self, ServiceEvent};
use weft_model::{
    ConfigVersion, Epoch, Event, Fact, InstanceId, Position, Scope, ScopeVersion, SecurityScope, ServiceName,
    Version, ca, identity, mesh, security, token, traffic,
};

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
pub struct Touched<'a> {
    /// The shards that are built from what changed.
    pub shards: TouchedShards<'a>,
    /// The instance whose registration changed.
    pub instance: Option<&'a InstanceId>,
    /// The rollout that began or ended.
    pub rollout: Option<RolloutBegun>,
}

/// The shards that an event touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TouchedShards<'a> {
    /// None.
    #[default]
    None,
    /// One service's endpoints.
    Endpoints(&'a ServiceName),
    /// One service's endpoints and its inbound policy.
    Service(&'a ServiceName),
    /// Inbound policies.
    Inbound(Vec<ServiceName>),
    /// The trust bundle.
    Trust,
}

impl RoutingState {
    /// Takes in the next event and says what it touched.
    ///
    /// # Errors
    /// If the event is not the next one of the log and of its scope. Nothing was changed.
    pub fn apply<'a>(&mut self, fact: &'a Fact) -> Result<Touched<'a>, FoldError> {
        self.check_order(fact)?;
        let touched = self.apply_event(fact)?;
        self.version = fact.config_version();
        self.at = fact.at;
        Ok(touched)
    }

    fn check_order(&self, fact: &Fact) -> Result<(), FoldError> {
        let ConfigVersion { epoch, position } = self.version;
        if fact.position != position.next() {
            return Err(FoldError::Position { last: position, found: fact.position });
        }
        if fact.epoch < epoch {
            return Err(FoldError::Epoch { position: fact.position, last: epoch, found: fact.epoch });
        }
        Ok(())
    }

    fn apply_event<'a>(&mut self, fact: &'a Fact) -> Result<Touched<'a>, FoldError> {
        Ok(match (&fact.event, &fact.scope) {
            (Event::Service(event), Scope::Service(service)) => self.apply_service(fact, service, event)?,
            (Event::Membership(event), Scope::Membership(id)) => self.apply_membership(fact, id, event)?,
            (Event::Health(event), Scope::Health(id)) => self.apply_health(fact, id, event)?,
            (Event::Traffic(event), Scope::Traffic(scope)) => {
                fold(next(&mut self.traffic, scope, fact)?, fact, |state| traffic::apply(state, event));
                Touched::shards(TouchedShards::Endpoints(&scope.destination))
            }
            (Event::Security(event), Scope::Security(scope)) => {
                fold(next(&mut self.security, scope, fact)?, fact, |state| security::apply(state, event));
                Touched::shards(TouchedShards::Inbound(self.covered(scope)))
            }
            (Event::Identity(event), Scope::Identity(id)) => {
                follows(self.instances.get(id).map(|it| it.identity.source), fact)?;
                fold(&mut self.instances.make(id).identity, fact, |state| identity::apply(state, event));
                Touched::default()
            }
            (Event::Token(event), Scope::Token(id)) => {
                follows(self.tokens.get(id).map(|it| it.source), fact)?;
                let entry = Arc::make_mut(self.tokens.entry(id.clone()).or_default());
                fold(entry, fact, |state| token::apply(state, event));
                Touched::default()
            }
            (Event::Ca(event), Scope::Ca) => {
                follows(Some(self.ca.source), fact)?;
                fold(&mut self.ca, fact, |state| ca::apply(state, event));
                Touched::shards(TouchedShards::Trust)
            }
            (Event::Mesh(event), Scope::Mesh) => {
                follows(Some(self.mesh.source), fact)?;
                let before = self.mesh.state.security;
                fold(&mut self.mesh, fact, |state| mesh::apply(state, event));
                if self.mesh.state.security == before {
                    return Ok(Touched::default());
                }
                self.mesh_security = self.mesh.source;
                Touched::shards(TouchedShards::Inbound(self.covered(&SecurityScope::Mesh)))
            }
            (Event::Rollout(event), Scope::Rollout) => {
                follows(Some(self.rollout.source), fact)?;
                let before = self.rollout.state.running().cloned();
                fold(&mut self.rollout, fact, |state| rollout::apply(state, event));
                let touched = before.or_else(|| self.rollout.state.running().cloned());
                Touched { rollout: touched, ..Touched::default() }
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
                | Event::Mesh(_)
                | Event::Rollout(_),
                _,
            ) => return Err(FoldError::Family { position: fact.position, scope: fact.scope.clone() }),
        })
    }

    /// The services that a security scope covers.
    fn covered(&self, scope: &SecurityScope) -> Vec<ServiceName> {
        match scope {
            SecurityScope::Mesh => self.services().map(|(service, _)| service.clone()).collect(),
            SecurityScope::Namespace(namespace) => {
                let own = self.services.range(ServiceName::first_of(namespace)..);
                let own = own.take_while(|(service, _)| service.namespace == *namespace);
                own.filter(|(_, entry)| entry.state.is_some()).map(|(service, _)| service.clone()).collect()
            }
            SecurityScope::Service(service) => {
                self.is_declared(service).then(|| service.clone()).into_iter().collect()
            }
        }
    }

    fn apply_service<'a>(
        &mut self,
        fact: &Fact,
        service: &'a ServiceName,
        event: &ServiceEvent,
    ) -> Result<Touched<'a>, FoldError> {
        fold(next(&mut self.services, service, fact)?, fact, |state| service::apply(state, event));
        match event {
            ServiceEvent::ServiceDeclared(declared) => {
                // A full range leaves the service without a loopback address; its explicit ports still work.
                self.addresses.assign(service, declared.address);
            }
            ServiceEvent::ServiceDeleted(_) => self.addresses.release(service),
        }
        Ok(Touched::shards(TouchedShards::Service(service)))
    }

    fn apply_membership<'a>(
        &mut self,
        fact: &Fact,
        id: &'a InstanceId,
        event: &MembershipEvent,
    ) -> Result<Touched<'a>, FoldError> {
        follows(self.instances.get(id).map(|it| it.membership.source), fact)?;
        let place = |state: &MembershipState| state.registration().map(|it| (it.address, it.port));
        let instance = self.instances.make(id);
        let before = place(&instance.membership.state);
        let described_anew = match (event, instance.membership.state.registration()) {
            (MembershipEvent::InstanceRegistered(after), Some(before)) => after.metadata != before.metadata,
            (MembershipEvent::InstanceRegistered(_), None)
            | (
                MembershipEvent::InstanceDraining(_)
                | MembershipEvent::InstanceDeregistered(_)
                | MembershipEvent::UpstreamAdded(_),
                _,
            ) => false,
        };
        fold(&mut instance.membership, fact, |state| membership::apply(state, event));
        let after = place(&instance.membership.state);
        if matches!(event, MembershipEvent::UpstreamAdded(_)) {
            return Ok(Touched { instance: Some(id), ..Touched::default() });
        }
        instance.placed = fact.position;
        match (before, after) {
            (None, Some(_)) => {
                self.enter(id);
            }
            (Some(_), None) => self.leave(id),
            (Some(before), Some(after)) => self.stay(id, before != after, described_anew, fact.at),
            (None, None) => {}
        }
        Ok(Touched { instance: Some(id), ..Touched::shards(TouchedShards::Endpoints(&id.service)) })
    }

    /// It takes part from now on; it is known already.
    pub(crate) fn enter(&mut self, id: &InstanceId) {
        if let Some(place) = self.instances.place(id) {
            self.live.entry(id.service.clone()).or_default().insert(id.instance.clone(), place);
        }
    }

    /// What was known of its health goes with it: who comes back is observed anew, and starts without points.
    fn leave(&mut self, id: &InstanceId) {
        if let Some(instance) = self.instances.get_mut(id) {
            instance.seen = EffectiveHealth::default();
            instance.damping = None;
        }
        self.held.remove(id);
        if let Some(names) = self.live.get_mut(&id.service) {
            names.remove(&id.instance);
            if names.is_empty() {
                self.live.remove(&id.service);
            }
        }
    }
}

impl<'a> Touched<'a> {
    pub(super) const fn shards(shards: TouchedShards<'a>) -> Self {
        Self { shards, instance: None, rollout: None }
    }
}

/// The entry of a scope, if the event is the next one there.
fn next<'m, K: Ord + Clone, S: Default>(
    map: &'m mut BTreeMap<K, Entry<S>>,
    key: &K,
    fact: &Fact,
) -> Result<&'m mut Entry<S>, FoldError> {
    match map.entry(key.clone()) {
        btree_map::Entry::Occupied(entry) => {
            follows(Some(entry.get().source), fact)?;
            Ok(entry.into_mut())
        }
        btree_map::Entry::Vacant(place) => {
            follows(None, fact)?;
            Ok(place.insert(Entry::default()))
        }
    }
}

/// Checks that an event is the next one of its scope, which is at `source`.
pub(super) fn follows(source: Option<ScopeVersion>, fact: &Fact) -> Result<(), FoldError> {
    let last = source.unwrap_or_default().version;
    if fact.version == last.next() {
        return Ok(());
    }
    let (position, scope) = (fact.position, fact.scope.clone());
    Err(FoldError::Version { position, scope, last, found: fact.version })
}

pub(super) fn fold<S: Default>(entry: &mut Entry<S>, fact: &Fact, apply: impl FnOnce(S) -> S) {
    entry.state = apply(std::mem::take(&mut entry.state));
    entry.source = ScopeVersion { version: fact.version, position: fact.position };
    entry.at = fact.at;
    entry.actor.clone_from(&fact.actor);
}
