//! From a controller's answer to a document that `weft apply` takes.

use crate::output::time::{point, written};
use crate::resource::Kind;
use serde::Serialize;
use std::collections::BTreeMap;
use weft_proto::v1;
use weft_proto::v1::resource::Spec;

/// A resource as it is written. The field order is the order in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind")]
pub(crate) enum Document {
    Service {
        version: u64,
        name: String,
        ports: Vec<Port>,
        #[serde(skip_serializing_if = "String::is_empty")]
        address: String,
    },
    Instance {
        version: u64,
        name: String,
        address: String,
        upstreams: Upstreams,
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        metadata: BTreeMap<String, String>,
    },
    TrafficPolicy {
        version: u64,
        scope: String,
        balance: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        locality: Option<Locality>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        subsets: Vec<Subset>,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        sticky_sources: bool,
        #[serde(skip_serializing_if = "Option::is_none")]
        slow_start: Option<String>,
        connect: Connect,
        #[serde(skip_serializing_if = "Option::is_none")]
        limits: Option<Limits>,
        #[serde(skip_serializing_if = "Option::is_none")]
        outlier_detection: Option<Box<OutlierDetection>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        connection: Option<Box<Lifetime>>,
    },
    SecurityPolicy {
        version: u64,
        scope: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        default: Option<&'static str>,
        mode: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        on_change: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        grace: Option<String>,
        rules: Vec<Rule>,
    },
    MeshDefaults {
        version: u64,
        security: &'static str,
        propagation_bound: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        damping: Option<Damping>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Damping {
    enabled: bool,
    half_life: String,
    suppress: u32,
    reuse: u32,
    hold_max: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Port {
    name: String,
    port: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum Upstreams {
    All(&'static str),
    Only(Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Connect {
    timeout: String,
    retries: u32,
    #[serde(flatten)]
    retry: Option<Retry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Locality {
    prefer: &'static str,
    threshold_percent: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Subset {
    name: String,
    labels: BTreeMap<String, String>,
    weight: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Retry {
    backoff: String,
    budget_percent: u32,
    budget_min_per_second: u32,
}

/// Only those that are set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Limits {
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint_connections: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint_pending: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_connections: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_pending: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct OutlierDetection {
    enabled: bool,
    failures: u32,
    ejection_base: String,
    ejection_max: String,
    ejected_percent_max: u32,
}

/// A duration each, or `off`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Lifetime {
    half_open_timeout: String,
    idle_timeout: String,
    max_age: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Rule {
    name: String,
    action: &'static str,
    from: Sources,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ports: Vec<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Sources {
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    any: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    services: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    namespaces: Vec<String>,
}

/// A document with what the mesh knows beside it, for `-o json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Described {
    #[serde(flatten)]
    pub(crate) document: Document,
    pub(crate) last_change: Change,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<InstanceStatus>,
}

/// Who last changed it, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Change {
    scope: String,
    position: u64,
    at: String,
    actor: String,
}

/// What is known of an instance beside its registration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct InstanceStatus {
    state: String,
    health: &'static str,
    health_detail: String,
    health_at: String,
    identity: String,
    leaf_not_after: String,
}

impl Described {
    /// Everything about a resource; none if this program does not know its kind.
    pub(crate) fn of(resource: &v1::Resource) -> Option<Self> {
        let status = match resource.spec.as_ref()? {
            Spec::Instance(instance) => Some(InstanceStatus {
                state: instance.state.clone(),
                health: health(instance.health()),
                health_detail: instance.health_detail.clone(),
                health_at: point(instance.health_at_ms),
                identity: instance.identity.clone(),
                leaf_not_after: point(instance.leaf_not_after_ms),
            }),
            Spec::Service(_) | Spec::TrafficPolicy(_) | Spec::SecurityPolicy(_) | Spec::MeshDefaults(_) => {
                None
            }
        };
        let last_change = Change {
            scope: resource.scope.clone(),
            position: resource.position,
            at: point(resource.changed_at_ms),
            actor: resource.actor.clone(),
        };
        Some(Self { document: document(resource)?, last_change, status })
    }
}

/// The kind of a resource, and what it is called.
pub(crate) fn kind_and_name(resource: &v1::Resource) -> Option<(Kind, String)> {
    Some(match resource.spec.as_ref()? {
        Spec::Service(service) => (Kind::Service, service.name.clone()),
        Spec::Instance(instance) => (Kind::Instance, instance.registration.as_ref()?.instance.clone()),
        Spec::TrafficPolicy(put) => (Kind::TrafficPolicy, put.scope.clone()),
        Spec::SecurityPolicy(put) => (Kind::SecurityPolicy, put.scope.clone()),
        Spec::MeshDefaults(_) => (Kind::MeshDefaults, "mesh".to_owned()),
    })
}

/// The document that would make the resource what it is.
pub(crate) fn document(resource: &v1::Resource) -> Option<Document> {
    let version = resource.version;
    Some(match resource.spec.as_ref()? {
        Spec::Service(service) => Document::Service {
            version,
            name: service.name.clone(),
            ports: service.ports.iter().map(|p| Port { name: p.name.clone(), port: p.port }).collect(),
            address: service.address.clone(),
        },
        Spec::Instance(instance) => {
            let registration = instance.registration.as_ref()?;
            Document::Instance {
                version,
                name: registration.instance.clone(),
                address: address(registration),
                upstreams: if registration.all_upstreams {
                    Upstreams::All("all")
                } else {
                    Upstreams::Only(registration.upstreams.clone())
                },
                metadata: registration.metadata.clone().into_iter().collect(),
            }
        }
        Spec::TrafficPolicy(put) => traffic(version, put.scope.clone(), put.policy.as_ref()?),
        Spec::SecurityPolicy(put) => {
            let policy = put.policy.as_ref()?;
            Document::SecurityPolicy {
                version,
                scope: put.scope.clone(),
                default: action(policy.default()),
                mode: mode(policy.mode()),
                on_change: on_change(policy.on_change()),
                grace: (policy.on_change() == v1::OnChange::Grace).then(|| written(policy.grace_ms)),
                rules: policy.rules.iter().map(rule).collect(),
            }
        }
        Spec::MeshDefaults(defaults) => Document::MeshDefaults {
            version,
            security: action(defaults.security()).unwrap_or("deny"),
            propagation_bound: written(defaults.propagation_bound_ms),
            damping: defaults.damping.map(|damping| Damping {
                enabled: damping.enabled,
                half_life: written(damping.half_life_ms),
                suppress: damping.suppress,
                reuse: damping.reuse,
                hold_max: written(damping.hold_max_ms),
            }),
        },
    })
}

/// Where an instance is reached, as one text.
pub(crate) fn address(registration: &v1::RegisterInstance) -> String {
    if registration.address.contains(':') {
        format!("[{}]:{}", registration.address, registration.port)
    } else {
        format!("{}:{}", registration.address, registration.port)
    }
}

fn traffic(version: u64, scope: String, policy: &v1::TrafficPolicy) -> Document {
    let some = |number: u32| (number != 0).then_some(number);
    let or_off = |milliseconds| some(milliseconds).map_or_else(|| "off".to_owned(), written);
    Document::TrafficPolicy {
        version,
        scope,
        balance: balance(policy.balance()),
        locality: policy.locality.map(|locality| Locality {
            prefer: nearness(locality.prefer()),
            threshold_percent: locality.threshold_percent,
        }),
        subsets: policy.subsets.iter().map(subset).collect(),
        sticky_sources: policy.sticky_sources,
        slow_start: some(policy.slow_start_ms).map(written),
        connect: Connect {
            timeout: written(policy.connect_timeout_ms),
            retries: policy.connect_retries,
            retry: policy.retry.map(|retry| Retry {
                backoff: written(retry.backoff_ms),
                budget_percent: retry.budget_percent,
                budget_min_per_second: retry.budget_min_per_second,
            }),
        },
        limits: policy.limits.filter(|limits| *limits != v1::CircuitLimits::default()).map(|limits| Limits {
            endpoint_connections: some(limits.endpoint_connections),
            endpoint_pending: some(limits.endpoint_pending),
            service_connections: some(limits.service_connections),
            service_pending: some(limits.service_pending),
        }),
        outlier_detection: policy.outlier_detection.map(|outliers| {
            Box::new(OutlierDetection {
                enabled: outliers.enabled,
                failures: outliers.failures,
                ejection_base: written(outliers.ejection_base_ms),
                ejection_max: written(outliers.ejection_max_ms),
                ejected_percent_max: outliers.ejected_percent_max,
            })
        }),
        connection: policy.connection.map(|connection| {
            Box::new(Lifetime {
                half_open_timeout: or_off(connection.half_open_timeout_ms),
                idle_timeout: or_off(connection.idle_timeout_ms),
                max_age: or_off(connection.max_age_ms),
            })
        }),
    }
}

fn rule(rule: &v1::Rule) -> Rule {
    Rule {
        name: rule.name.clone(),
        action: action(rule.action()).unwrap_or("deny"),
        from: Sources {
            any: rule.from_any,
            services: rule.from_services.clone(),
            namespaces: rule.from_namespaces.clone(),
        },
        ports: rule.ports.clone(),
    }
}

pub(crate) const fn action(action: v1::Action) -> Option<&'static str> {
    match action {
        v1::Action::Unspecified => None,
        v1::Action::Allow => Some("allow"),
        v1::Action::Deny => Some("deny"),
    }
}

pub(crate) const fn mode(mode: v1::Mode) -> &'static str {
    match mode {
        v1::Mode::Unspecified | v1::Mode::Enforce => "enforce",
        v1::Mode::Audit => "audit",
    }
}

const fn on_change(on_change: v1::OnChange) -> Option<&'static str> {
    match on_change {
        v1::OnChange::Unspecified => None,
        v1::OnChange::Cut => Some("cut"),
        v1::OnChange::Grace => Some("grace"),
        v1::OnChange::Keep => Some("keep"),
    }
}

pub(crate) const fn balance(balance: v1::Balance) -> &'static str {
    match balance {
        v1::Balance::Unspecified | v1::Balance::LeastConnections => "least_connections",
        v1::Balance::RoundRobin => "round_robin",
        v1::Balance::Random => "random",
        v1::Balance::PeakEwma => "peak_ewma",
        v1::Balance::Maglev => "maglev",
    }
}

fn subset(subset: &v1::Subset) -> Subset {
    Subset {
        name: subset.name.clone(),
        labels: subset.labels.clone().into_iter().collect(),
        weight: subset.weight,
    }
}

const fn nearness(nearness: v1::Nearness) -> &'static str {
    match nearness {
        v1::Nearness::Unspecified => "any",
        v1::Nearness::Region => "region",
        v1::Nearness::Zone => "zone",
    }
}

pub(crate) const fn health(health: v1::Health) -> &'static str {
    match health {
        v1::Health::Unknown => "unknown",
        v1::Health::Healthy => "healthy",
        v1::Health::Unhealthy => "unhealthy",
    }
}
