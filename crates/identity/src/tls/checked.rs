//! Leaves that one of the roots in use has been found to have signed. A peer that comes again shows the same leaf, and what a
//! signature over it is worth does not change while the roots are the same: a credential with other roots starts with none.

use crate::certificate::PeerIdentity;
use crate::fingerprint::Fingerprint;
use rustls_pki_types::UnixTime;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Leaves that are remembered, at the least, and half of what there are at most: the sidecars of one controller. Some 1.5 MiB then;
/// a sidecar knows its peers only.
const REMEMBERED: usize = 16_384;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Checked {
    known: Mutex<Known>,
}

/// Those that were seen lately, and those before; when there are enough of the first, the second are forgotten.
#[derive(Debug, Default)]
struct Known {
    newer: BTreeMap<Fingerprint, Validity>,
    older: BTreeMap<Fingerprint, Validity>,
}

/// From when until when a leaf is valid, both included; in seconds, as certificates have it.
type Validity = (u64, u64);

impl Checked {
    /// Whether this leaf was checked, and is valid at `now`.
    pub(super) fn holds(&self, leaf: Fingerprint, now: UnixTime) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let validity = known.newer.get(&leaf).copied().or_else(|| {
            let validity = known.older.remove(&leaf)?;
            known.remember(leaf, validity);
            Some(validity)
        });
        drop(known);
        validity.is_some_and(|(from, until)| (from..=until).contains(&now.as_secs()))
    }

    /// This leaf is checked: a root signed it.
    pub(super) fn add(&self, leaf: Fingerprint, identity: &PeerIdentity) {
        let seconds = |time: weft_model::Timestamp| u64::try_from(time.0).unwrap_or_default() / 1_000;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.remember(leaf, (seconds(identity.not_before), seconds(identity.not_after)));
    }
}

impl Known {
    fn remember(&mut self, leaf: Fingerprint, validity: Validity) {
        if self.newer.len() >= REMEMBERED {
            self.older = std::mem::take(&mut self.newer);
        }
        self.newer.insert(leaf, validity);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{API, NOW, authority, credential};
    use std::time::Duration;

    fn at(seconds: i64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds.cast_unsigned()))
    }

    #[test]
    fn a_leaf_holds_while_it_is_valid() {
        let api = credential(&authority(), API);
        let (leaf, identity) = (Fingerprint::of_certificate(api.leaf()), api.identity());
        let (from, until) = (identity.not_before.0 / 1_000, identity.not_after.0 / 1_000);
        let checked = Checked::default();
        assert!(!checked.holds(leaf, at(NOW.0 / 1_000)));
        checked.add(leaf, identity);
        for (time, holds) in [(from - 1, false), (from, true), (until, true), (until + 1, false)] {
            assert_eq!(checked.holds(leaf, at(time)), holds, "{time}");
        }
    }

    #[test]
    fn what_is_remembered_is_bounded_and_who_comes_again_stays() {
        let identity = credential(&authority(), API).identity().clone();
        let checked = Checked::default();
        let leaf = |number: usize| Fingerprint::of_public_key(&number.to_le_bytes());
        let now = at(NOW.0 / 1_000);
        for number in 0..5 * REMEMBERED {
            checked.add(leaf(number), &identity);
            assert!(checked.holds(leaf(0), now), "{number}");
        }
        let known = checked.known.lock().unwrap();
        assert!(known.newer.len() <= REMEMBERED && known.older.len() <= REMEMBERED);
        drop(known);
        assert!(!checked.holds(leaf(1), now));
    }
}
