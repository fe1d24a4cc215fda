//! Canonical bytes to shards. The bytes come over the network or from a disk: everything is checked, and what is not
//! understood is refused, because a rule that is ignored is a hole. So a shard is taken only if encoding it again gives
//! the same bytes: a field that a newer controller added and set makes an older sidecar refuse it, aloud, and keep what it
//! has.

use super::{Endpoint, EndpointsShard, InboundShard, PolicyLayer, ResolvedTraffic, TrustShard};
use crate::wire;
use prost::Message;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::str::FromStr;
use weft_model::health::Health;
use weft_model::membership::Locality;
use weft_model::security::{Action, Mode, OnChange, Rule, SecurityPolicy, Sources};
use weft_model::service::ServicePort;
use weft_model::traffic::{
    Balance, CircuitLimits, ConnectPolicy, ConnectionPolicy, LocalityPolicy, Nearness, OutlierPolicy, Subset,
    TrafficPolicy,
};
use weft_model::{Port, Position, ScopeVersion, Version};

/// Bytes are not the shard that they should be.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// They are not the expected protobuf.
    #[error("shard is not readable")]
    Encoding(#[from] prost::DecodeError),
    /// A field has a value that it cannot have.
    #[error("shard has a malformed {0}")]
    Field(&'static str),
    /// It holds more than this version understands, or is not in canonical form.
    #[error("shard holds something that this version does not understand")]
    NotUnderstood,
}

fn understood<T>(shard: T, canonical: &[u8], bytes: &[u8]) -> Result<T, ShardError> {
    if canonical == bytes { Ok(shard) } else { Err(ShardError::NotUnderstood) }
}

impl EndpointsShard {
    /// Reads canonical bytes back.
    ///
    /// # Errors
    /// If they are not what [`EndpointsShard::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Result<Self, ShardError> {
        let shard = wire::Endpoints::decode(bytes)?;
        let mut service_wide = None;
        let mut overrides = BTreeMap::new();
        if !shard.endpoints.is_sorted_by(|a, b| a.instance < b.instance) {
            return Err(ShardError::NotUnderstood);
        }
        for traffic in &shard.traffic {
            let resolved = resolved_traffic(traffic)?;
            if traffic.source.is_empty() {
                service_wide = Some(resolved);
            } else {
                overrides.insert(parse(&traffic.source, "traffic source")?, resolved);
            }
        }
        let decoded = Self {
            service: parse(&shard.service, "service")?,
            address: (shard.address != 0).then(|| Ipv4Addr::from(shard.address)),
            ports: shard.ports.iter().map(service_port).collect::<Result<_, _>>()?,
            endpoints: shard.endpoints.iter().map(endpoint).collect::<Result<_, _>>()?,
            panic: shard.panic,
            traffic: service_wide,
            overrides,
        };
        let canonical = decoded.encode();
        understood(decoded, &canonical, bytes)
    }
}

impl InboundShard {
    /// Reads canonical bytes back.
    ///
    /// # Errors
    /// If they are not what [`InboundShard::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Result<Self, ShardError> {
        let shard = wire::Inbound::decode(bytes)?;
        let mesh = shard.mesh_default.ok_or(ShardError::Field("mesh default"))?;
        let decoded = Self {
            service: parse(&shard.service, "service")?,
            ports: shard.ports.iter().map(service_port).collect::<Result<_, _>>()?,
            layers: shard.layers.iter().map(layer).collect::<Result<_, _>>()?,
            mesh_default: if mesh.allow { Action::Allow } else { Action::Deny },
            mesh_source: source(mesh.version, mesh.position),
        };
        let canonical = decoded.encode();
        understood(decoded, &canonical, bytes)
    }
}

impl TrustShard {
    /// Reads canonical bytes back.
    ///
    /// # Errors
    /// If they are not what [`TrustShard::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Result<Self, ShardError> {
        let shard = wire::Trust::decode(bytes)?;
        let trust_domain = parse(&shard.trust_domain, "trust domain")?;
        let decoded = Self { trust_domain, roots_pem: shard.roots_pem };
        let canonical = decoded.encode();
        understood(decoded, &canonical, bytes)
    }
}

