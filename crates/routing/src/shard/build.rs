//! Routing state to shards.

use super::{Endpoint, EndpointsShard, InboundShard, ResolvedTraffic, ShardKey, TrustShard};
use crate::damping::guard;
use crate::rollout::Audience;
use crate::state::{Instance, RoutingState};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use weft_model::health::Health;
use weft_model::membership::{Locality, MembershipState};
use weft_model::security::Action;
use weft_model::service::ServicePort;
use weft_model::{InstanceId, ScopeVersion, SecurityScope, ServiceName, TrafficScope};

/// The canonical bytes of a shard for an audience, or none if the state has nothing for it.
pub(crate) fn build(state: &RoutingState, key: &ShardKey, audience: Audience) -> Option<Vec<u8>> {
    match key {
        ShardKey::Endpoints(service) => endpoints(state, service, audience).map(|shard| shard.encode()),
        ShardKey::Inbound(service) => inbound(state, service, audience).map(|shard| shard.encode()),
        ShardKey::Trust => trust(state).map(|shard| shard.encode()),
    }
}

/// A deleted service leaves an empty shard: who still names it learns that it is gone, and never runs an older
/// version because a shard vanished.
fn endpoints(state: &RoutingState, service: &ServiceName, audience: Audience) -> Option<EndpointsShard> {
    let declared = state.service(service)?.state.is_some();
    let wide = TrafficScope { source: None, destination: service.clone() };
    let narrow = state.traffic_scopes_to(audience, service);
    let traffic = state.traffic_for(audience, &wide);
    let overrides: BTreeMap<_, _> = narrow
        .into_iter()
        .filter_map(|scope| {
            let resolved = state.traffic_for(audience, scope)?;
            Some((scope.source.clone()?, resolved))
        })
        .collect();
    // What nobody looks at is not sent: a sidecar of an older version does not know it.
    let located = traffic.iter().chain(overrides.values()).any(ResolvedTraffic::looks_at_localities);
    let keys: BTreeSet<_> =
        traffic.iter().chain(overrides.values()).flat_map(ResolvedTraffic::looks_at).collect();
    let endpoints = if declared { service_endpoints(state, service, located, &keys) } else { Vec::new() };
    Some(EndpointsShard {
        service: service.clone(),
        address: state.address(service),
        ports: ports(state, service),
        panic: in_panic(&endpoints),
        endpoints,
        traffic,
        overrides,
    })
}

fn service_endpoints(
    state: &RoutingState,
    service: &ServiceName,
    located: bool,
    keys: &BTreeSet<&String>,
) -> Vec<Endpoint> {
    let endpoint = |(id, instance): (InstanceId, &Instance)| {
        let Instance { membership, seen, .. } = instance;
        let registration = membership.state.registration()?;
        Some(Endpoint {
            instance: id.instance,
            address: SocketAddr::new(registration.address, registration.port.number()),
            draining: matches!(membership.state, MembershipState::Draining(_)),
            health: seen.health,
            position: instance.placed.max(seen.source.position),
            labels: looked_at(&registration.metadata, keys),
            locality: if located { Locality::of(&registration.metadata) } else { Locality::default() },
        })
    };
    state.live_of(service).filter_map(endpoint).collect()
}

fn looked_at(metadata: &BTreeMap<String, String>, keys: &BTreeSet<&String>) -> BTreeMap<String, String> {
    let found = keys.iter().filter_map(|key| metadata.get_key_value(*key));
    found.map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn in_panic(endpoints: &[Endpoint]) -> bool {
    let observed = endpoints.iter().filter(|it| !it.draining && it.health != Health::Unknown);
    let (usable, of) =
        observed.fold((0, 0), |(usable, of), it| (usable + usize::from(it.eligible()), of + 1));
    guard::panics(usable, of)
}

pub(crate) fn inbound(
    state: &RoutingState,
    service: &ServiceName,
    audience: Audience,
) -> Option<InboundShard> {
    if state.service(service)?.state.is_none() {
        // Policies that cover a deleted service do not touch its shard, so it must not show them.
        return Some(InboundShard {
            service: service.clone(),
            ports: Vec::new(),
            layers: Vec::new(),
            mesh_default: Action::Deny,
            mesh_source: ScopeVersion::default(),
        });
    }
    let nearest_first = [
        SecurityScope::Service(service.clone()),
        SecurityScope::Namespace(service.namespace.clone()),
        SecurityScope::Mesh,
    ];
    Some(InboundShard {
        service: service.clone(),
        ports: ports(state, service),
        layers: nearest_first.into_iter().filter_map(|scope| state.security_for(audience, scope)).collect(),
        mesh_default: state.mesh().state.security,
        mesh_source: state.mesh_security_source(),
    })
}

fn trust(state: &RoutingState) -> Option<TrustShard> {
    let roots = &state.ca().state;
    Some(TrustShard {
        trust_domain: roots.first()?.trust_domain.clone(),
        roots_pem: roots.iter().map(|root| root.certificate_pem.clone()).collect(),
    })
}

fn ports(state: &RoutingState, service: &ServiceName) -> Vec<ServicePort> {
    let declared = state.service(service).and_then(|entry| entry.state.as_ref());
    declared.map(|declared| declared.ports.clone()).unwrap_or_default()
}
