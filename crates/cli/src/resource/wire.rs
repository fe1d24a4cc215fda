//! The border between resources and the wire.

use crate::resource::{Kind, Resource};
use weft_model::damping::DampingSettings;
use weft_model::membership::{InstanceRegistered, MembershipCommand, Upstreams};
use weft_model::mesh::MeshDefaults;
use weft_model::security::{Action, Mode, OnChange, Rule, SecurityCommand, SecurityPolicy};
use weft_model::service::{ServiceCommand, ServiceDeclared};
use weft_model::traffic::{Balance, Nearness, Subset, TrafficCommand, TrafficPolicy};
use weft_model::{Command, ExpectedVersion};
use weft_proto::v1;
use weft_proto::v1::change::Change as Wanted;

/// What a client may not ask for through a resource.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} cannot be deleted; apply other values instead")]
pub(crate) struct NotDeletable(&'static str);

/// The change that applying a resource asks for.
pub(crate) fn put(resource: &Resource) -> v1::Change {
    v1::Change { expected: expected(resource.expected), change: wanted(&resource.command) }
}

/// The change that removes what a resource is about.
pub(crate) fn delete(
    kind: Kind,
    name: &str,
    expected_version: ExpectedVersion,
) -> Result<v1::Change, NotDeletable> {
    let name = name.to_owned();
    let change = match kind {
        Kind::Service => Wanted::DeleteService(v1::DeleteService { name }),
        Kind::Instance => Wanted::DeregisterInstance(v1::DeregisterInstance { instance: name }),
        Kind::TrafficPolicy => Wanted::DeleteTrafficPolicy(v1::DeleteTrafficPolicy { scope: name }),
        Kind::SecurityPolicy => Wanted::DeleteSecurityPolicy(v1::DeleteSecurityPolicy { scope: name }),
        Kind::MeshDefaults => return Err(NotDeletable(kind.word())),
    };
    Ok(v1::Change { expected: expected(expected_version), change: Some(change) })
}

/// An expectation; none for any version.
pub(crate) fn expected(expected: ExpectedVersion) -> Option<v1::Expected> {
    let expected = match expected {
        ExpectedVersion::Any => return None,
        ExpectedVersion::Empty => v1::expected::Expected::Empty(true),
        ExpectedVersion::Exact(version) => v1::expected::Expected::Version(version.0),
    };
    Some(v1::Expected { expected: Some(expected) })
}

fn wanted(command: &Command) -> Option<Wanted> {
    Some(match command {
        Command::Service(name, ServiceCommand::Declare(declared)) => {
            Wanted::DeclareService(service(name.to_string(), declared))
        }
        Command::Membership(id, MembershipCommand::Register(registration)) => {
            Wanted::RegisterInstance(instance(id.to_string(), registration))
        }
        Command::Traffic(scope, TrafficCommand::Put(policy)) => {
            let policy = Some(traffic(policy));
            Wanted::PutTrafficPolicy(v1::PutTrafficPolicy { scope: scope.to_string(), policy })
        }
        Command::Security(scope, SecurityCommand::Put(policy)) => {
            let policy = Some(security(policy));
            Wanted::PutSecurityPolicy(v1::PutSecurityPolicy { scope: scope.to_string(), policy })
        }
        Command::Mesh(defaults) => Wanted::SetMeshDefaults(mesh(*defaults)),
        // No resource asks for these.
        Command::Service(_, ServiceCommand::Delete)
        | Command::Membership(
            _,
            MembershipCommand::Drain | MembershipCommand::Deregister | MembershipCommand::AddUpstream { .. },
        )
        | Command::Traffic(_, TrafficCommand::Delete)
        | Command::Security(_, SecurityCommand::Delete)
        | Command::Health(..)
        | Command::Identity(..)
        | Command::Token(..)
        | Command::Ca(_)
        | Command::Rollout(_) => return None,
    })
}

fn service(name: String, declared: &ServiceDeclared) -> v1::DeclareService {
    let port = |port: &weft_model::service::ServicePort| v1::ServicePort {
        name: port.name.to_string(),
        port: port.port.number().into(),
    };
    let address = declared.address.map(|address| address.to_string()).unwrap_or_default();
    v1::DeclareService { name, ports: declared.ports.iter().map(port).collect(), address }
}

fn instance(instance: String, registration: &InstanceRegistered) -> v1::RegisterInstance {
    let (upstreams, all_upstreams) = match &registration.upstreams {
        Upstreams::All => (Vec::new(), true),
        Upstreams::Only(services) => (services.iter().map(ToString::to_string).collect(), false),
    };
    v1::RegisterInstance {
        instance,
        address: registration.address.to_string(),
        port: registration.port.number().into(),
        upstreams,
        all_upstreams,
        metadata: registration.metadata.clone().into_iter().collect(),
    }
}

fn traffic(policy: &TrafficPolicy) -> v1::TrafficPolicy {
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
    let subset = |subset: &Subset| v1::Subset {
        name: subset.name.to_string(),
        labels: subset.labels.clone().into_iter().collect(),
        weight: subset.weight.into(),
    };
    let balance = match balance {
        Balance::LeastConnections => v1::Balance::LeastConnections,
        Balance::RoundRobin => v1::Balance::RoundRobin,
        Balance::Random => v1::Balance::Random,
        Balance::PeakEwma => v1::Balance::PeakEwma,
        Balance::Maglev => v1::Balance::Maglev,
    };
    let prefer = match locality.prefer {
        Nearness::Any => v1::Nearness::Unspecified,
        Nearness::Region => v1::Nearness::Region,
        Nearness::Zone => v1::Nearness::Zone,
    };
    v1::TrafficPolicy {
        balance: balance.into(),
        connect_timeout_ms: connect.timeout_ms,
        connect_retries: u32::from(connect.retries),
        slow_start_ms: *slow_start_ms,
        retry: Some(v1::RetryPolicy {
            backoff_ms: connect.backoff_ms,
            budget_percent: u32::from(connect.budget_percent),
            budget_min_per_second: connect.budget_min_per_second,
        }),
        limits: Some(v1::CircuitLimits {
            endpoint_connections: limits.endpoint_connections.unwrap_or_default(),
            endpoint_pending: limits.endpoint_pending.unwrap_or_default(),
            service_connections: limits.service_connections.unwrap_or_default(),
            service_pending: limits.service_pending.unwrap_or_default(),
        }),
        outlier_detection: Some(v1::OutlierDetection {
            enabled: outlier_detection.enabled,
            failures: u32::from(outlier_detection.failures),
            ejection_base_ms: outlier_detection.ejection_base_ms,
            ejection_max_ms: outlier_detection.ejection_max_ms,
            ejected_percent_max: u32::from(outlier_detection.ejected_percent_max),
        }),
        connection: Some(v1::ConnectionLifetime {
            half_open_timeout_ms: connection.half_open_timeout_ms.unwrap_or_default(),
            idle_timeout_ms: connection.idle_timeout_ms.unwrap_or_default(),
            max_age_ms: connection.max_age_ms.unwrap_or_default(),
        }),
        subsets: subsets.iter().map(subset).collect(),
        sticky_sources: *sticky_sources,
        locality: Some(v1::LocalityPreference {
            prefer: prefer.into(),
            threshold_percent: locality.threshold_percent.into(),
        }),
    }
}

fn security(policy: &SecurityPolicy) -> v1::SecurityPolicy {
    let mode = match policy.mode {
        Mode::Enforce => v1::Mode::Enforce,
        Mode::Audit => v1::Mode::Audit,
    };
    let (on_change, grace_ms) = match policy.on_change {
        None => (v1::OnChange::Unspecified, 0),
        Some(OnChange::Cut) => (v1::OnChange::Cut, 0),
        Some(OnChange::Grace(ms)) => (v1::OnChange::Grace, ms),
        Some(OnChange::Keep) => (v1::OnChange::Keep, 0),
    };
    v1::SecurityPolicy {
        default: policy.default.map_or(v1::Action::Unspecified, action).into(),
        mode: mode.into(),
        rules: policy.rules.iter().map(rule).collect(),
        on_change: on_change.into(),
        grace_ms,
    }
}

fn rule(rule: &Rule) -> v1::Rule {
    v1::Rule {
        name: rule.name.to_string(),
        action: action(rule.action).into(),
        from_any: rule.from.any,
        from_services: rule.from.services.iter().map(ToString::to_string).collect(),
        from_namespaces: rule.from.namespaces.iter().map(ToString::to_string).collect(),
        ports: rule.ports.iter().map(|port| port.number().into()).collect(),
    }
}

fn mesh(defaults: MeshDefaults) -> v1::MeshDefaults {
    let DampingSettings { enabled, half_life_ms, suppress, reuse, hold_max_ms } = defaults.damping;
    v1::MeshDefaults {
        damping: Some(v1::Damping { enabled, half_life_ms, suppress, reuse, hold_max_ms }),
        security: action(defaults.security).into(),
        propagation_bound_ms: defaults.propagation_bound_ms,
    }
}

const fn action(action: Action) -> v1::Action {
    match action {
        Action::Allow => v1::Action::Allow,
        Action::Deny => v1::Action::Deny,
    }
}
