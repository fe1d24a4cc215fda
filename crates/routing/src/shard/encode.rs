//! Shards to canonical bytes.

use super::{Endpoint, EndpointsShard, InboundShard, PolicyLayer, ResolvedTraffic, TrustShard};
use crate::wire;
use prost::Message;
use std::collections::BTreeMap;
use weft_model::ServiceName;
use weft_model::health::Health;
use weft_model::security::{Action, Mode, OnChange, Rule};
use weft_model::service::ServicePort;
use weft_model::traffic::{
    Balance, CircuitLimits, ConnectPolicy, ConnectionPolicy, LocalityPolicy, Nearness, OutlierPolicy, Subset,
    TrafficPolicy,
};

impl EndpointsShard {
    /// The canonical bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let wide = self.traffic.iter().map(|resolved| traffic(None, resolved));
        let narrow = self.overrides.iter().map(|(source, resolved)| traffic(Some(source), resolved));
        wire::Endpoints {
            service: self.service.to_string(),
            address: self.address.map_or(0, u32::from),
            ports: self.ports.iter().map(port).collect(),
            endpoints: self.endpoints.iter().map(endpoint).collect(),
            traffic: wide.chain(narrow).collect(),
            panic: self.panic,
        }
        .encode_to_vec()
    }
}

impl InboundShard {
    /// The canonical bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        wire::Inbound {
            service: self.service.to_string(),
            ports: self.ports.iter().map(port).collect(),
            layers: self.layers.iter().map(layer).collect(),
            mesh_default: Some(wire::MeshDefault {
                allow: self.mesh_default == Action::Allow,
                version: self.mesh_source.version.0,
                position: self.mesh_source.position.0,
            }),
        }
        .encode_to_vec()
    }
}

impl TrustShard {
    /// The canonical bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        wire::Trust { trust_domain: self.trust_domain.to_string(), roots_pem: self.roots_pem.clone() }
            .encode_to_vec()
    }
}

fn port(ServicePort { name, port }: &ServicePort) -> wire::ServicePort {
    wire::ServicePort { name: name.to_string(), port: u32::from(port.number()) }
}

fn endpoint(endpoint: &Endpoint) -> wire::Endpoint {
    let health = match endpoint.health {
        Health::Unknown => wire::Health::Unknown,
        Health::Healthy => wire::Health::Healthy,
        Health::Unhealthy => wire::Health::Unhealthy,
    };
    wire::Endpoint {
        instance: endpoint.instance.to_string(),
        address: endpoint.address.to_string(),
        draining: endpoint.draining,
        health: health.into(),
        position: endpoint.position.0,
        region: endpoint.locality.region.clone(),
        zone: endpoint.locality.zone.clone(),
        labels: labels(&endpoint.labels),
    }
}

fn traffic(source: Option<&ServiceName>, resolved: &ResolvedTraffic) -> wire::Traffic {
    let TrafficPolicy {
        balance,
        locality: near,
        subsets,
        sticky_sources,
        slow_start_ms,
        connect,
        limits,
        outlier_detection,
        connection,
    } = &resolved.policy;
    let balance = match balance {
        Balance::LeastConnections => wire::Balance::LeastConnections,
        Balance::RoundRobin => wire::Balance::RoundRobin,
        Balance::Random => wire::Balance::Random,
        Balance::PeakEwma => wire::Balance::PeakEwma,
        Balance::Maglev => wire::Balance::Maglev,
    };
    wire::Traffic {
        source: source.map(ToString::to_string).unwrap_or_default(),
        balance: balance.into(),
        connect_timeout_ms: connect.timeout_ms,
        connect_retries: u32::from(connect.retries),
        version: resolved.source.version.0,
        position: resolved.source.position.0,
        slow_start_ms: *slow_start_ms,
        retry: unless_default(retry(connect), &retry(&ConnectPolicy::default())),
        limits: unless_default(circuit(limits), &circuit(&CircuitLimits::default())),
        outliers: unless_default(outliers(outlier_detection), &outliers(&OutlierPolicy::default())),
        lifetime: unless_default(lifetime(connection), &lifetime(&ConnectionPolicy::default())),
        locality: unless_default(locality(near), &locality(&LocalityPolicy::default())),
        subsets: subsets.iter().map(subset).collect(),
        sticky_sources: *sticky_sources,
    }
}