fn parse<T: FromStr>(text: &str, field: &'static str) -> Result<T, ShardError> {
    text.parse().map_err(|_| ShardError::Field(field))
}

fn port(number: u32) -> Result<Port, ShardError> {
    u16::try_from(number).ok().and_then(Port::new).ok_or(ShardError::Field("port"))
}

const fn source(version: u64, position: u64) -> ScopeVersion {
    ScopeVersion { version: Version(version), position: Position(position) }
}

fn service_port(shard: &wire::ServicePort) -> Result<ServicePort, ShardError> {
    Ok(ServicePort { name: parse(&shard.name, "port name")?, port: port(shard.port)? })
}

fn endpoint(shard: &wire::Endpoint) -> Result<Endpoint, ShardError> {
    let health = match wire::Health::try_from(shard.health) {
        Ok(wire::Health::Unknown) => Health::Unknown,
        Ok(wire::Health::Healthy) => Health::Healthy,
        Ok(wire::Health::Unhealthy) => Health::Unhealthy,
        Err(_) => return Err(ShardError::Field("health")),
    };
    Ok(Endpoint {
        instance: parse(&shard.instance, "instance")?,
        address: parse(&shard.address, "address")?,
        draining: shard.draining,
        health,
        position: Position(shard.position),
        locality: Locality { region: shard.region.clone(), zone: shard.zone.clone() },
        labels: labels(&shard.labels),
    })
}

fn resolved_traffic(shard: &wire::Traffic) -> Result<ResolvedTraffic, ShardError> {
    let balance = match wire::Balance::try_from(shard.balance) {
        Ok(wire::Balance::LeastConnections) => Balance::LeastConnections,
        Ok(wire::Balance::RoundRobin) => Balance::RoundRobin,
        Ok(wire::Balance::Random) => Balance::Random,
        Ok(wire::Balance::PeakEwma) => Balance::PeakEwma,
        Ok(wire::Balance::Maglev) => Balance::Maglev,
        Err(_) => return Err(ShardError::Field("balance")),
    };
    let mut connect = ConnectPolicy { timeout_ms: shard.connect_timeout_ms, ..ConnectPolicy::default() };
    connect.retries = small(shard.connect_retries, "retries")?;
    if let Some(retry) = shard.retry {
        connect.backoff_ms = retry.backoff_ms;
        connect.budget_percent = small(retry.budget_percent, "retry budget")?;
        connect.budget_min_per_second = retry.budget_min_per_second;
    }
    let policy = TrafficPolicy {
        balance,
        slow_start_ms: shard.slow_start_ms,
        connect,
        limits: shard.limits.map(circuit).unwrap_or_default(),
        outlier_detection: shard.outliers.map_or_else(|| Ok(OutlierPolicy::default()), outliers)?,
        connection: shard.lifetime.map(lifetime).unwrap_or_default(),
        locality: shard.locality.map_or_else(|| Ok(LocalityPolicy::default()), locality)?,
        subsets: shard.subsets.iter().map(subset).collect::<Result<_, _>>()?,
        sticky_sources: shard.sticky_sources,
    };
    Ok(ResolvedTraffic { policy, source: source(shard.version, shard.position) })
}

fn small(number: u32, field: &'static str) -> Result<u8, ShardError> {
    u8::try_from(number).map_err(|_| ShardError::Field(field))
}

fn circuit(shard: wire::Limits) -> CircuitLimits {
    CircuitLimits {
        endpoint_connections: some(shard.endpoint_connections),
        endpoint_pending: some(shard.endpoint_pending),
        service_connections: some(shard.service_connections),
        service_pending: some(shard.service_pending),
    }
}

