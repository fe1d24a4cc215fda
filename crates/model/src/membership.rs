//! The `membership` scope: whether an instance takes part. absent → ready → draining → gone, and from gone to
//! ready by registering anew.

use crate::event::event_family;
use crate::id::{InstanceId, Port, ServiceName};
use crate::rejection::Rejection;
use crate::scope::Scope;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Most upstreams that an instance may name one by one; one that needs more asks for all.
pub const UPSTREAMS_MAX: usize = 1024;
/// Most metadata entries of an instance: enough for zone, version and owner, too few to misuse as a store.
pub const METADATA_ENTRIES_MAX: usize = 16;
/// Longest metadata key and value, in bytes.
pub const METADATA_BYTES_MAX: usize = 256;

/// The metadata that say where an instance runs: of two instances in one zone nothing but the machine differs, zones of one region are near
/// each other. Zones of two regions may have the same name.
pub const REGION: &str = "region";
/// See [`REGION`].
pub const ZONE: &str = "zone";

event_family! {
    /// What can happen in a `membership` scope.
    MembershipEvent { InstanceRegistered = 1, InstanceDraining = 1, InstanceDeregistered = 1, UpstreamAdded = 1 }
}

/// The instance takes part and is reached like this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceRegistered {
    /// Where its sidecar accepts mTLS.
    pub address: IpAddr,
    /// The port of that.
    pub port: Port,
    /// The services it may connect to, hence what its snapshot holds.
    pub upstreams: Upstreams,
    /// What its operator wants to remember of it, such as a zone or a build.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// The services that an instance may connect to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Upstreams {
    /// Every service of the mesh.
    All,
    /// These, declared already or not.
    Only(BTreeSet<ServiceName>),
}

/// Where an instance runs, as far as it says so: what it does not say is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locality {
    /// Its region.
    pub region: String,
    /// Its zone in the region.
    pub zone: String,
}

impl Locality {
    /// What an instance's metadata say of it.
    #[must_use]
    pub fn of(metadata: &BTreeMap<String, String>) -> Self {
        let said = |key: &str| metadata.get(key).cloned().unwrap_or_default();
        Self { region: said(REGION), zone: said(ZONE) }
    }

    /// Whether both are in one region, and say so.
    #[must_use]
    pub fn shares_region(&self, other: &Self) -> bool {
        !self.region.is_empty() && self.region == other.region
    }

    /// Whether both are in one zone, and say so. Zones of instances that say no region are told apart by their names.
    #[must_use]
    pub fn shares_zone(&self, other: &Self) -> bool {
        !self.zone.is_empty() && self.zone == other.zone && self.region == other.region
    }
}

impl InstanceRegistered {
    fn with(mut self, added: &UpstreamAdded) -> Self {
        if let Upstreams::Only(services) = &mut self.upstreams {
            services.insert(added.service.clone());
        }
        self
    }
}

impl Upstreams {
    /// Whether `service` is among them.
    #[must_use]
    pub fn contains(&self, service: &ServiceName) -> bool {
        match self {
            Self::All => true,
            Self::Only(services) => services.contains(service),
        }
    }
}

/// The instance takes no new connections and ends the ones it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceDraining {}

/// The instance is no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceDeregistered {}

/// The instance may connect to one more service, from when its app first did. A new registration says anew what it may.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamAdded {
    /// The service.
    pub service: ServiceName,
}

/// What someone wants of a membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MembershipCommand {
    /// Take part, or be reached differently from now on.
    Register(InstanceRegistered),
    /// Take no new connections.
    Drain,
    /// Leave.
    Deregister,
    /// Connect to a port of one more service.
    AddUpstream {
        /// The service.
        service: ServiceName,
        /// Its port. Not recorded: policies decide again at every connection.
        port: Port,
    },
}

/// Where an instance stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MembershipState {
    /// It never took part.
    #[default]
    Absent,
    /// It takes part.
    Ready(InstanceRegistered),
    /// It takes no new connections.
    Draining(InstanceRegistered),
    /// It took part and left.
    Gone,
}

impl MembershipState {
    /// How the instance is reached, while it is ready or draining.
    #[must_use]
    pub const fn registration(&self) -> Option<&InstanceRegistered> {
        match self {
            Self::Ready(registration) | Self::Draining(registration) => Some(registration),
            Self::Absent | Self::Gone => None,
        }
    }

    /// The word for the state.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Ready(_) => "ready",
            Self::Draining(_) => "draining",
            Self::Gone => "gone",
        }
    }
}

