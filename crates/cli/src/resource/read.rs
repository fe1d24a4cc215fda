//! From a document to what it asks for. The rules on values are the model's; here is only how they are written.

use crate::resource::fields::{Field, Fields, suggestion};
use crate::resource::node::{FileError, Node};
use crate::resource::{Kind, Resource};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use weft_model::damping::{self, DampingSettings};
use weft_model::membership::{self, InstanceRegistered, MembershipCommand, MembershipState, Upstreams};
use weft_model::mesh::{self, MeshDefaults};
use weft_model::security::{self, Action, Mode, OnChange, Rule, SecurityCommand, SecurityPolicy, Sources};
use weft_model::service::{self, ServiceCommand, ServiceDeclared, ServicePort};
use weft_model::traffic::{
    self, Balance, CircuitLimits, ConnectPolicy, ConnectionPolicy, LocalityPolicy, Nearness, OutlierPolicy,
    Subset, TrafficCommand, TrafficPolicy,
};
use weft_model::{Command, ExpectedVersion, Port, Rejection, Version};

/// The mappings that a document consists of, and the fields of each, for the test that holds the reference against
/// them.
#[cfg(test)]
pub(crate) const FIELDS: &[(&str, &[&str])] = &[
    ("Service", SERVICE),
    ("Service ports", PORT),
    ("Instance", INSTANCE),
    ("TrafficPolicy", TRAFFIC),
    ("TrafficPolicy locality", LOCALITY),
    ("TrafficPolicy subsets", SUBSET),
    ("TrafficPolicy connect", CONNECT),
    ("TrafficPolicy limits", LIMITS),
    ("TrafficPolicy outlier_detection", OUTLIERS),
    ("TrafficPolicy connection", CONNECTION),
    ("SecurityPolicy", SECURITY),
    ("SecurityPolicy rules", RULE),
    ("SecurityPolicy rules from", SOURCES),
    ("MeshDefaults", MESH),
    ("MeshDefaults damping", DAMPING),
];
const SERVICE: &[&str] = &["kind", "version", "name", "ports", "address"];
const PORT: &[&str] = &["name", "port"];
const INSTANCE: &[&str] = &["kind", "version", "name", "address", "upstreams", "metadata"];
const TRAFFIC: &[&str] = &[
    "kind",
    "version",
    "scope",
    "balance",
    "locality",
    "subsets",
    "sticky_sources",
    "slow_start",
    "connect",
    "limits",
    "outlier_detection",
    "connection",
];
const LOCALITY: &[&str] = &["prefer", "threshold_percent"];
const SUBSET: &[&str] = &["name", "labels", "weight"];
const CONNECT: &[&str] = &["timeout", "retries", "backoff", "budget_percent", "budget_min_per_second"];
const LIMITS: &[&str] =
    &["endpoint_connections", "endpoint_pending", "service_connections", "service_pending"];
const OUTLIERS: &[&str] = &["enabled", "failures", "ejection_base", "ejection_max", "ejected_percent_max"];
const CONNECTION: &[&str] = &["half_open_timeout", "idle_timeout", "max_age"];
const SECURITY: &[&str] = &["kind", "version", "scope", "default", "mode", "on_change", "grace", "rules"];
const RULE: &[&str] = &["name", "action", "from", "ports"];
const SOURCES: &[&str] = &["any", "services", "namespaces"];
const MESH: &[&str] = &["kind", "version", "security", "propagation_bound", "damping"];
const DAMPING: &[&str] = &["enabled", "half_life", "suppress", "reuse", "hold_max"];

/// All kinds of fields, to find the `kind` among them before it is known which are allowed.
const ANY_FIELD: &[&str] = &[
    "kind",
    "version",
    "name",
    "scope",
    "ports",
    "address",
    "upstreams",
    "metadata",
    "balance",
    "locality",
    "subsets",
    "sticky_sources",
    "slow_start",
    "connect",
    "limits",
    "outlier_detection",
    "connection",
    "default",
    "mode",
    "on_change",
    "grace",
    "rules",
    "security",
    "propagation_bound",
    "damping",
];

