//! Shards: the parts that snapshots are made of. A shard does not depend on who receives it, so it is built, encoded and
//! compressed once, and every sidecar gets the same bytes.

pub(crate) mod build;
mod decode;
mod encode;

pub use decode::ShardError;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::LazyLock;
use weft_model::health::Health;
use weft_model::membership::Locality;
use weft_model::security::{Action, SecurityPolicy};
use weft_model::service::ServicePort;
use weft_model::traffic::{Nearness, TrafficPolicy};
use weft_model::{Name, Port, Position, ScopeVersion, SecurityScope, ServiceName, TrustDomain};

/// Names a shard.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ShardKey {
    /// `endpoints/<ns>/<service>`: where the service is reached, and how.
    Endpoints(ServiceName),
    /// `inbound/<ns>/<service>`: who may connect to the service.
    Inbound(ServiceName),
    /// `trust`: the trusted roots.
    Trust,
}

/// A service's endpoints and resolved traffic policies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointsShard {
    /// The service.
    pub service: ServiceName,
    /// The loopback address it is reached at; none once the service was deleted.
    pub address: Option<Ipv4Addr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Every ready or draining instance, sorted by name.
    pub endpoints: Vec<Endpoint>,
    /// So few of them are healthy that new connections go to unhealthy ones as well: the few would not bear what all did, and
    /// so much sickness at once is more likely an error of who looks. Who may connect is another matter, and stays as it is.
    pub panic: bool,
    /// The service-wide policy, if there is one.
    pub traffic: Option<ResolvedTraffic>,
    /// Policies for connections from one service; each replaces the service-wide one for it.
    pub overrides: BTreeMap<ServiceName, ResolvedTraffic>,
}

/// Where one instance is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The instance's name in its service.
    pub instance: Name,
    /// Where its sidecar accepts mTLS.
    pub address: SocketAddr,
    /// It takes no new connections.
    pub draining: bool,
    /// What was last observed of it.
    pub health: Health,
    /// The last event that changed this endpoint.
    pub position: Position,
    /// Where it runs; not said if no policy for the service looks at it.
    pub locality: Locality,
    /// Of its metadata those that policies for the service look at.
    pub labels: BTreeMap<String, String>,
}

impl Endpoint {
    /// Whether new connections may go there: ready, and observed to be healthy.
    #[must_use]
    pub fn eligible(&self) -> bool {
        !self.draining && self.health == Health::Healthy
    }
}

/// A traffic policy and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedTraffic {
    /// The policy.
    pub policy: TrafficPolicy,
    /// Its scope's version and last event.
    pub source: ScopeVersion,
}

/// Who may connect to a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundShard {
    /// The service.
    pub service: ServiceName,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// The policies that cover it, the nearest scope first: service, namespace, mesh.
    pub layers: Vec<PolicyLayer>,
    /// What happens where no rule and no layer's default decides.
    pub mesh_default: Action,
    /// Where that comes from; zero if nobody ever set it.
    pub mesh_source: ScopeVersion,
}

/// One security policy that covers a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyLayer {
    /// Its scope.
    pub scope: SecurityScope,
    /// The scope's version and last event.
    pub source: ScopeVersion,
    /// The policy.
    pub policy: SecurityPolicy,
}

/// The trusted roots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustShard {
    /// The name that all identities start with.
    pub trust_domain: TrustDomain,
    /// The root certificates, PEM, oldest first.
    pub roots_pem: Vec<String>,
}

impl ResolvedTraffic {
    pub(crate) fn looks_at_localities(&self) -> bool {
        self.policy.locality.prefer != Nearness::Any
    }

    /// The keys of the metadata that subsets go by.
    pub(crate) fn looks_at(&self) -> impl Iterator<Item = &String> {
        self.policy.subsets.iter().flat_map(|subset| subset.labels.keys())
    }
}

impl EndpointsShard {
    /// The policy for connections from `source`, and where it comes from; the default one comes from nowhere.
    #[must_use]
    pub fn traffic_for(&self, source: &ServiceName) -> (&TrafficPolicy, Option<ScopeVersion>) {
        static USUAL: LazyLock<TrafficPolicy> = LazyLock::new(TrafficPolicy::default);
        match self.overrides.get(source).or(self.traffic.as_ref()) {
            Some(resolved) => (&resolved.policy, Some(resolved.source)),
            None => (&USUAL, None),
        }
    }

    /// Whether the service has this port.
    #[must_use]
    pub fn has_port(&self, port: Port) -> bool {
        self.ports.iter().any(|declared| declared.port == port)
    }

    /// The endpoints that are ready and healthy.
    pub fn eligible(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.iter().filter(|endpoint| endpoint.eligible())
    }

    /// Whether new connections may go to an endpoint of this service: it is eligible, or the service is in panic and it is
    /// ready and known to be unhealthy. One that nobody observed is never taken.
    #[must_use]
    pub fn takes(&self, endpoint: &Endpoint) -> bool {
        endpoint.eligible() || self.panic && !endpoint.draining && endpoint.health == Health::Unhealthy
    }
}

impl InboundShard {
    /// Whether the service has this port.
    #[must_use]
    pub fn has_port(&self, port: Port) -> bool {
        self.ports.iter().any(|declared| declared.port == port)
    }
}

impl fmt::Display for ShardKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Endpoints(service) => write!(f, "endpoints/{service}"),
            Self::Inbound(service) => write!(f, "inbound/{service}"),
            Self::Trust => f.write_str("trust"),
        }
    }
}

impl fmt::Debug for ShardKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text does not name a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a shard is endpoints/<ns>/<service>, inbound/<ns>/<service> or trust")]
pub struct ShardKeyError;

impl FromStr for ShardKey {
    type Err = ShardKeyError;

    fn from_str(s: &str) -> Result<Self, ShardKeyError> {
        match s.split_once('/') {
            None if s == "trust" => Ok(Self::Trust),
            Some(("endpoints", service)) => service.parse().map(Self::Endpoints).map_err(|_| ShardKeyError),
            Some(("inbound", service)) => service.parse().map(Self::Inbound).map_err(|_| ShardKeyError),
            _ => Err(ShardKeyError),
        }
    }
}
