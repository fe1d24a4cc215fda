//! The resources of the mesh: what exists, each with its last writer.

use weft_identity::spiffe::{SpiffeId, Subject};
use weft_model::damping::DampingSettings;
use weft_model::health::Health;
use weft_model::membership::{InstanceRegistered, Upstreams};
use weft_model::mesh::MeshDefaults;
use weft_model::security::{Action, Mode, OnChange, Rule, SecurityPolicy};
use weft_model::traffic::{Balance, Nearness, Subset, TrafficPolicy};
use weft_model::{InstanceId, Scope, SecurityScope, ServiceName, TrafficScope};
use weft_proto::v1 as pb;
use weft_proto::v1::resource::Spec;
use weft_routing::RoutingState;
use weft_routing::state::Entry;

use super::service_ports;

fn resource<S>(scope: &Scope, entry: &Entry<S>, spec: Spec) -> pb::Resource {
    pb::Resource {
        scope: scope.to_string(),
        version: entry.source.version.0,
        position: entry.source.position.0,
        changed_at_ms: entry.at.0,
        actor: entry.actor.clone(),
        spec: Some(spec),
        reached_at: String::new(),
    }
}

pub(crate) fn service(state: &RoutingState, name: &ServiceName) -> Option<pb::Resource> {
    let entry = state.service(name)?;
    let declared = entry.state.as_ref()?;
    let spec = pb::DeclareService {
        name: name.to_string(),
        ports: service_ports(&declared.ports),
        address: declared.address.map(|address| address.to_string()).unwrap_or_default(),
    };
    let reached_at = state.address(name).map(|address| address.to_string()).unwrap_or_default();
    Some(pb::Resource { reached_at, ..resource(&Scope::Service(name.clone()), entry, Spec::Service(spec)) })
}

pub(crate) fn instance(state: &RoutingState, id: &InstanceId) -> Option<pb::Resource> {
    let entry = state.membership(id)?;
    let registration = entry.state.registration()?;
    let report = state.health(id).and_then(|entry| Some((entry.at, entry.state.as_ref()?)));
    let leaf = state.identity(id).and_then(|entry| entry.state.as_ref());
    let trust_domain = state.ca().state.first().map(|root| root.trust_domain.clone());
    let identity = trust_domain
        .map(|trust_domain| SpiffeId { trust_domain, subject: Subject::Instance(id.clone()) }.to_string());
    let spec = pb::Instance {
        registration: Some(register_instance(id, registration)),
        state: entry.state.as_str().into(),
        health: health(state.health_seen(id)).into(),
        health_revision: report.map_or(0, |(_, report)| report.revision),
        health_detail: report.map(|(_, report)| report.detail.clone()).unwrap_or_default(),
        health_at_ms: report.map_or(0, |(at, _)| at.0),
        identity: identity.unwrap_or_default(),
        leaf_not_after_ms: leaf.map_or(0, |leaf| leaf.not_after.0),
    };
    Some(resource(&Scope::Membership(id.clone()), entry, Spec::Instance(spec)))
}

pub(crate) fn traffic_policy(state: &RoutingState, scope: &TrafficScope) -> Option<pb::Resource> {
    let entry = state.traffic_policy(scope)?;
    let policy = entry.state.as_ref()?;
    let spec = pb::PutTrafficPolicy { scope: scope.to_string(), policy: Some(traffic(policy)) };
    Some(resource(&Scope::Traffic(scope.clone()), entry, Spec::TrafficPolicy(spec)))
}

pub(crate) fn security_policy(state: &RoutingState, scope: &SecurityScope) -> Option<pb::Resource> {
    let entry = state.security_policy(scope)?;
    let policy = entry.state.as_ref()?;
    let spec = pb::PutSecurityPolicy { scope: scope.to_string(), policy: Some(security(policy)) };
    Some(resource(&Scope::Security(scope.clone()), entry, Spec::SecurityPolicy(spec)))
}

/// Also where nobody ever set them: they hold all the same.
pub(crate) fn mesh_defaults(state: &RoutingState) -> pb::Resource {
    let entry = state.mesh();
    let MeshDefaults { security, propagation_bound_ms, damping } = entry.state;
    let DampingSettings { enabled, half_life_ms, suppress, reuse, hold_max_ms } = damping;
    let damping = pb::Damping { enabled, half_life_ms, suppress, reuse, hold_max_ms };
    let security = action(Some(security)).into();
    let spec = pb::MeshDefaults { security, propagation_bound_ms, damping: Some(damping) };
    resource(&Scope::Mesh, entry, Spec::MeshDefaults(spec))
}