/// Decides a command. That the service is declared is checked where all scopes are seen.
///
/// # Errors
/// If the state does not allow it, or the registration makes no sense.
pub fn decide(
    instance: &InstanceId,
    state: &MembershipState,
    command: &MembershipCommand,
) -> Result<Vec<MembershipEvent>, Rejection> {
    use MembershipCommand::{AddUpstream, Deregister, Drain, Register};
    use MembershipState::{Absent, Draining, Gone, Ready};
    match (command, state) {
        (Register(wanted), Ready(current)) if wanted == current => Ok(Vec::new()),
        (Register(wanted), Absent | Ready(_) | Draining(_) | Gone) => {
            validate(wanted)?;
            Ok(vec![wanted.clone().into()])
        }
        (Drain | Deregister | AddUpstream { .. }, Absent) => {
            Err(Rejection::Absent(Scope::Membership(instance.clone())))
        }
        (Drain, Ready(_)) => Ok(vec![InstanceDraining {}.into()]),
        (Drain, Draining(_)) => Ok(Vec::new()),
        (Drain | AddUpstream { .. }, Gone) => Err(Rejection::Gone(instance.clone())),
        (Deregister, Ready(_) | Draining(_)) => Ok(vec![InstanceDeregistered {}.into()]),
        (Deregister, Gone) => Ok(Vec::new()),
        (AddUpstream { service, .. }, Ready(current) | Draining(current)) => match &current.upstreams {
            upstreams if upstreams.contains(service) => Ok(Vec::new()),
            Upstreams::Only(services) if services.len() >= UPSTREAMS_MAX => Err(too_many_upstreams()),
            Upstreams::Only(_) | Upstreams::All => {
                Ok(vec![UpstreamAdded { service: service.clone() }.into()])
            }
        },
    }
}

/// The state after an event.
#[must_use]
pub fn apply(state: MembershipState, event: &MembershipEvent) -> MembershipState {
    use MembershipState::{Absent, Draining, Gone, Ready};
    match (event, state) {
        (MembershipEvent::InstanceRegistered(registration), _) => Ready(registration.clone()),
        (MembershipEvent::InstanceDraining(_), Ready(registration) | Draining(registration)) => {
            Draining(registration)
        }
        (MembershipEvent::InstanceDraining(_), Absent) => Absent,
        (MembershipEvent::InstanceDraining(_) | MembershipEvent::UpstreamAdded(_), Gone)
        | (MembershipEvent::InstanceDeregistered(_), _) => Gone,
        (MembershipEvent::UpstreamAdded(added), Ready(registration)) => Ready(registration.with(added)),
        (MembershipEvent::UpstreamAdded(added), Draining(registration)) => Draining(registration.with(added)),
        (MembershipEvent::UpstreamAdded(_), Absent) => Absent,
    }
}

fn too_many_upstreams() -> Rejection {
    Rejection::invalid("upstreams", format!("at most {UPSTREAMS_MAX}; ask for all instead"))
}

fn validate(wanted: &InstanceRegistered) -> Result<(), Rejection> {
    if wanted.address.is_unspecified() || wanted.address.is_multicast() {
        return Err(Rejection::invalid("address", "must be one host that peers can reach"));
    }
    if let Upstreams::Only(services) = &wanted.upstreams
        && services.len() > UPSTREAMS_MAX
    {
        return Err(too_many_upstreams());
    }
    check_metadata(&wanted.metadata)
}

