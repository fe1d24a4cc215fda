//! The canonical encoding of shards and manifests: protobuf with fields in order of number, lists sorted by the
//! builders, no maps and no unknown fields. Equal content, equal bytes; the hash of the bytes is the content's name.
//!
//! These bytes are stored, hashed and compared across versions of Weft: a field number is never reused, and a new field
//! changes nothing while it has its default value.

use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Manifest {
    #[prost(message, repeated, tag = "1")]
    pub(crate) entries: Vec<ManifestEntry>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ManifestEntry {
    #[prost(string, tag = "1")]
    pub(crate) key: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) hash: Vec<u8>,
    #[prost(uint64, tag = "3")]
    pub(crate) position: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Endpoints {
    #[prost(string, tag = "1")]
    pub(crate) service: String,
    /// Big-endian IPv4; 0 for a service that was deleted.
    #[prost(fixed32, tag = "2")]
    pub(crate) address: u32,
    #[prost(message, repeated, tag = "3")]
    pub(crate) ports: Vec<ServicePort>,
    #[prost(message, repeated, tag = "4")]
    pub(crate) endpoints: Vec<Endpoint>,
    /// The service-wide policy first if there is one, then those for one source, sorted.
    #[prost(message, repeated, tag = "5")]
    pub(crate) traffic: Vec<Traffic>,
    #[prost(bool, tag = "6")]
    pub(crate) panic: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ServicePort {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(uint32, tag = "2")]
    pub(crate) port: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Endpoint {
    #[prost(string, tag = "1")]
    pub(crate) instance: String,
    #[prost(string, tag = "2")]
    pub(crate) address: String,
    #[prost(bool, tag = "3")]
    pub(crate) draining: bool,
    #[prost(enumeration = "Health", tag = "4")]
    pub(crate) health: i32,
    #[prost(uint64, tag = "5")]
    pub(crate) position: u64,
    /// Only if a policy for the service looks at them.
    #[prost(string, tag = "6")]
    pub(crate) region: String,
    #[prost(string, tag = "7")]
    pub(crate) zone: String,
    /// Metadata, only those whose keys a policy for the service looks at; sorted by key.
    #[prost(message, repeated, tag = "8")]
    pub(crate) labels: Vec<Label>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Label {
    #[prost(string, tag = "1")]
    pub(crate) key: String,
    #[prost(string, tag = "2")]
    pub(crate) value: String,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Subset {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    /// Sorted by key.
    #[prost(message, repeated, tag = "2")]
    pub(crate) labels: Vec<Label>,
    #[prost(uint32, tag = "3")]
    pub(crate) weight: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Health {
    Unknown = 0,
    Healthy = 1,
    Unhealthy = 2,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Traffic {
    /// Empty for the service-wide policy.
    #[prost(string, tag = "1")]
    pub(crate) source: String,
    #[prost(enumeration = "Balance", tag = "2")]
    pub(crate) balance: i32,
    #[prost(uint32, tag = "3")]
    pub(crate) connect_timeout_ms: u32,
    #[prost(uint32, tag = "4")]
    pub(crate) connect_retries: u32,
    #[prost(uint64, tag = "5")]
    pub(crate) version: u64,
    #[prost(uint64, tag = "6")]
    pub(crate) position: u64,
    #[prost(uint32, tag = "7")]
    pub(crate) slow_start_ms: u32,
    /// Each of these is left out while it is what it is by default, so that an older sidecar refuses only what it cannot do.
    #[prost(message, optional, tag = "8")]
    pub(crate) retry: Option<Retry>,
    #[prost(message, optional, tag = "9")]
    pub(crate) limits: Option<Limits>,
    #[prost(message, optional, tag = "10")]
    pub(crate) outliers: Option<Outliers>,
    #[prost(message, optional, tag = "11")]
    pub(crate) lifetime: Option<Lifetime>,
    #[prost(message, optional, tag = "12")]
    pub(crate) locality: Option<Locality>,
    #[prost(message, repeated, tag = "13")]
    pub(crate) subsets: Vec<Subset>,
    #[prost(bool, tag = "14")]
    pub(crate) sticky_sources: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Locality {
    #[prost(enumeration = "Nearness", tag = "1")]
    pub(crate) prefer: i32,
    #[prost(uint32, tag = "2")]
    pub(crate) threshold_percent: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Nearness {
    Any = 0,
    Region = 1,
    Zone = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Balance {
    LeastConnections = 0,
    RoundRobin = 1,
    Random = 2,
    PeakEwma = 3,
    Maglev = 4,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Retry {
    #[prost(uint32, tag = "1")]
    pub(crate) backoff_ms: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) budget_percent: u32,
    #[prost(uint32, tag = "3")]
    pub(crate) budget_min_per_second: u32,
}

/// 0 for no limit.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Limits {
    #[prost(uint32, tag = "1")]
    pub(crate) endpoint_connections: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) endpoint_pending: u32,
    #[prost(uint32, tag = "3")]
    pub(crate) service_connections: u32,
    #[prost(uint32, tag = "4")]
    pub(crate) service_pending: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Outliers {
    #[prost(bool, tag = "1")]
    pub(crate) enabled: bool,
    #[prost(uint32, tag = "2")]
    pub(crate) failures: u32,
    #[prost(uint32, tag = "3")]
    pub(crate) ejection_base_ms: u32,
    #[prost(uint32, tag = "4")]
    pub(crate) ejection_max_ms: u32,
    #[prost(uint32, tag = "5")]
    pub(crate) ejected_percent_max: u32,
}

/// 0 for ever.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Lifetime {
    #[prost(uint32, tag = "1")]
    pub(crate) half_open_timeout_ms: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) idle_timeout_ms: u32,
    #[prost(uint32, tag = "3")]
    pub(crate) max_age_ms: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Inbound {
    #[prost(string, tag = "1")]
    pub(crate) service: String,
    #[prost(message, repeated, tag = "2")]
    pub(crate) ports: Vec<ServicePort>,
    /// The nearest scope first.
    #[prost(message, repeated, tag = "3")]
    pub(crate) layers: Vec<Layer>,
    #[prost(message, optional, tag = "4")]
    pub(crate) mesh_default: Option<MeshDefault>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct MeshDefault {
    #[prost(bool, tag = "1")]
    pub(crate) allow: bool,
    #[prost(uint64, tag = "2")]
    pub(crate) version: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) position: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Layer {
    #[prost(string, tag = "1")]
    pub(crate) scope: String,
    #[prost(uint64, tag = "2")]
    pub(crate) version: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) position: u64,
    #[prost(bool, tag = "4")]
    pub(crate) audit: bool,
    #[prost(enumeration = "Action", tag = "5")]
    pub(crate) default: i32,
    #[prost(message, repeated, tag = "6")]
    pub(crate) rules: Vec<Rule>,
    #[prost(enumeration = "OnChange", tag = "7")]
    pub(crate) on_change: i32,
    /// Of a grace.
    #[prost(uint32, tag = "8")]
    pub(crate) grace_ms: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum OnChange {
    Unset = 0,
    Cut = 1,
    Grace = 2,
    Keep = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Action {
    Unset = 0,
    Allow = 1,
    Deny = 2,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Rule {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(enumeration = "Action", tag = "2")]
    pub(crate) action: i32,
    #[prost(bool, tag = "3")]
    pub(crate) any: bool,
    #[prost(string, repeated, tag = "4")]
    pub(crate) services: Vec<String>,
    #[prost(string, repeated, tag = "5")]
    pub(crate) namespaces: Vec<String>,
    #[prost(uint32, repeated, tag = "6")]
    pub(crate) ports: Vec<u32>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Trust {
    #[prost(string, tag = "1")]
    pub(crate) trust_domain: String,
    #[prost(string, repeated, tag = "2")]
    pub(crate) roots_pem: Vec<String>,
}
