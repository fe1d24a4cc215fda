//! What is different in a manifest since another one. Costs what is different, and a look at each page's hash.

use super::{Manifest, ManifestEntry, Page};
use crate::hash::Hash;
use crate::shard::ShardKey;
use std::collections::BTreeSet;
use std::sync::Arc;

/// An entry that is new, or not as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed<'a> {
    /// The shard.
    pub key: &'a ShardKey,
    /// What is listed now.
    pub entry: ManifestEntry,
    /// What was listed before, if anything.
    pub before: Option<ManifestEntry>,
}

/// What turns one manifest into another; all of it sorted by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference<'a> {
    /// Entries that are new or changed.
    pub changed: Vec<Changed<'a>>,
    /// Keys that are not listed any more.
    pub removed: Vec<&'a ShardKey>,
}

impl Manifest {
    /// What is different since `former`.
    #[must_use]
    pub fn since<'a>(&'a self, former: &'a Self) -> Difference<'a> {
        if self.hash() == former.hash() {
            return Difference::default();
        }
        let (new, old) = (hashes(self), hashes(former));
        let mut before = unshared(former, &new).peekable();
        let mut difference = Difference::default();
        for (key, entry) in unshared(self, &old) {
            while let Some((gone, _)) = before.next_if(|(old, _)| old < key) {
                difference.removed.push(gone);
            }
            let before = before.next_if(|(old, _)| old == key).map(|(_, entry)| *entry);
            if before != Some(*entry) {
                difference.changed.push(Changed { key, entry: *entry, before });
            }
        }
        difference.removed.extend(before.map(|(gone, _)| gone));
        difference
    }
}

impl Manifest {
    /// How many of its pages another one does not have: what had to be encoded and hashed to get here from there.
    #[must_use]
    pub fn pages_not_in(&self, other: &Self) -> usize {
        let known = hashes(other);
        self.pages().filter(|page| !known.contains(&page.hash)).count()
    }
}

fn hashes(manifest: &Manifest) -> BTreeSet<Hash> {
    manifest.pages().map(|page| page.hash).collect()
}

fn unshared<'a>(
    manifest: &'a Manifest,
    other: &BTreeSet<Hash>,
) -> impl Iterator<Item = &'a (ShardKey, ManifestEntry)> {
    let is_own = |page: &&Arc<Page>| !other.contains(&page.hash);
    manifest.pages().filter(is_own).flat_map(|page| &page.entries)
}
