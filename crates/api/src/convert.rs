//! Wire to model and back: the only place that knows both.
//!
//! What comes in is bounded and checked here, with an error that names the field; rules of the mesh (which combinations
//! make sense) are the model's. Nothing here looks at state.

mod answer;
pub(crate) mod resources;

pub(crate) use answer::{config_version, log_event, service_ports};

use std::net::Ipv4Addr;
use std::time::Duration;
use uuid::Uuid;
use weft_eventlog::UnixMicros;
use weft_model::damping::DampingSettings;
use weft_model::health::{Health, HealthReported};
use weft_model::membership::{
    InstanceRegistered, METADATA_ENTRIES_MAX, MembershipCommand, UPSTREAMS_MAX, Upstreams,
};
use weft_model::mesh::MeshDefaults;
use weft_model::rollout::{CANDIDATES_MAX, Candidate, Evidence, Plan, RolloutCommand};
use weft_model::security::{
    Action, Mode, OnChange, RULE_LIST_MAX, RULES_MAX, Rule, SecurityCommand, SecurityPolicy, Sources,
};
use weft_model::service::{PORTS_MAX, ServiceCommand, ServiceDeclared, ServicePort};
use weft_model::traffic::{
    Balance, CircuitLimits, ConnectPolicy, ConnectionPolicy, LocalityPolicy, Nearness, OutlierPolicy,
    SUBSET_LABELS_MAX, SUBSETS_MAX, Subset, TrafficCommand, TrafficPolicy, WEIGHT_MAX,
};
use weft_model::version::{ExpectedVersion, Version};
use weft_model::{Command, ConfigVersion, Epoch, InstanceId, Port, Position, ServiceName};
use weft_proto::v1 as pb;
use weft_routing::Hash;

use crate::acks::SWAPS_MAX;
use crate::commands::Change;
use crate::status::ApiError;

/// Changes in one apply: a directory of resources; the log takes four times as many events at once.
pub const CHANGES_MAX: usize = 1_000;
/// Longest reason of a command: a sentence or two, or a link. The log takes twice as much.
const REASON_BYTES_MAX: usize = 512;

/// A command's id and reason.
pub(crate) struct Meta {
    pub(crate) command_id: Uuid,
    pub(crate) reason: Option<String>,
}

/// A moment that a question is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    Now,
    Position(Position),
    Time(UnixMicros),
}

pub(crate) fn meta(meta: Option<pb::CommandMeta>) -> Result<Meta, ApiError> {
    let Some(pb::CommandMeta { command_id, reason }) = meta else {
        return Err(ApiError::invalid("meta", "is missing; every command carries an id"));
    };
    let id = Uuid::try_parse(&command_id).ok().filter(|id| id.get_version_num() == 7);
    let command_id = id.ok_or_else(|| ApiError::invalid("meta.command_id", "must be a UUID of version 7"))?;
    if reason.len() > REASON_BYTES_MAX || reason.contains(char::is_control) {
        return Err(ApiError::invalid("meta.reason", format!("printable, at most {REASON_BYTES_MAX} bytes")));
    }
    Ok(Meta { command_id, reason: Some(reason).filter(|reason| !reason.is_empty()) })
}

pub(crate) fn at(at: Option<pb::At>) -> At {
    match at.and_then(|at| at.at) {
        None => At::Now,
        Some(pb::at::At::Position(position)) => At::Position(Position(position)),
        Some(pb::at::At::TimeMs(ms)) => At::Time(UnixMicros::end_of_millis(ms)),
    }
}

pub(crate) fn expected(expected: Option<pb::Expected>) -> Result<ExpectedVersion, ApiError> {
    match expected.and_then(|expected| expected.expected) {
        None => Ok(ExpectedVersion::Any),
        Some(pb::expected::Expected::Empty(true)) => Ok(ExpectedVersion::Empty),
        Some(pb::expected::Expected::Empty(false)) => {
            Err(ApiError::invalid("expected.empty", "is true or absent"))
        }
        Some(pb::expected::Expected::Version(version)) => Ok(ExpectedVersion::exactly(Version(version))),
    }
}

pub(crate) fn name<T: std::str::FromStr>(field: &str, text: &str) -> Result<T, ApiError>
where
    T::Err: std::error::Error,
{
    text.parse().map_err(|error: T::Err| ApiError::invalid(field, weft_model::Chain(&error)))
}