fn unless_default<T: PartialEq>(message: T, default: &T) -> Option<T> {
    (message != *default).then_some(message)
}

fn retry(connect: &ConnectPolicy) -> wire::Retry {
    wire::Retry {
        backoff_ms: connect.backoff_ms,
        budget_percent: u32::from(connect.budget_percent),
        budget_min_per_second: connect.budget_min_per_second,
    }
}

fn circuit(limits: &CircuitLimits) -> wire::Limits {
    wire::Limits {
        endpoint_connections: limits.endpoint_connections.unwrap_or_default(),
        endpoint_pending: limits.endpoint_pending.unwrap_or_default(),
        service_connections: limits.service_connections.unwrap_or_default(),
        service_pending: limits.service_pending.unwrap_or_default(),
    }
}

fn outliers(policy: &OutlierPolicy) -> wire::Outliers {
    wire::Outliers {
        enabled: policy.enabled,
        failures: u32::from(policy.failures),
        ejection_base_ms: policy.ejection_base_ms,
        ejection_max_ms: policy.ejection_max_ms,
        ejected_percent_max: u32::from(policy.ejected_percent_max),
    }
}

fn locality(policy: &LocalityPolicy) -> wire::Locality {
    let prefer = match policy.prefer {
        Nearness::Any => wire::Nearness::Any,
        Nearness::Region => wire::Nearness::Region,
        Nearness::Zone => wire::Nearness::Zone,
    };
    wire::Locality { prefer: prefer.into(), threshold_percent: policy.threshold_percent.into() }
}

fn subset(subset: &Subset) -> wire::Subset {
    wire::Subset {
        name: subset.name.to_string(),
        labels: labels(&subset.labels),
        weight: subset.weight.into(),
    }
}

fn labels(labels: &BTreeMap<String, String>) -> Vec<wire::Label> {
    labels.iter().map(|(key, value)| wire::Label { key: key.clone(), value: value.clone() }).collect()
}

fn lifetime(policy: &ConnectionPolicy) -> wire::Lifetime {
    wire::Lifetime {
        half_open_timeout_ms: policy.half_open_timeout_ms.unwrap_or_default(),
        idle_timeout_ms: policy.idle_timeout_ms.unwrap_or_default(),
        max_age_ms: policy.max_age_ms.unwrap_or_default(),
    }
}

fn layer(layer: &PolicyLayer) -> wire::Layer {
    let (on_change, grace_ms) = match layer.policy.on_change {
        None => (wire::OnChange::Unset, 0),
        Some(OnChange::Cut) => (wire::OnChange::Cut, 0),
        Some(OnChange::Grace(ms)) => (wire::OnChange::Grace, ms),
        Some(OnChange::Keep) => (wire::OnChange::Keep, 0),
    };
    wire::Layer {
        scope: layer.scope.to_string(),
        version: layer.source.version.0,
        position: layer.source.position.0,
        audit: layer.policy.mode == Mode::Audit,
        default: layer.policy.default.map_or(wire::Action::Unset, action).into(),
        rules: layer.policy.rules.iter().map(rule).collect(),
        on_change: on_change.into(),
        grace_ms,
    }
}

fn rule(rule: &Rule) -> wire::Rule {
    wire::Rule {
        name: rule.name.to_string(),
        action: action(rule.action).into(),
        any: rule.from.any,
        services: rule.from.services.iter().map(ToString::to_string).collect(),
        namespaces: rule.from.namespaces.iter().map(ToString::to_string).collect(),
        ports: rule.ports.iter().map(|port| u32::from(port.number())).collect(),
    }
}

const fn action(action: Action) -> wire::Action {
    match action {
        Action::Allow => wire::Action::Allow,
        Action::Deny => wire::Action::Deny,
    }
}
