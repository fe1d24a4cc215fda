//! Runs of a manifest's entries, each encoded and hashed once.

use super::{ManifestEntry, PAGE_ENTRIES, encode_entries};
use crate::hash::Hash;
use crate::shard::ShardKey;
use std::sync::Arc;
use weft_model::Position;

/// Some entries that follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub(super) entries: Vec<(ShardKey, ManifestEntry)>,
    /// Their canonical bytes.
    pub(super) bytes: Vec<u8>,
    /// Of those.
    pub(super) hash: Hash,
    /// The newest one.
    pub(super) position: Position,
}

impl Page {
    pub(super) fn new(entries: Vec<(ShardKey, ManifestEntry)>) -> Self {
        let bytes = encode_entries(entries.iter().map(|(key, entry)| (key, *entry)));
        let position = entries.iter().map(|(_, entry)| entry.position).max().unwrap_or_default();
        Self { hash: Hash::of(&bytes), bytes, entries, position }
    }

    pub(super) fn get(&self, key: &ShardKey) -> Option<&ManifestEntry> {
        let place = self.entries.binary_search_by(|(known, _)| known.cmp(key)).ok()?;
        Some(&self.entries[place].1)
    }
}

/// The pages of the endpoints of some services. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pages(Arc<[Arc<Page>]>);

impl Pages {
    /// Cuts sorted entries into pages.
    pub(crate) fn new(entries: &[(ShardKey, ManifestEntry)]) -> Self {
        let pages = entries.chunk_by(|(key, _), _| !ends_page(key)).map(|page| Page::new(page.to_vec()));
        Self(pages.map(Arc::new).collect())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Page>> {
        self.0.iter()
    }

    pub(super) fn get(&self, key: &ShardKey) -> Option<&ManifestEntry> {
        self.0.get(self.place(key))?.get(key)
    }

    pub(crate) fn contains(&self, key: &ShardKey) -> bool {
        self.get(key).is_some()
    }

    pub(super) fn position(&self) -> Position {
        self.0.iter().map(|page| page.position).max().unwrap_or_default()
    }

    /// The page that a key is in, if it is there at all.
    fn place(&self, key: &ShardKey) -> usize {
        self.0.partition_point(|page| page.entries.last().is_some_and(|(last, _)| last < key))
    }

    /// The same with other entries for keys that are there; those that are not are left out. Only their pages are made anew.
    pub(crate) fn with<'a>(
        &self,
        changes: impl IntoIterator<Item = (&'a ShardKey, Option<ManifestEntry>)>,
    ) -> Self {
        let mut pages = self.0.to_vec();
        let mut changes = changes.into_iter().peekable();
        while let Some((key, _)) = changes.peek() {
            let place = self.place(key);
            let Some(page) = pages.get_mut(place) else { break };
            let mut entries = page.entries.clone();
            while let Some((key, entry)) = changes.next_if(|(key, _)| self.place(key) == place) {
                let known = entries.binary_search_by(|(known, _)| known.cmp(key));
                if let (Ok(known), Some(entry)) = (known, entry) {
                    entries[known].1 = entry;
                }
            }
            *page = Arc::new(Page::new(entries));
        }
        Self(pages.into())
    }
}

pub(super) const fn is_upstream(key: &ShardKey) -> bool {
    matches!(key, ShardKey::Endpoints(_))
}

/// Whether a page ends with this key. Part of the encoding: every program that hashes manifests must agree.
fn ends_page(key: &ShardKey) -> bool {
    Hash::of(key.to_string().as_bytes()).0[0] < u8::MAX / PAGE_ENTRIES + 1
}