pub(crate) fn port(field: &str, number: u32) -> Result<Port, ApiError> {
    let port = u16::try_from(number).ok().and_then(Port::new);
    port.ok_or_else(|| ApiError::invalid(field, "a number from 1 to 65535"))
}

fn bounded(field: &str, count: usize, limit: usize) -> Result<(), ApiError> {
    if count > limit { Err(ApiError::invalid(field, format!("at most {limit}"))) } else { Ok(()) }
}

fn present<T>(field: &str, value: Option<T>) -> Result<T, ApiError> {
    value.ok_or_else(|| ApiError::invalid(field, "is missing"))
}

/// A batch of changes.
pub(crate) fn changes(changes: Vec<pb::Change>) -> Result<Vec<Change>, ApiError> {
    if changes.is_empty() {
        return Err(ApiError::invalid("changes", "is empty"));
    }
    bounded("changes", changes.len(), CHANGES_MAX)?;
    let one = |(index, wire): (usize, pb::Change)| change(wire).map_err(|error| error.at_change(index));
    changes.into_iter().enumerate().map(one).collect()
}

fn change(wire: pb::Change) -> Result<Change, ApiError> {
    use pb::change::Change as Wire;
    let command = match present("change", wire.change)? {
        Wire::DeclareService(declare) => declare_service(declare)?,
        Wire::DeleteService(delete) => Command::Service(name("name", &delete.name)?, ServiceCommand::Delete),
        Wire::RegisterInstance(register) => register_instance(register)?,
        Wire::DrainInstance(drain) => {
            Command::Membership(name("instance", &drain.instance)?, MembershipCommand::Drain)
        }
        Wire::DeregisterInstance(leave) => {
            Command::Membership(name("instance", &leave.instance)?, MembershipCommand::Deregister)
        }
        Wire::PutTrafficPolicy(put) => put_traffic_policy(&put)?,
        Wire::DeleteTrafficPolicy(delete) => {
            Command::Traffic(name("scope", &delete.scope)?, TrafficCommand::Delete)
        }
        Wire::PutSecurityPolicy(put) => put_security_policy(put)?,
        Wire::DeleteSecurityPolicy(delete) => {
            Command::Security(name("scope", &delete.scope)?, SecurityCommand::Delete)
        }
        Wire::SetMeshDefaults(defaults) => Command::Mesh(mesh_defaults(defaults)?),
    };
    Ok(Change::new(expected(wire.expected)?, command))
}

/// Words of a peer as they are kept: in one line, at most so many characters of it.
pub(crate) fn words(text: &str, chars_max: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(chars_max).collect()
}

/// The change that gives changes of policies to some sidecars first.
pub(crate) fn rollout(canary: pb::Canary, changes: Vec<Change>) -> Result<Change, ApiError> {
    let pb::Canary { share_ppm, watch_ms, tolerance_ppm } = canary;
    bounded("changes", changes.len(), CANDIDATES_MAX)?;
    let (mut candidates, mut also) = (Vec::new(), Vec::new());
    for (index, change) in changes.into_iter().enumerate() {
        let scope = change.command.scope();
        let candidate = Candidate::of(change.command).ok_or_else(|| {
            let rule = format!(
                "is {scope}; only traffic and security policies can be tried by canaries, apply it before"
            );
            ApiError::invalid(&format!("changes[{index}]"), rule)
        })?;
        candidates.push(candidate);
        also.push((scope, change.expected));
    }
    let plan = Plan { candidates, share_ppm, watch_ms, tolerance_ppm };
    let command = Command::Rollout(RolloutCommand::Begin(plan));
    Ok(Change { expected: ExpectedVersion::Any, command, also })
}

/// What a canary met with; the rollout that it is about, first.
pub(crate) fn evidence(wire: pb::Evidence) -> (Position, Evidence) {
    let pb::Evidence { rollout, connections, refused, failed } = wire;
    (Position(rollout), Evidence { connections, refused, failed })
}

