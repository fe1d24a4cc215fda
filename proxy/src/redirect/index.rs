//! What the addresses of a snapshot are, for connections that come with an address instead of a name. Pure; made once for each snapshot.

use crate::listeners::Reach;
use crate::outbound::Target;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use weft_model::{ConfigVersion, InstanceId, Port, ServiceName};
use weft_routing::Snapshot;

/// Most addresses of instances that are known. Each takes some 100 bytes; whoever connects to services by name needs none of them.
const INSTANCES_MAX: usize = 65_536;

/// What an address is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A service is meant: by its own address, or by that of one of its instances.
    Service(Target),
    /// An address of services that none has.
    NoService,
    /// Instances of several services are there.
    Several,
    /// Where a sidecar takes connections of other sidecars.
    Sidecar(InstanceId),
    /// Nothing of the mesh.
    Outside,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) version: ConfigVersion,
    services: BTreeMap<Ipv4Addr, ServiceName>,
    sidecars: BTreeMap<SocketAddr, InstanceId>,
    /// A host's address with a port of the service that has an instance there; none if several services do.
    instances: BTreeMap<SocketAddr, Option<ServiceName>>,
}

impl Index {
    pub(super) fn of(snapshot: &Snapshot, reach: &Reach) -> Self {
        let mut index = Self { version: snapshot.version, ..Self::default() };
        let mut left_out = 0_usize;
        for shard in snapshot.endpoints.values() {
            for endpoint in &shard.endpoints {
                let instance =
                    InstanceId { service: shard.service.clone(), instance: endpoint.instance.clone() };
                index.sidecars.insert(endpoint.address, instance);
            }
            if !reach.contains(&shard.service) {
                continue;
            }
            if let Some(address) = shard.address {
                index.services.insert(address, shard.service.clone());
            }
            // On a loopback address everybody is, so it says nothing.
            let hosts = shard.endpoints.iter().map(|endpoint| endpoint.address.ip());
            let hosts: BTreeSet<IpAddr> = hosts.filter(|ip| !ip.is_loopback()).collect();
            for (host, port) in
                hosts.iter().flat_map(|host| shard.ports.iter().map(move |port| (host, port.port)))
            {
                left_out += usize::from(!index.add(SocketAddr::new(*host, port.number()), &shard.service));
            }
        }
        if left_out > 0 {
            tracing::warn!(
                left_out,
                "more than {INSTANCES_MAX} addresses of instances; connections to the others are to the outside"
            );
        }
        index
    }

    /// False if there is no room.
    fn add(&mut self, address: SocketAddr, service: &ServiceName) -> bool {
        let full = self.instances.len() >= INSTANCES_MAX;
        match self.instances.entry(address) {
            Entry::Occupied(mut there) => {
                if there.get().as_ref() != Some(service) {
                    there.insert(None);
                }
            }
            Entry::Vacant(_) if full => return false,
            Entry::Vacant(place) => {
                place.insert(Some(service.clone()));
            }
        }
        true
    }

    pub(super) fn place(&self, address: SocketAddr) -> Place {
        let Some(port) = Port::new(address.port()) else { return Place::Outside };
        if let IpAddr::V4(ip) = address.ip()
            && in_service_range(ip)
        {
            let service = self.services.get(&ip).cloned();
            return service.map_or(Place::NoService, |service| Place::Service(Target { service, port }));
        }
        if let Some(instance) = self.sidecars.get(&address) {
            return Place::Sidecar(instance.clone());
        }
        match self.instances.get(&address) {
            Some(Some(service)) => Place::Service(Target { service: service.clone(), port }),
            Some(None) => Place::Several,
            None => Place::Outside,
        }
    }
}

/// 127.64.0.0/10, those addresses included that no service is given.
fn in_service_range(ip: Ipv4Addr) -> bool {
    let [a, b, ..] = ip.octets();
    a == 127 && b & 0b1100_0000 == 64
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_routing::fixture;

    fn snapshot() -> Snapshot {
        fixture::snapshot(&"default/web/web-1".parse().unwrap())
    }

    #[test]
    fn addresses_of_the_mesh_are_known_for_what_they_are() {
        let snapshot = snapshot();
        let index = Index::of(&snapshot, &Reach::everything());
        let shard = snapshot.endpoints.values().find(|shard| !shard.endpoints.is_empty()).unwrap();
        let (port, sidecar) = (shard.ports[0].port, shard.endpoints[0].address);
        let target = Place::Service(Target { service: shard.service.clone(), port });
        assert_eq!(index.place((shard.address.unwrap(), port.number()).into()), target);
        assert!(matches!(index.place(sidecar), Place::Sidecar(_)));
        if !sidecar.ip().is_loopback() {
            assert_eq!(index.place((sidecar.ip(), port.number()).into()), target);
        }
        assert_eq!(index.place("127.127.0.0:1".parse().unwrap()), Place::NoService);
        assert_eq!(index.place("192.0.2.1:443".parse().unwrap()), Place::Outside);
        assert_eq!(index.place("[2001:db8::1]:443".parse().unwrap()), Place::Outside);
        let none = Index::of(&snapshot, &Reach::only([]));
        assert_eq!(none.place((shard.address.unwrap(), port.number()).into()), Place::NoService);
    }

    #[test]
    fn an_address_of_several_services_is_nobodys() {
        let (here, there) = ("10.0.0.1:80".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        let mut index = Index::default();
        for service in ["default/a", "default/b", "default/a"] {
            assert!(index.add(here, &service.parse().unwrap()));
            assert!(index.add(there, &"default/a".parse().unwrap()));
        }
        assert_eq!(index.place(here), Place::Several);
        assert!(matches!(index.place(there), Place::Service(_)));
    }
}