const ACTIONS: &[(&str, Action)] = &[("allow", Action::Allow), ("deny", Action::Deny)];
const MODES: &[(&str, Mode)] = &[("enforce", Mode::Enforce), ("audit", Mode::Audit)];
/// A grace has its length beside it.
const ON_CHANGES: &[(&str, OnChange)] =
    &[("cut", OnChange::Cut), ("grace", OnChange::Grace(0)), ("keep", OnChange::Keep)];
const BALANCES: &[(&str, Balance)] = &[
    ("least_connections", Balance::LeastConnections),
    ("peak_ewma", Balance::PeakEwma),
    ("round_robin", Balance::RoundRobin),
    ("random", Balance::Random),
    ("maglev", Balance::Maglev),
];
const NEARNESSES: &[(&str, Nearness)] =
    &[("any", Nearness::Any), ("region", Nearness::Region), ("zone", Nearness::Zone)];
const BOOLEANS: &[(&str, bool)] = &[("true", true), ("false", false)];

impl Resource {
    /// The meaning of one document.
    ///
    /// # Errors
    /// The first thing that is wrong with it, as far as that shows without the rest of the mesh.
    pub(crate) fn read(node: Node) -> Result<Self, FileError> {
        let kind = kind(&node)?;
        let (name, expected, command) = match kind {
            Kind::Service => read_service(&node)?,
            Kind::Instance => read_instance(&node)?,
            Kind::TrafficPolicy => read_traffic(&node)?,
            Kind::SecurityPolicy => read_security(&node)?,
            Kind::MeshDefaults => read_mesh(&node)?,
        };
        let resource = Self { kind, name, command, expected, node };
        match validate(&resource.command) {
            Err(Rejection::Invalid { field, rule }) => {
                Err(resource.explain(&field, &format!("{field}: {rule}")))
            }
            // Whatever else may be refused depends on the state of the mesh, which is not known here.
            Err(_) | Ok(()) => Ok(resource),
        }
    }
}

type Read = (String, ExpectedVersion, Command);

fn kind(node: &Node) -> Result<Kind, FileError> {
    let kinds: Vec<&str> = Kind::ALL.iter().map(|kind| kind.word()).collect();
    // Unknown fields are told when it is known which ones this kind has.
    let all = match &node.value {
        crate::resource::node::Value::Map(entries) => {
            entries.iter().map(|(key, _)| key.text.as_str()).chain(ANY_FIELD.iter().copied()).collect()
        }
        _ => ANY_FIELD.to_vec(),
    };
    let fields = Fields::of_resource(node, &all)?;
    let Some(field) = fields.optional("kind") else {
        let message = format!("field \"kind\" is missing; allowed: {}", kinds.join(", "));
        return Err(FileError { place: node.place.clone(), message });
    };
    let text = field.text()?;
    Kind::ALL.into_iter().find(|kind| kind.word() == text).ok_or_else(|| {
        let message = format!("unknown kind {text:?}; {}", suggestion(text, &kinds));
        FileError { place: field.place().clone(), message }
    })
}

fn expected(fields: &Fields<'_>) -> Result<ExpectedVersion, FileError> {
    let version = fields.optional("version").map(|field| field.number(0..=u64::MAX)).transpose()?;
    Ok(version.map_or(ExpectedVersion::Any, |version| ExpectedVersion::exactly(Version(version))))
}

fn read_service(node: &Node) -> Result<Read, FileError> {
    let fields = Fields::of_resource(node, SERVICE)?;
    let name: weft_model::ServiceName = fields.required("name")?.parse()?;
    let port = |field: Field<'_>| {
        let fields = field.fields(PORT)?;
        Ok(ServicePort { name: fields.required("name")?.parse()?, port: fields.required("port")?.parse()? })
    };
    let ports = fields.required("ports")?.list()?.into_iter().map(port).collect::<Result<_, _>>()?;
    let address = fields.optional("address").map(|field| field.parse()).transpose()?;
    let command = ServiceCommand::Declare(ServiceDeclared { ports, address });
    Ok((name.to_string(), expected(&fields)?, Command::Service(name, command)))
}