fn declare_service(declare: pb::DeclareService) -> Result<Command, ApiError> {
    bounded("ports", declare.ports.len(), PORTS_MAX)?;
    let port = |(index, wire): (usize, pb::ServicePort)| {
        Ok(ServicePort {
            name: name(&format!("ports[{index}].name"), &wire.name)?,
            port: port(&format!("ports[{index}].port"), wire.port)?,
        })
    };
    let address = match declare.address.as_str() {
        "" => None,
        text => Some(text.parse::<Ipv4Addr>().map_err(|_| ApiError::invalid("address", "an IPv4 address"))?),
    };
    let ports = declare.ports.into_iter().enumerate().map(port).collect::<Result<_, ApiError>>()?;
    let service = name("name", &declare.name)?;
    Ok(Command::Service(service, ServiceCommand::Declare(ServiceDeclared { ports, address })))
}

/// A registration.
pub(crate) fn register_instance(register: pb::RegisterInstance) -> Result<Command, ApiError> {
    bounded("upstreams", register.upstreams.len(), UPSTREAMS_MAX)?;
    bounded("metadata", register.metadata.len(), METADATA_ENTRIES_MAX)?;
    let upstream = |(index, text): (usize, &String)| name(&format!("upstreams[{index}]"), text);
    let upstreams = match (register.all_upstreams, register.upstreams.is_empty()) {
        (true, true) => Upstreams::All,
        (true, false) => {
            return Err(ApiError::invalid("upstreams", "leave it empty when all_upstreams is set"));
        }
        (false, _) => Upstreams::Only(
            register.upstreams.iter().enumerate().map(upstream).collect::<Result<_, ApiError>>()?,
        ),
    };
    let registration = InstanceRegistered {
        address: register.address.parse().map_err(|_| ApiError::invalid("address", "an IP address"))?,
        port: port("port", register.port)?,
        upstreams,
        metadata: register.metadata.into_iter().collect(),
    };
    Ok(Command::Membership(name("instance", &register.instance)?, MembershipCommand::Register(registration)))
}

/// A traffic policy.
pub(crate) fn put_traffic_policy(put: &pb::PutTrafficPolicy) -> Result<Command, ApiError> {
    let policy = traffic_policy(present("policy", put.policy.as_ref())?)?;
    Ok(Command::Traffic(name("scope", &put.scope)?, TrafficCommand::Put(policy)))
}

fn traffic_policy(wire: &pb::TrafficPolicy) -> Result<TrafficPolicy, ApiError> {
    bounded("policy.subsets", wire.subsets.len(), SUBSETS_MAX)?;
    let balance = match pb::Balance::try_from(wire.balance) {
        Ok(pb::Balance::Unspecified) => Balance::default(),
        Ok(pb::Balance::LeastConnections) => Balance::LeastConnections,
        Ok(pb::Balance::RoundRobin) => Balance::RoundRobin,
        Ok(pb::Balance::Random) => Balance::Random,
        Ok(pb::Balance::PeakEwma) => Balance::PeakEwma,
        Ok(pb::Balance::Maglev) => Balance::Maglev,
        Err(_) => {
            return Err(ApiError::invalid("policy.balance", "is not a way to balance that is known here"));
        }
    };
    let mut connect = ConnectPolicy { timeout_ms: wire.connect_timeout_ms, ..ConnectPolicy::default() };
    connect.retries = small("policy.connect_retries", wire.connect_retries)?;
    if let Some(retry) = wire.retry {
        connect.backoff_ms = retry.backoff_ms;
        connect.budget_percent = small("policy.retry.budget_percent", retry.budget_percent)?;
        connect.budget_min_per_second = retry.budget_min_per_second;
    }
    let limits = wire.limits.map(|limits| CircuitLimits {
        endpoint_connections: some(limits.endpoint_connections),
        endpoint_pending: some(limits.endpoint_pending),
        service_connections: some(limits.service_connections),
        service_pending: some(limits.service_pending),
    });
    let connection = wire.connection.map(|connection| ConnectionPolicy {
        half_open_timeout_ms: some(connection.half_open_timeout_ms),
        idle_timeout_ms: some(connection.idle_timeout_ms),
        max_age_ms: some(connection.max_age_ms),
    });
    Ok(TrafficPolicy {
        balance,
        locality: wire.locality.map(locality).transpose()?.unwrap_or_default(),
        subsets: wire.subsets.iter().enumerate().map(subset).collect::<Result<_, ApiError>>()?,
        sticky_sources: wire.sticky_sources,
        slow_start_ms: wire.slow_start_ms,
        connect,
        limits: limits.unwrap_or_default(),
        outlier_detection: wire.outlier_detection.map(outliers).transpose()?.unwrap_or_default(),
        connection: connection.unwrap_or_default(),
    })
}