/// Whether an instance may have these metadata.
///
/// # Errors
/// There are too many, or one is too long or not printable.
pub fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), Rejection> {
    if metadata.len() > METADATA_ENTRIES_MAX {
        return Err(Rejection::invalid("metadata", format!("at most {METADATA_ENTRIES_MAX} entries")));
    }
    for (key, value) in metadata {
        let printable = |s: &str| s.len() <= METADATA_BYTES_MAX && !s.chars().any(char::is_control);
        if key.is_empty() || !printable(key) || !printable(value) {
            let rule = format!("keys and values are printable, at most {METADATA_BYTES_MAX} bytes");
            return Err(Rejection::invalid("metadata", rule));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn api() -> InstanceId {
        "default/api/api-1".parse().unwrap()
    }

    fn registration(port: u16) -> InstanceRegistered {
        InstanceRegistered {
            address: "127.0.0.1".parse().unwrap(),
            port: Port::new(port).unwrap(),
            upstreams: Upstreams::All,
            metadata: BTreeMap::new(),
        }
    }

    /// Given what happened, when a command comes, then these events or this rejection.
    fn when(
        given: &[MembershipEvent],
        command: &MembershipCommand,
    ) -> Result<Vec<MembershipEvent>, Rejection> {
        let state = given.iter().fold(MembershipState::Absent, apply);
        decide(&api(), &state, command)
    }

    #[test]
    fn an_instance_lives_from_ready_over_draining_to_gone_and_back() {
        let registered: MembershipEvent = registration(1).into();
        let draining: MembershipEvent = InstanceDraining {}.into();
        let gone: MembershipEvent = InstanceDeregistered {}.into();
        let register = MembershipCommand::Register(registration(1));
        let (drain, deregister) = (MembershipCommand::Drain, MembershipCommand::Deregister);

        assert_eq!(when(&[], &register), Ok(vec![registered.clone()]));
        let ready = [registered.clone()];
        assert_eq!(when(&ready, &register), Ok(vec![]));
        assert_eq!(when(&ready, &drain), Ok(vec![draining.clone()]));
        assert_eq!(when(&ready, &deregister), Ok(vec![gone.clone()]));
        let leaving = [registered.clone(), draining.clone()];
        assert_eq!(when(&leaving, &drain), Ok(vec![]));
        assert_eq!(when(&leaving, &register), Ok(vec![registered.clone()]));
        assert_eq!(when(&leaving, &deregister), Ok(vec![gone.clone()]));
        let left = [registered.clone(), gone];
        assert_eq!(when(&left, &deregister), Ok(vec![]));
        assert_eq!(when(&left, &drain), Err(Rejection::Gone(api())));
        assert_eq!(when(&left, &register), Ok(vec![registered]));
    }

    #[test]
    fn who_never_came_cannot_leave() {
        let absent = Err(Rejection::Absent(Scope::Membership(api())));
        assert_eq!(when(&[], &MembershipCommand::Drain), absent);
        assert_eq!(when(&[], &MembershipCommand::Deregister), absent);
    }

    #[test]
    fn a_new_address_is_a_new_registration() {
        let moved = MembershipCommand::Register(registration(2));
        assert_eq!(when(&[registration(1).into()], &moved), Ok(vec![registration(2).into()]));
    }

    #[test]
    fn an_upstream_is_added_once_and_changes_nothing_else() {
        let only = |services: &[&str]| {
            let services = services.iter().map(|name| name.parse().unwrap()).collect();
            InstanceRegistered { upstreams: Upstreams::Only(services), ..registration(1) }
        };
        let add = |name: &str| {
            let (service, port) = (name.parse().unwrap(), Port::new(80).unwrap());
            MembershipCommand::AddUpstream { service, port }
        };
        let added: MembershipEvent = UpstreamAdded { service: "default/db".parse().unwrap() }.into();
        let ready = [only(&["default/web"]).into()];
        assert_eq!(when(&ready, &add("default/db")), Ok(vec![added.clone()]));
        assert_eq!(when(&ready, &add("default/web")), Ok(vec![]));
        assert_eq!(when(&[registration(1).into()], &add("default/db")), Ok(vec![]), "it may connect to all");
        let both = only(&["default/db", "default/web"]);
        let after = |events: &[MembershipEvent]| events.iter().fold(MembershipState::Absent, apply);
        assert_eq!(after(&[ready[0].clone(), added.clone()]), MembershipState::Ready(both.clone()));
        let leaving = [ready[0].clone(), InstanceDraining {}.into(), added.clone()];
        assert_eq!(after(&leaving), MembershipState::Draining(both), "who leaves still ends what it does");
        let gone = [ready[0].clone(), InstanceDeregistered {}.into()];
        assert_eq!(when(&gone, &add("default/db")), Err(Rejection::Gone(api())));
        assert_eq!(when(&[], &add("default/db")), Err(Rejection::Absent(Scope::Membership(api()))));
        let many: Vec<_> = (0..UPSTREAMS_MAX).map(|n| format!("default/s{n}")).collect();
        let full = [only(&many.iter().map(String::as_str).collect::<Vec<_>>()).into()];
        assert!(matches!(when(&full, &add("default/db")), Err(Rejection::Invalid { .. })));
        assert_eq!(
            when(&[ready[0].clone(), added], &MembershipCommand::Register(only(&["default/web"])))
                .unwrap()
                .len(),
            1
        );
    }

    #[test]
    fn unreachable_or_oversized_registrations_are_refused() {
        let mut anywhere = registration(1);
        anywhere.address = "0.0.0.0".parse().unwrap();
        let mut control = registration(1);
        control.metadata.insert("zone".into(), "a\u{1b}[31m".into());
        let mut many = registration(1);
        many.metadata = (0..=METADATA_ENTRIES_MAX).map(|i| (format!("k{i}"), String::new())).collect();
        for bad in [anywhere, control, many] {
            assert!(matches!(when(&[], &MembershipCommand::Register(bad)), Err(Rejection::Invalid { .. })));
        }
    }

    #[test]
    fn near_is_who_says_so() {
        let at = |region: &str, zone: &str| {
            let metadata = [(REGION, region), (ZONE, zone)].into_iter().filter(|(_, said)| !said.is_empty());
            Locality::of(&metadata.map(|(key, said)| (key.to_owned(), said.to_owned())).collect())
        };
        let here = at("eu", "1a");
        assert!(here.shares_zone(&at("eu", "1a")) && here.shares_region(&at("eu", "1a")));
        assert!(!here.shares_zone(&at("eu", "1b")) && here.shares_region(&at("eu", "1b")));
        assert!(!here.shares_zone(&at("us", "1a")) && !here.shares_region(&at("us", "1a")));
        assert!(!here.shares_zone(&at("", "1a")) && !here.shares_region(&at("", "1a")));
        assert!(at("", "1a").shares_zone(&at("", "1a")) && !at("", "1a").shares_region(&at("", "1b")));
        assert!(!at("", "").shares_zone(&at("", "")) && !at("", "").shares_region(&at("", "")));
    }
}
