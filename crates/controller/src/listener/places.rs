//! How many connections there may be.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Connections of one controller. A sidecar has one, and two for a moment when its leaf is renewed. A quiet one takes
/// some 50 KiB, so all of them stay below a gigabyte.
pub(super) const CONNECTIONS_MAX: usize = 16_384;
/// Those among them without a certificate: a few hundred joins under way at once, each a matter of milliseconds.
const STRANGERS_MAX: usize = 512;
/// Those of one network: a rack that joins from behind one address.
const STRANGERS_PER_NETWORK_MAX: usize = 128;

/// The places of a listener.
#[derive(Clone, Debug, Default)]
pub(super) struct Places {
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    strangers: usize,
    /// Networks with strangers; at most as many as there are strangers.
    networks: BTreeMap<IpAddr, usize>,
}

/// A connection's place, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    stranger_from: Option<IpAddr>,
}

impl Places {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// A place, if there is one.
    pub(super) fn take(&self) -> Option<Place> {
        let mut taken = self.lock();
        if taken.all >= CONNECTIONS_MAX {
            return None;
        }
        taken.all += 1;
        Some(Place { places: self.clone(), stranger_from: None })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Makes this the place of somebody without a certificate. False if there are enough of them.
    pub(super) fn be_stranger(&mut self, network: IpAddr) -> bool {
        let mut taken = self.places.lock();
        let here = taken.networks.get(&network).copied().unwrap_or_default();
        if taken.strangers >= STRANGERS_MAX || here >= STRANGERS_PER_NETWORK_MAX {
            return false;
        }
        taken.strangers += 1;
        taken.networks.insert(network, here + 1);
        drop(taken);
        self.stranger_from = Some(network);
        true
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.all -= 1;
        let Some(network) = self.stranger_from else { return };
        taken.strangers -= 1;
        match taken.networks.get_mut(&network) {
            Some(here) if *here > 1 => *here -= 1,
            Some(_) | None => {
                taken.networks.remove(&network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many strangers of one network as find a place.
    fn strangers(places: &Places, network: u32) -> Vec<Place> {
        let network = std::net::Ipv4Addr::from_bits(network).into();
        let mut found = Vec::new();
        while let Some(mut place) = places.take().filter(|_| found.len() < 1_000)
            && place.be_stranger(network)
        {
            found.push(place);
        }
        found
    }

    #[test]
    fn connections_are_bounded_and_their_places_come_back() {
        let places = Places::new();
        let mut all: Vec<Place> = std::iter::from_fn(|| places.take()).collect();
        assert_eq!(all.len(), 16_384);
        all.pop();
        assert!(places.take().is_some());
    }

    #[test]
    fn strangers_of_one_network_leave_places_to_others_and_all_of_them_to_members() {
        let places = Places::new();
        let crowd: Vec<_> = (0..5).map(|network| strangers(&places, network)).collect();
        assert_eq!(crowd.iter().map(Vec::len).collect::<Vec<_>>(), [128, 128, 128, 128, 0]);
        assert!(places.take().is_some(), "a member");
        drop(crowd);
        assert_eq!(strangers(&places, 4).len(), 128);
        let taken = places.lock();
        assert_eq!((taken.all, taken.strangers, taken.networks.len()), (0, 0, 0));
    }
}