fn read_instance(node: &Node) -> Result<Read, FileError> {
    let fields = Fields::of_resource(node, INSTANCE)?;
    let name: weft_model::InstanceId = fields.required("name")?.parse()?;
    let field = fields.required("address")?;
    let address: SocketAddr = field
        .text()?
        .parse()
        .map_err(|_| field.wrong("must be an IP address and a port, such as 10.0.0.7:15008"))?;
    let port = Port::new(address.port()).ok_or_else(|| field.wrong("the port must not be 0"))?;
    let upstreams = match fields.optional("upstreams") {
        None => Upstreams::Only([].into()),
        Some(field) if field.as_text() == Some("all") => Upstreams::All,
        Some(field) => Upstreams::Only(field.parse_list()?),
    };
    let metadata = match fields.optional("metadata") {
        None => BTreeMap::new(),
        Some(field) => {
            let entries = Fields::entries(&field)?.into_iter();
            entries.map(|(key, value)| Ok((key, value.text()?.to_owned()))).collect::<Result<_, _>>()?
        }
    };
    let registration = InstanceRegistered { address: address.ip(), port, upstreams, metadata };
    let command = Command::Membership(name.clone(), MembershipCommand::Register(registration));
    Ok((name.to_string(), expected(&fields)?, command))
}

fn read_traffic(node: &Node) -> Result<Read, FileError> {
    let fields = Fields::of_resource(node, TRAFFIC)?;
    let scope: weft_model::TrafficScope = fields.required("scope")?.parse()?;
    let mut policy = TrafficPolicy::default();
    if let Some(field) = fields.optional("balance") {
        policy.balance = field.word(BALANCES)?;
    }
    if let Some(field) = fields.optional("locality") {
        policy.locality = read_locality(field)?;
    }
    if let Some(field) = fields.optional("subsets") {
        policy.subsets = field.list()?.into_iter().map(read_subset).collect::<Result<_, _>>()?;
    }
    if let Some(field) = fields.optional("sticky_sources") {
        policy.sticky_sources = field.word(BOOLEANS)?;
    }
    if let Some(field) = fields.optional("slow_start") {
        policy.slow_start_ms = field.duration_ms()?;
    }
    if let Some(field) = fields.optional("connect") {
        policy.connect = read_connect(field)?;
    }
    if let Some(field) = fields.optional("limits") {
        policy.limits = read_limits(field)?;
    }
    if let Some(field) = fields.optional("outlier_detection") {
        policy.outlier_detection = read_outliers(field)?;
    }
    if let Some(field) = fields.optional("connection") {
        policy.connection = read_connection(field)?;
    }
    let command = Command::Traffic(scope.clone(), TrafficCommand::Put(policy));
    Ok((scope.to_string(), expected(&fields)?, command))
}

fn read_locality(field: Field<'_>) -> Result<LocalityPolicy, FileError> {
    let fields = field.fields(LOCALITY)?;
    let mut locality = LocalityPolicy::default();
    if let Some(field) = fields.optional("prefer") {
        locality.prefer = field.word(NEARNESSES)?;
    }
    if let Some(field) = fields.optional("threshold_percent") {
        locality.threshold_percent = small(&field, 1..=100)?;
    }
    Ok(locality)
}

fn read_subset(field: Field<'_>) -> Result<Subset, FileError> {
    let fields = field.fields(SUBSET)?;
    let labels = Fields::entries(&fields.required("labels")?)?.into_iter();
    let weight = fields.required("weight")?;
    Ok(Subset {
        name: fields.required("name")?.parse()?,
        labels: labels.map(|(key, value)| Ok((key, value.text()?.to_owned()))).collect::<Result<_, _>>()?,
        weight: u16::try_from(weight.number(0..=u64::from(traffic::WEIGHT_MAX))?)
            .unwrap_or(traffic::WEIGHT_MAX),
    })
}

