//! Shards to canonical bytes.

use super::{Endpoint, EndpointsShard, InboundShard, PolicyLayer, ResolvedTraffic, TrustShard};
use crate::wire;
use prost::Message;
use weft_model::ServiceName;
use weft_model::health::Health;
use weft_model::security::{Action, Mode, Rule};
use weft_model::service::ServicePort;
use weft_model::traffic::Balance;

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
    }
}

fn traffic(source: Option<&ServiceName>, resolved: &ResolvedTraffic) -> wire::Traffic {
    let balance = match resolved.policy.balance {
        Balance::LeastConnections => wire::Balance::LeastConnections,
        Balance::RoundRobin => wire::Balance::RoundRobin,
        Balance::Random => wire::Balance::Random,
    };
    wire::Traffic {
        source: source.map(ToString::to_string).unwrap_or_default(),
        balance: balance.into(),
        connect_timeout_ms: resolved.policy.connect.timeout_ms,
        connect_retries: u32::from(resolved.policy.connect.retries),
        version: resolved.source.version.0,
        position: resolved.source.position.0,
    }
}

fn layer(layer: &PolicyLayer) -> wire::Layer {
    wire::Layer {
        scope: layer.scope.to_string(),
        version: layer.source.version.0,
        position: layer.source.position.0,
        audit: layer.policy.mode == Mode::Audit,
        default: layer.policy.default.map_or(wire::Action::Unset, action).into(),
        rules: layer.policy.rules.iter().map(rule).collect(),
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