fn subset((index, wire): (usize, &pb::Subset)) -> Result<Subset, ApiError> {
    let field = |part: &str| format!("policy.subsets[{index}].{part}");
    bounded(&field("labels"), wire.labels.len(), SUBSET_LABELS_MAX)?;
    let weight = u16::try_from(wire.weight);
    Ok(Subset {
        name: name(&field("name"), &wire.name)?,
        labels: wire.labels.clone().into_iter().collect(),
        weight: weight.map_err(|_| ApiError::invalid(&field("weight"), format!("at most {WEIGHT_MAX}")))?,
    })
}

fn locality(wire: pb::LocalityPreference) -> Result<LocalityPolicy, ApiError> {
    let prefer = match pb::Nearness::try_from(wire.prefer) {
        Ok(pb::Nearness::Unspecified) => Nearness::Any,
        Ok(pb::Nearness::Region) => Nearness::Region,
        Ok(pb::Nearness::Zone) => Nearness::Zone,
        Err(_) => return Err(ApiError::invalid("policy.locality.prefer", "any, region or zone")),
    };
    let threshold_percent = small("policy.locality.threshold_percent", wire.threshold_percent)?;
    Ok(LocalityPolicy { prefer, threshold_percent })
}

fn outliers(wire: pb::OutlierDetection) -> Result<OutlierPolicy, ApiError> {
    Ok(OutlierPolicy {
        enabled: wire.enabled,
        failures: small("policy.outlier_detection.failures", wire.failures)?,
        ejection_base_ms: wire.ejection_base_ms,
        ejection_max_ms: wire.ejection_max_ms,
        ejected_percent_max: small("policy.outlier_detection.ejected_percent_max", wire.ejected_percent_max)?,
    })
}

/// A number that the model bounds far below what it can hold.
fn small(field: &str, number: u32) -> Result<u8, ApiError> {
    u8::try_from(number).map_err(|_| ApiError::invalid(field, "at most 100"))
}

/// What is 0 on the wire is not set.
fn some(number: u32) -> Option<u32> {
    (number != 0).then_some(number)
}

/// A security policy.
pub(crate) fn put_security_policy(put: pb::PutSecurityPolicy) -> Result<Command, ApiError> {
    let policy = present("policy", put.policy)?;
    bounded("policy.rules", policy.rules.len(), RULES_MAX)?;
    let mode = match pb::Mode::try_from(policy.mode) {
        Ok(pb::Mode::Unspecified | pb::Mode::Enforce) => Mode::Enforce,
        Ok(pb::Mode::Audit) => Mode::Audit,
        Err(_) => return Err(ApiError::invalid("policy.mode", "enforce or audit")),
    };
    let on_change = match (pb::OnChange::try_from(policy.on_change), policy.grace_ms) {
        (Ok(pb::OnChange::Grace), ms) => Some(OnChange::Grace(ms)),
        (Ok(_), 1..) => return Err(ApiError::invalid("policy.grace_ms", "only where on_change is grace")),
        (Ok(pb::OnChange::Unspecified), 0) => None,
        (Ok(pb::OnChange::Cut), 0) => Some(OnChange::Cut),
        (Ok(pb::OnChange::Keep), 0) => Some(OnChange::Keep),
        (Err(_), _) => return Err(ApiError::invalid("policy.on_change", "cut, grace or keep")),
    };
    let rules = policy.rules.iter().enumerate().map(|(index, wire)| rule(index, wire));
    let policy = SecurityPolicy {
        default: action("policy.default", policy.default)?,
        mode,
        on_change,
        rules: rules.collect::<Result<_, ApiError>>()?,
    };
    Ok(Command::Security(name("scope", &put.scope)?, SecurityCommand::Put(policy)))
}

fn rule(index: usize, wire: &pb::Rule) -> Result<Rule, ApiError> {
    let field = |part: &str| format!("policy.rules[{index}].{part}");
    for (part, count) in [
        ("from_services", wire.from_services.len()),
        ("from_namespaces", wire.from_namespaces.len()),
        ("ports", wire.ports.len()),
    ] {
        bounded(&field(part), count, RULE_LIST_MAX)?;
    }
    let services = wire.from_services.iter().map(|text| name(&field("from_services"), text));
    let namespaces = wire.from_namespaces.iter().map(|text| name(&field("from_namespaces"), text));
    let ports = wire.ports.iter().map(|number| port(&field("ports"), *number));
    Ok(Rule {
        name: name(&field("name"), &wire.name)?,
        action: action(&field("action"), wire.action)?
            .ok_or_else(|| ApiError::invalid(&field("action"), "allow or deny"))?,
        from: Sources {
            any: wire.from_any,
            services: services.collect::<Result<_, ApiError>>()?,
            namespaces: namespaces.collect::<Result<_, ApiError>>()?,
        },
        ports: ports.collect::<Result<_, ApiError>>()?,
    })
}

