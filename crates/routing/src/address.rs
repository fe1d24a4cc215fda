//! Which loopback address each service is reached at. A service keeps its address while it exists; which one it gets
//! follows from the order of the log alone.

use crate::hash::Hash;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use weft_model::ServiceName;
use weft_model::service::is_service_address;

/// First of 127.64.0.0/10, as a number.
const RANGE_START: u32 = u32::from_be_bytes([127, 64, 0, 0]);
/// How many addresses the range has.
const RANGE_SIZE: u32 = 1 << 22;

/// Who has which address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Addresses {
    owners: BTreeMap<Ipv4Addr, ServiceName>,
    assigned: BTreeMap<ServiceName, Ipv4Addr>,
}

impl Addresses {
    pub(crate) fn of(&self, service: &ServiceName) -> Option<Ipv4Addr> {
        self.assigned.get(service).copied()
    }

    pub(crate) fn owner(&self, address: Ipv4Addr) -> Option<&ServiceName> {
        self.owners.get(&address)
    }

    /// Gives `service` the address that it wants if that is free, else the one it has, else the first free one from
    /// where its name hashes to. None only when the range is full.
    pub(crate) fn assign(&mut self, service: &ServiceName, wanted: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
        let free = |address: &Ipv4Addr| self.owners.get(address).is_none_or(|owner| owner == service);
        let address = wanted
            .filter(free)
            .or_else(|| self.of(service).filter(|_| wanted.is_none()))
            .or_else(|| candidates(service).find(free))?;
        self.release(service);
        self.owners.insert(address, service.clone());
        self.assigned.insert(service.clone(), address);
        Some(address)
    }

    /// Gives `service`, which has none, an address as it had it before. False if another one has it.
    pub(crate) fn restore(&mut self, service: &ServiceName, address: Ipv4Addr) -> bool {
        if self.owners.contains_key(&address) || self.assigned.contains_key(service) {
            return false;
        }
        self.owners.insert(address, service.clone());
        self.assigned.insert(service.clone(), address);
        true
    }

    pub(crate) fn release(&mut self, service: &ServiceName) {
        if let Some(address) = self.assigned.remove(service) {
            self.owners.remove(&address);
        }
    }
}

fn candidates(service: &ServiceName) -> impl Iterator<Item = Ipv4Addr> {
    let Hash([a, b, c, d, ..]) = Hash::of(service.to_string().as_bytes());
    let start = u32::from_be_bytes([a, b, c, d]) % RANGE_SIZE;
    (0..RANGE_SIZE)
        .map(move |step| Ipv4Addr::from(RANGE_START + (start + step) % RANGE_SIZE))
        .filter(|address| is_service_address(*address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(s: &str) -> ServiceName {
        s.parse().unwrap()
    }

    #[test]
    fn an_address_is_stable_unique_and_in_the_range() {
        let mut addresses = Addresses::default();
        let mut seen = BTreeMap::new();
        for i in 0..5_000 {
            let service = name(&format!("default/s{i}"));
            let address = addresses.assign(&service, None).unwrap();
            assert!(is_service_address(address));
            assert_eq!(seen.insert(address, service.clone()), None);
            assert_eq!(addresses.assign(&service, None), Some(address));
        }
    }

    #[test]
    fn a_wanted_address_is_given_to_the_first_who_asks() {
        let mut addresses = Addresses::default();
        let wanted = Some(Ipv4Addr::new(127, 64, 1, 1));
        assert_eq!(addresses.assign(&name("a/one"), wanted), wanted);
        let other = addresses.assign(&name("a/two"), wanted);
        assert!(other.is_some() && other != wanted);
        addresses.release(&name("a/one"));
        assert_eq!(addresses.assign(&name("a/two"), wanted), wanted);
    }
}