fn outliers(shard: wire::Outliers) -> Result<OutlierPolicy, ShardError> {
    Ok(OutlierPolicy {
        enabled: shard.enabled,
        failures: small(shard.failures, "failures")?,
        ejection_base_ms: shard.ejection_base_ms,
        ejection_max_ms: shard.ejection_max_ms,
        ejected_percent_max: small(shard.ejected_percent_max, "ejected share")?,
    })
}

fn subset(shard: &wire::Subset) -> Result<Subset, ShardError> {
    Ok(Subset {
        name: parse(&shard.name, "subset name")?,
        labels: labels(&shard.labels),
        weight: u16::try_from(shard.weight).map_err(|_| ShardError::Field("subset weight"))?,
    })
}

fn labels(shard: &[wire::Label]) -> BTreeMap<String, String> {
    shard.iter().map(|label| (label.key.clone(), label.value.clone())).collect()
}

fn locality(shard: wire::Locality) -> Result<LocalityPolicy, ShardError> {
    let prefer = match wire::Nearness::try_from(shard.prefer) {
        Ok(wire::Nearness::Any) => Nearness::Any,
        Ok(wire::Nearness::Region) => Nearness::Region,
        Ok(wire::Nearness::Zone) => Nearness::Zone,
        Err(_) => return Err(ShardError::Field("locality")),
    };
    // What is divided by.
    let threshold_percent = small(shard.threshold_percent, "locality threshold")?;
    if threshold_percent == 0 {
        return Err(ShardError::Field("locality threshold"));
    }
    Ok(LocalityPolicy { prefer, threshold_percent })
}

fn lifetime(shard: wire::Lifetime) -> ConnectionPolicy {
    ConnectionPolicy {
        half_open_timeout_ms: some(shard.half_open_timeout_ms),
        idle_timeout_ms: some(shard.idle_timeout_ms),
        max_age_ms: some(shard.max_age_ms),
    }
}

fn some(number: u32) -> Option<u32> {
    (number != 0).then_some(number)
}

fn layer(shard: &wire::Layer) -> Result<PolicyLayer, ShardError> {
    let default = match wire::Action::try_from(shard.default) {
        Ok(wire::Action::Unset) => None,
        Ok(wire::Action::Allow) => Some(Action::Allow),
        Ok(wire::Action::Deny) => Some(Action::Deny),
        Err(_) => return Err(ShardError::Field("default")),
    };
    let on_change = match wire::OnChange::try_from(shard.on_change) {
        Ok(wire::OnChange::Unset) => None,
        Ok(wire::OnChange::Cut) => Some(OnChange::Cut),
        Ok(wire::OnChange::Grace) => Some(OnChange::Grace(shard.grace_ms)),
        Ok(wire::OnChange::Keep) => Some(OnChange::Keep),
        Err(_) => return Err(ShardError::Field("on_change")),
    };
    Ok(PolicyLayer {
        scope: parse(&shard.scope, "policy scope")?,
        source: source(shard.version, shard.position),
        policy: SecurityPolicy {
            default,
            mode: if shard.audit { Mode::Audit } else { Mode::Enforce },
            on_change,
            rules: shard.rules.iter().map(rule).collect::<Result<_, _>>()?,
        },
    })
}

fn rule(shard: &wire::Rule) -> Result<Rule, ShardError> {
    let action = match wire::Action::try_from(shard.action) {
        Ok(wire::Action::Allow) => Action::Allow,
        Ok(wire::Action::Deny) => Action::Deny,
        Ok(wire::Action::Unset) | Err(_) => return Err(ShardError::Field("action")),
    };
    let services = shard.services.iter().map(|name| parse(name, "rule source"));
    let namespaces = shard.namespaces.iter().map(|name| parse(name, "rule source"));
    Ok(Rule {
        name: parse(&shard.name, "rule name")?,
        action,
        from: Sources {
            any: shard.any,
            services: services.collect::<Result<_, _>>()?,
            namespaces: namespaces.collect::<Result<_, _>>()?,
        },
        ports: shard.ports.iter().map(|number| port(*number)).collect::<Result<_, _>>()?,
    })
}