fn read_connect(field: Field<'_>) -> Result<ConnectPolicy, FileError> {
    let fields = field.fields(CONNECT)?;
    let mut connect = ConnectPolicy::default();
    if let Some(field) = fields.optional("timeout") {
        connect.timeout_ms = field.duration_ms()?;
    }
    if let Some(field) = fields.optional("retries") {
        connect.retries = small(&field, 0..=traffic::CONNECT_RETRIES_MAX)?;
    }
    if let Some(field) = fields.optional("backoff") {
        connect.backoff_ms = field.duration_ms()?;
    }
    if let Some(field) = fields.optional("budget_percent") {
        connect.budget_percent = small(&field, 0..=100)?;
    }
    if let Some(field) = fields.optional("budget_min_per_second") {
        connect.budget_min_per_second = number(&field, 0..=traffic::BUDGET_MIN_PER_SECOND_MAX)?;
    }
    Ok(connect)
}

fn read_limits(field: Field<'_>) -> Result<CircuitLimits, FileError> {
    let fields = field.fields(LIMITS)?;
    let limit = |name| fields.optional(name).map(|field| number(&field, traffic::LIMIT)).transpose();
    Ok(CircuitLimits {
        endpoint_connections: limit("endpoint_connections")?,
        endpoint_pending: limit("endpoint_pending")?,
        service_connections: limit("service_connections")?,
        service_pending: limit("service_pending")?,
    })
}

fn read_outliers(field: Field<'_>) -> Result<OutlierPolicy, FileError> {
    let fields = field.fields(OUTLIERS)?;
    let mut outliers = OutlierPolicy::default();
    if let Some(field) = fields.optional("enabled") {
        outliers.enabled = field.word(BOOLEANS)?;
    }
    if let Some(field) = fields.optional("failures") {
        outliers.failures = small(&field, 1..=traffic::OUTLIER_FAILURES_MAX)?;
    }
    for (name, milliseconds) in
        [("ejection_base", &mut outliers.ejection_base_ms), ("ejection_max", &mut outliers.ejection_max_ms)]
    {
        if let Some(field) = fields.optional(name) {
            *milliseconds = field.duration_ms()?;
        }
    }
    if let Some(field) = fields.optional("ejected_percent_max") {
        outliers.ejected_percent_max = small(&field, 1..=100)?;
    }
    Ok(outliers)
}

fn read_connection(field: Field<'_>) -> Result<ConnectionPolicy, FileError> {
    let fields = field.fields(CONNECTION)?;
    let mut connection = ConnectionPolicy::default();
    for (name, milliseconds) in [
        ("half_open_timeout", &mut connection.half_open_timeout_ms),
        ("idle_timeout", &mut connection.idle_timeout_ms),
        ("max_age", &mut connection.max_age_ms),
    ] {
        if let Some(field) = fields.optional(name) {
            *milliseconds = if field.as_text() == Some("off") { None } else { Some(field.duration_ms()?) };
        }
    }
    Ok(connection)
}

fn number(field: &Field<'_>, bounds: RangeInclusive<u32>) -> Result<u32, FileError> {
    let most = *bounds.end();
    let number = field.number(u64::from(*bounds.start())..=u64::from(most))?;
    Ok(u32::try_from(number).unwrap_or(most))
}

fn small(field: &Field<'_>, bounds: RangeInclusive<u8>) -> Result<u8, FileError> {
    let most = *bounds.end();
    let number = field.number(u64::from(*bounds.start())..=u64::from(most))?;
    Ok(u8::try_from(number).unwrap_or(most))
}

fn read_security(node: &Node) -> Result<Read, FileError> {
    let fields = Fields::of_resource(node, SECURITY)?;
    let scope: weft_model::SecurityScope = fields.required("scope")?.parse()?;
    let default = fields.optional("default").map(|field| field.word(ACTIONS)).transpose()?;
    let mode = fields.optional("mode").map(|field| field.word(MODES)).transpose()?.unwrap_or_default();
    let on_change = read_on_change(&fields)?;
    let rules = match fields.optional("rules") {
        None => Vec::new(),
        Some(field) => field.list()?.into_iter().map(read_rule).collect::<Result<_, _>>()?,
    };
    let command = SecurityCommand::Put(SecurityPolicy { default, mode, on_change, rules });
    Ok((scope.to_string(), expected(&fields)?, Command::Security(scope, command)))
}