fn action(field: &str, wire: i32) -> Result<Option<Action>, ApiError> {
    match pb::Action::try_from(wire) {
        Ok(pb::Action::Unspecified) => Ok(None),
        Ok(pb::Action::Allow) => Ok(Some(Action::Allow)),
        Ok(pb::Action::Deny) => Ok(Some(Action::Deny)),
        Err(_) => Err(ApiError::invalid(field, "allow or deny")),
    }
}

fn mesh_defaults(wire: pb::MeshDefaults) -> Result<MeshDefaults, ApiError> {
    let security = action("security", wire.security)?;
    let security = security.ok_or_else(|| ApiError::invalid("security", "allow or deny"))?;
    let damping = wire.damping.map_or_else(DampingSettings::default, |wire| {
        let pb::Damping { enabled, half_life_ms, suppress, reuse, hold_max_ms } = wire;
        DampingSettings { enabled, half_life_ms, suppress, reuse, hold_max_ms }
    });
    Ok(MeshDefaults { security, propagation_bound_ms: wire.propagation_bound_ms, damping })
}

/// An observation of an instance.
pub(crate) fn health_report(
    request: &pb::ReportHealthRequest,
) -> Result<(InstanceId, HealthReported), ApiError> {
    let health = match pb::Health::try_from(request.health) {
        Ok(pb::Health::Unknown) => Health::Unknown,
        Ok(pb::Health::Healthy) => Health::Healthy,
        Ok(pb::Health::Unhealthy) => Health::Unhealthy,
        Err(_) => return Err(ApiError::invalid("health", "healthy or unhealthy")),
    };
    // What the log and SQL hold is signed.
    if i64::try_from(request.revision).is_err() {
        return Err(ApiError::invalid("revision", "below 2^63"));
    }
    let doubt = u8::try_from(request.doubt).map_err(|_| ApiError::invalid("doubt", "from 0 to 7"))?;
    let detail = request.detail.clone();
    let report = HealthReported { health, revision: request.revision, doubt: Some(doubt), detail };
    Ok((name("instance", &request.instance)?, report))
}

/// What a sidecar says that it has.
///
/// # Errors
/// If no log can have it.
pub fn header(
    field: &str,
    header: Option<pb::SnapshotHeader>,
) -> Result<Option<(ConfigVersion, Hash)>, ApiError> {
    let Some(pb::SnapshotHeader { version, manifest_hash }) = header else { return Ok(None) };
    let version = reported_version(field, version)?;
    let hash = Hash::from_slice(&manifest_hash)
        .ok_or_else(|| ApiError::invalid(field, "has a manifest hash that is not 32 bytes"))?;
    Ok(Some((version, hash)))
}

/// What a sidecar put in force, and how long ago.
pub(crate) fn swaps(swaps: Vec<pb::Swap>) -> Result<Vec<(ConfigVersion, Duration)>, ApiError> {
    bounded("swaps", swaps.len(), SWAPS_MAX)?;
    let swap = |pb::Swap { version, ago_us }| {
        Ok((reported_version("swaps", version)?, Duration::from_micros(ago_us)))
    };
    swaps.into_iter().map(swap).collect()
}

fn reported_version(field: &str, version: Option<pb::ConfigVersion>) -> Result<ConfigVersion, ApiError> {
    let Some(pb::ConfigVersion { epoch, position }) = version else {
        return Err(ApiError::invalid(field, "has no version"));
    };
    if i64::try_from(epoch.max(position)).is_err() {
        return Err(ApiError::invalid(field, "has a version that no log can have"));
    }
    Ok(ConfigVersion::new(Epoch(epoch), Position(position)))
}

/// A service as people write it.
pub(crate) fn service(field: &str, text: &str) -> Result<ServiceName, ApiError> {
    ServiceName::parse_lenient(text).map_err(|error| ApiError::invalid(field, error))
}