fn register_instance(id: &InstanceId, registration: &InstanceRegistered) -> pb::RegisterInstance {
    let (upstreams, all_upstreams) = match &registration.upstreams {
        Upstreams::All => (Vec::new(), true),
        Upstreams::Only(services) => (services.iter().map(ToString::to_string).collect(), false),
    };
    pb::RegisterInstance {
        instance: id.to_string(),
        address: registration.address.to_string(),
        port: u32::from(registration.port.number()),
        upstreams,
        all_upstreams,
        metadata: registration.metadata.clone(),
    }
}

pub(crate) const fn health(health: Health) -> pb::Health {
    match health {
        Health::Unknown => pb::Health::Unknown,
        Health::Healthy => pb::Health::Healthy,
        Health::Unhealthy => pb::Health::Unhealthy,
    }
}

const fn action(action: Option<Action>) -> pb::Action {
    match action {
        None => pb::Action::Unspecified,
        Some(Action::Allow) => pb::Action::Allow,
        Some(Action::Deny) => pb::Action::Deny,
    }
}

fn traffic(policy: &TrafficPolicy) -> pb::TrafficPolicy {
    let TrafficPolicy {
        balance,
        locality,
        subsets,
        sticky_sources,
        slow_start_ms,
        connect,
        limits,
        outlier_detection,
        connection,
    } = policy;
    let subset = |subset: &Subset| pb::Subset {
        name: subset.name.to_string(),
        labels: subset.labels.clone().into_iter().collect(),
        weight: subset.weight.into(),
    };
    let balance = match balance {
        Balance::LeastConnections => pb::Balance::LeastConnections,
        Balance::RoundRobin => pb::Balance::RoundRobin,
        Balance::Random => pb::Balance::Random,
        Balance::PeakEwma => pb::Balance::PeakEwma,
        Balance::Maglev => pb::Balance::Maglev,
    };
    let prefer = match locality.prefer {
        Nearness::Any => pb::Nearness::Unspecified,
        Nearness::Region => pb::Nearness::Region,
        Nearness::Zone => pb::Nearness::Zone,
    };
    pb::TrafficPolicy {
        balance: balance.into(),
        connect_timeout_ms: connect.timeout_ms,
        connect_retries: u32::from(connect.retries),
        slow_start_ms: *slow_start_ms,
        retry: Some(pb::RetryPolicy {
            backoff_ms: connect.backoff_ms,
            budget_percent: u32::from(connect.budget_percent),
            budget_min_per_second: connect.budget_min_per_second,
        }),
        limits: Some(pb::CircuitLimits {
            endpoint_connections: limits.endpoint_connections.unwrap_or_default(),
            endpoint_pending: limits.endpoint_pending.unwrap_or_default(),
            service_connections: limits.service_connections.unwrap_or_default(),
            service_pending: limits.service_pending.unwrap_or_default(),
        }),
        outlier_detection: Some(pb::OutlierDetection {
            enabled: outlier_detection.enabled,
            failures: u32::from(outlier_detection.failures),
            ejection_base_ms: outlier_detection.ejection_base_ms,
            ejection_max_ms: outlier_detection.ejection_max_ms,
            ejected_percent_max: u32::from(outlier_detection.ejected_percent_max),
        }),
        connection: Some(pb::ConnectionLifetime {
            half_open_timeout_ms: connection.half_open_timeout_ms.unwrap_or_default(),
            idle_timeout_ms: connection.idle_timeout_ms.unwrap_or_default(),
            max_age_ms: connection.max_age_ms.unwrap_or_default(),
        }),
        subsets: subsets.iter().map(subset).collect(),
        sticky_sources: *sticky_sources,
        locality: Some(pb::LocalityPreference {
            prefer: prefer.into(),
            threshold_percent: locality.threshold_percent.into(),
        }),
    }
}

fn security(policy: &SecurityPolicy) -> pb::SecurityPolicy {
    let mode = match policy.mode {
        Mode::Enforce => pb::Mode::Enforce,
        Mode::Audit => pb::Mode::Audit,
    };
    let (on_change, grace_ms) = match policy.on_change {
        None => (pb::OnChange::Unspecified, 0),
        Some(OnChange::Cut) => (pb::OnChange::Cut, 0),
        Some(OnChange::Grace(ms)) => (pb::OnChange::Grace, ms),
        Some(OnChange::Keep) => (pb::OnChange::Keep, 0),
    };
    let rule = |rule: &Rule| pb::Rule {
        name: rule.name.to_string(),
        action: action(Some(rule.action)).into(),
        from_any: rule.from.any,
        from_services: rule.from.services.iter().map(ToString::to_string).collect(),
        from_namespaces: rule.from.namespaces.iter().map(ToString::to_string).collect(),
        ports: rule.ports.iter().map(|port| u32::from(port.number())).collect(),
    };
    pb::SecurityPolicy {
        default: action(policy.default).into(),
        mode: mode.into(),
        rules: policy.rules.iter().map(rule).collect(),
        on_change: on_change.into(),
        grace_ms,
    }
}
