//! Which endpoint a source goes to, the same for every sidecar that sees the same endpoints, by the lookup table of Maglev
//! (Eisenbud and others, NSDI 2016, section 3.4): every endpoint has nearly the same part of the table, and if one comes or
//! goes few other entries change. Pure.
//!
//! A table is made once for each change of a service's endpoints, and only for services that are balanced by it. A source whose endpoint
//! does not fit at the moment goes to another entry that does: the sources of one endpoint spread over all others, and come back.

use siphasher::sip::SipHasher13;
use std::hash::Hasher;
use std::net::IpAddr;

/// Sizes of tables, primes: the smallest with a hundred entries for each endpoint, so that none has over a few percent more
/// than another. Of the largest there is one for a service with 656 endpoints or more: 2.6 MB.
const SIZES: [usize; 5] = [1_021, 4_099, 16_381, 65_537, 655_373];
const ENTRIES_EACH: usize = 100;

/// How many entries are looked at for one that fits. If half of the endpoints fit, two are; after this many it is sooner found by
/// looking at the endpoints.
const STEPS_MAX: usize = 64;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Table(Box<[u32]>);

impl Table {
    /// For candidates with these names, in their order.
    pub(crate) fn build<'n>(names: impl ExactSizeIterator<Item = &'n str>) -> Self {
        const FREE: u32 = u32::MAX;
        let count = names.len();
        if count == 0 {
            return Self(Box::default());
        }
        let enough = |size: &usize| *size >= count * ENTRIES_EACH;
        let size = SIZES.into_iter().find(enough).unwrap_or(SIZES[SIZES.len() - 1]);
        // Each wants the entries of the table in an order of its own; in turn each gets the next one that is still free.
        let mut wishes: Vec<(usize, usize)> = names
            .map(|name| {
                let (first, step) = (hash(0, name.as_bytes()), hash(1, name.as_bytes()));
                (reduce(first, size), 1 + reduce(step, size - 1))
            })
            .collect();
        let mut entries = vec![FREE; size].into_boxed_slice();
        let mut filled = 0;
        'fill: loop {
            for (candidate, (at, step)) in (0..FREE).zip(&mut wishes) {
                while entries[*at] != FREE {
                    *at = (*at + *step) % size;
                }
                entries[*at] = candidate;
                filled += 1;
                if filled == size {
                    break 'fill;
                }
            }
        }
        Self(entries)
    }

    /// The candidate of a source, or another that fits; none if none is found soon.
    pub(crate) fn find(&self, source: u64, fits: impl Fn(usize) -> bool) -> Option<usize> {
        let size = self.0.len();
        if size == 0 {
            return None;
        }
        // Each source steps in its own width: the sources of one endpoint do not all have the same next one.
        let (first, step) = (reduce(source, size), 1 + reduce(source.rotate_left(32), size - 1));
        let mut entries = (0..STEPS_MAX).map(|index| self.0[(first + index * step) % size] as usize);
        entries.find(|candidate| fits(*candidate))
    }
}

/// What stands for the source of a connection. An app that connects over the loopback interface is known by its instance:
/// behind every sidecar it has the same address.
pub(crate) fn source(address: IpAddr, instance: &str) -> u64 {
    let address = address.to_canonical();
    let mut hasher = SipHasher13::new_with_keys(2, 0);
    match address {
        IpAddr::V4(address) => hasher.write(&address.octets()),
        IpAddr::V6(address) => hasher.write(&address.octets()),
    }
    if address.is_loopback() {
        hasher.write(instance.as_bytes());
    }
    hasher.finish()
}

/// A hash that is the same on every machine and in every version.
fn hash(key: u64, bytes: &[u8]) -> u64 {
    let mut hasher = SipHasher13::new_with_keys(key, 0);
    hasher.write(bytes);
    hasher.finish()
}

#[expect(clippy::cast_possible_truncation, reason = "the remainder is below a usize")]
const fn reduce(hash: u64, size: usize) -> usize {
    (hash % size as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn build(names: &[String]) -> Table {
        Table::build(names.iter().map(String::as_str))
    }

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|index| format!("api-{index}")).collect()
    }

    #[test]
    fn every_endpoint_has_its_part_of_the_table() {
        for count in [1, 2, 3, 10, 50, 655, 700] {
            let table = build(&names(count));
            let mut parts = vec![0_usize; count];
            for entry in &table.0 {
                parts[*entry as usize] += 1;
            }
            let (least, most) = (parts.iter().min().unwrap(), parts.iter().max().unwrap());
            assert!(most - least <= 1 + least / 50, "{count} endpoints: {least} to {most}");
        }
    }

    #[test]
    fn if_one_leaves_few_others_move() {
        let all = names(20);
        let mut fewer = all.clone();
        fewer.remove(7);
        let (before, after) = (build(&all), build(&fewer));
        let (mut moved, mut stayed) = (0_u32, 0_u32);
        for source in 0..20_000_u64 {
            let source = hash(9, &source.to_be_bytes());
            let name = |table: &Table, names: &[String]| names[table.find(source, |_| true).unwrap()].clone();
            let (then, now) = (name(&before, &all), name(&after, &fewer));
            if then != "api-7" {
                if then == now { stayed += 1 } else { moved += 1 }
            }
        }
        assert!(f64::from(moved) < 0.08 * f64::from(stayed), "{moved} of {stayed} moved");
    }

    #[test]
    fn sources_of_one_that_does_not_fit_spread_and_come_back() {
        let table = build(&names(5));
        let mut others = [0_u32; 5];
        for source in 0..20_000_u64 {
            let source = hash(9, &source.to_be_bytes());
            let home = table.find(source, |_| true).unwrap();
            let meanwhile = table.find(source, |index| index != 2).unwrap();
            if home == 2 { others[meanwhile] += 1 } else { assert_eq!(meanwhile, home) }
        }
        assert!([0, 1, 3, 4].iter().all(|index| others[*index] > 700), "{others:?}");
    }

    #[test]
    fn a_source_is_an_address_and_on_the_loopback_the_instance() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let far = |instance| source(address("10.0.0.1"), instance);
        assert_eq!(far("web-1"), far("web-2"));
        assert_eq!(far("web-1"), source(address("::ffff:10.0.0.1"), "web-1"));
        assert_ne!(far("web-1"), source(address("10.0.0.2"), "web-1"));
        assert_ne!(source(address("127.0.0.1"), "web-1"), source(address("127.0.0.1"), "web-2"));
        assert_ne!(source(address("127.0.0.1"), "web-1"), source(address("127.0.0.2"), "web-1"));
    }

    /// Sidecars of different versions agree.
    #[test]
    fn the_table_is_this_one_for_ever() {
        let table = build(&names(3));
        let found: Vec<_> = (0..12).map(|source| table.find(source * 97, |_| true).unwrap()).collect();
        assert_eq!(found, [0, 2, 0, 2, 0, 2, 2, 2, 2, 2, 1, 2]);
        assert_eq!(source("10.0.0.1".parse().unwrap(), ""), 5_404_023_488_193_983_979);
    }

    proptest! {
        #[test]
        fn what_is_found_fits(count in 0..40_usize, source: u64, out: u64) {
            let fits = |index: usize| out & (1 << index) == 0;
            let found = build(&names(count)).find(source, fits);
            prop_assert!(found.is_none_or(|index| index < count && fits(index)));
            prop_assert!(count == 0 || out != 0 || found.is_some());
        }
    }
}