fn read_on_change(fields: &Fields<'_>) -> Result<Option<OnChange>, FileError> {
    let on_change = fields.optional("on_change").map(|field| field.word(ON_CHANGES)).transpose()?;
    match (on_change, fields.optional("grace")) {
        (Some(OnChange::Grace(_)), _) => Ok(Some(OnChange::Grace(fields.required("grace")?.duration_ms()?))),
        (_, Some(field)) => Err(field.wrong("belongs to on_change: grace, and to nothing else")),
        (on_change, None) => Ok(on_change),
    }
}

fn read_rule(field: Field<'_>) -> Result<Rule, FileError> {
    let fields = field.fields(RULE)?;
    let from = fields.required("from")?.fields(SOURCES)?;
    let any = from.optional("any").map(|field| field.word(BOOLEANS)).transpose()?.unwrap_or_default();
    let services = from.optional("services").map(|field| field.parse_list()).transpose()?.unwrap_or_default();
    let namespaces =
        from.optional("namespaces").map(|field| field.parse_list()).transpose()?.unwrap_or_default();
    Ok(Rule {
        name: fields.required("name")?.parse()?,
        action: fields.required("action")?.word(ACTIONS)?,
        from: Sources { any, services, namespaces },
        ports: fields.optional("ports").map(|field| field.parse_list()).transpose()?.unwrap_or_default(),
    })
}

fn read_mesh(node: &Node) -> Result<Read, FileError> {
    let fields = Fields::of_resource(node, MESH)?;
    let mut defaults = MeshDefaults::default();
    if let Some(field) = fields.optional("security") {
        defaults.security = field.word(ACTIONS)?;
    }
    if let Some(field) = fields.optional("propagation_bound") {
        defaults.propagation_bound_ms = field.duration_ms()?;
    }
    if let Some(field) = fields.optional("damping") {
        defaults.damping = read_damping(field)?;
    }
    Ok(("mesh".to_owned(), expected(&fields)?, Command::Mesh(defaults)))
}

fn read_damping(field: Field<'_>) -> Result<DampingSettings, FileError> {
    let fields = field.fields(DAMPING)?;
    let mut damping = DampingSettings::default();
    if let Some(field) = fields.optional("enabled") {
        damping.enabled = field.word(BOOLEANS)?;
    }
    for (name, milliseconds) in
        [("half_life", &mut damping.half_life_ms), ("hold_max", &mut damping.hold_max_ms)]
    {
        if let Some(field) = fields.optional(name) {
            *milliseconds = field.duration_ms()?;
        }
    }
    for (name, points) in [("suppress", &mut damping.suppress), ("reuse", &mut damping.reuse)] {
        if let Some(field) = fields.optional(name) {
            let number = field.number(1..=u64::from(damping::POINTS_MAX))?;
            *points = u32::try_from(number).unwrap_or(damping::POINTS_MAX);
        }
    }
    Ok(damping)
}

/// The model's own rules, as far as they need no state.
fn validate(command: &Command) -> Result<(), Rejection> {
    match command {
        Command::Service(name, command) => service::decide(name, &None, command).map(drop),
        Command::Membership(id, command) => {
            membership::decide(id, &MembershipState::Absent, command).map(drop)
        }
        Command::Traffic(scope, command) => traffic::decide(scope, &None, command).map(drop),
        Command::Security(scope, command) => security::decide(scope, &None, command).map(drop),
        Command::Mesh(defaults) => mesh::decide(&MeshDefaults::default(), defaults).map(drop),
        Command::Health(..)
        | Command::Identity(..)
        | Command::Token(..)
        | Command::Ca(_)
        | Command::Rollout(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
