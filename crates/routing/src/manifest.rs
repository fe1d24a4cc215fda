//! Manifests: the list of shards that makes up a snapshot.
//!
//! A manifest is a list of **pages**, runs of its entries, and its hash is that of their hashes. So a change of one shard
//! encodes and hashes one page again, whatever the manifest lists, and two manifests are compared by pages. Where a page
//! ends is told by the keys alone, neither by the order of changes nor by their batches (I2): after a key whose hash
//! is one of every [`PAGE_ENTRIES`], and after the last upstream. The last page is the sidecar's own: its service's
//! inbound policy and the trust bundle. Those before it are shared by all classes with the same upstreams.
//!
//! The canonical bytes are the entries, sorted; how they are cut into pages follows.

mod difference;
mod pages;

pub use difference::{Changed, Difference};
pub(crate) use pages::Pages;

use crate::hash::Hash;
use crate::shard::ShardKey;
use crate::wire;
use pages::Page;
use prost::Message;
use std::collections::BTreeMap;
use std::sync::Arc;
use weft_model::Position;

/// Most shards in one manifest, hence what a sidecar decodes; twice the services that a mesh may have, to leave room.
pub const SHARDS_MAX: usize = 100_000;

/// Entries of a page, on average: about the root of what a large manifest lists, so that its pages are neither many nor long.
pub const PAGE_ENTRIES: u8 = 32;

/// The shards of a snapshot, each with the hash of its bytes and the last event that touched it. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    upstreams: Pages,
    own: Arc<Page>,
    hash: Hash,
}

/// One shard of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ManifestEntry {
    /// Names the shard's bytes.
    pub hash: Hash,
    /// The last event that touched what the shard is built from.
    pub position: Position,
}

/// Bytes are not a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// They are not the expected protobuf.
    #[error("manifest is not readable")]
    Encoding(#[from] prost::DecodeError),
    /// A key, hash or the order of entries is wrong, or there are too many.
    #[error("manifest entry {0} is malformed")]
    Entry(usize),
    /// It holds more than this version understands, or is not in canonical form.
    #[error("manifest holds something that this version does not understand")]
    NotUnderstood,
}

impl Manifest {
    /// The manifest that lists these shards.
    #[must_use]
    pub fn new(entries: BTreeMap<ShardKey, ManifestEntry>) -> Self {
        // Keys sort by kind, so those of endpoints come first.
        let mut upstreams: Vec<_> = entries.into_iter().collect();
        let own = upstreams.split_off(upstreams.partition_point(|(key, _)| pages::is_upstream(key)));
        Self::of(Pages::new(&upstreams), own)
    }

    pub(crate) fn of(upstreams: Pages, own: Vec<(ShardKey, ManifestEntry)>) -> Self {
        Self::joined(upstreams, Arc::new(Page::new(own)))
    }

    fn joined(upstreams: Pages, own: Arc<Page>) -> Self {
        let hashes = upstreams.iter().chain([&own]).map(|page| page.hash.0.as_slice());
        Self { hash: Hash::of_parts(hashes), upstreams, own }
    }

    /// The same own shards, with other upstreams.
    pub(crate) fn with_upstreams(&self, upstreams: Pages) -> Self {
        Self::joined(upstreams, Arc::clone(&self.own))
    }

    /// The same, but for these entries: changed or new ones, or none where there is to be none any more.
    #[must_use]
    pub fn with(&self, changes: &BTreeMap<ShardKey, Option<ManifestEntry>>) -> Self {
        let is_known = |(key, entry): (&ShardKey, &Option<ManifestEntry>)| {
            entry.is_some() && pages::is_upstream(key) && self.get(key).is_some()
        };
        if changes.iter().all(is_known) {
            return self
                .with_upstreams(self.upstreams.with(changes.iter().map(|(key, entry)| (key, *entry))));
        }
        let mut entries: BTreeMap<_, _> = self.entries().map(|(key, entry)| (key.clone(), *entry)).collect();
        for (key, entry) in changes {
            match entry {
                Some(entry) => entries.insert(key.clone(), *entry),
                None => entries.remove(key),
            };
        }
        Self::new(entries)
    }

    /// Names the content: equal hashes, equal manifests.
    #[must_use]
    pub const fn hash(&self) -> Hash {
        self.hash
    }

    /// Every entry, by key.
    pub fn entries(&self) -> impl Iterator<Item = &(ShardKey, ManifestEntry)> {
        self.pages().flat_map(|page| &page.entries)
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages().map(|page| page.entries.len()).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages().all(|page| page.entries.is_empty())
    }

    /// The entry of a shard.
    #[must_use]
    pub fn get(&self, key: &ShardKey) -> Option<&ManifestEntry> {
        if pages::is_upstream(key) { self.upstreams.get(key) } else { self.own.get(key) }
    }

    /// The shard that is listed at this place, from 0.
    #[must_use]
    pub fn key_at(&self, mut place: usize) -> Option<&ShardKey> {
        for page in self.pages() {
            match page.entries.get(place) {
                Some((key, _)) => return Some(key),
                None => place -= page.entries.len(),
            }
        }
        None
    }

    /// The place at which a shard is listed.
    #[must_use]
    pub fn place(&self, key: &ShardKey) -> Option<usize> {
        let mut before = 0;
        for page in self.pages() {
            match page.entries.binary_search_by(|(known, _)| known.cmp(key)) {
                Ok(place) => return Some(before + place),
                Err(place) if place < page.entries.len() => return None,
                Err(_) => before += page.entries.len(),
            }
        }
        None
    }

    /// The last event that touched anything in it.
    #[must_use]
    pub fn position(&self) -> Position {
        self.upstreams.position().max(self.own.position)
    }

    fn pages(&self) -> impl Iterator<Item = &Arc<Page>> {
        self.upstreams.iter().chain([&self.own])
    }

    /// The canonical bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        // A list of protobuf's is the bytes of its parts, one after the other.
        self.pages().flat_map(|page| page.bytes.iter().copied()).collect()
    }

    /// Reads canonical bytes back.
    ///
    /// # Errors
    /// If they are not what [`Manifest::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest = Self::new(decode_entries(bytes)?);
        if manifest.encode() != bytes {
            return Err(ManifestError::NotUnderstood);
        }
        Ok(manifest)
    }
}

impl Default for Manifest {
    fn default() -> Self {
        Self::new(BTreeMap::new())
    }
}

/// Some entries of a manifest in its encoding, to say what changed in it.
#[must_use]
pub fn encode_entries<'a>(entries: impl IntoIterator<Item = (&'a ShardKey, ManifestEntry)>) -> Vec<u8> {
    let entry = |(key, entry): (&ShardKey, ManifestEntry)| wire::ManifestEntry {
        key: key.to_string(),
        hash: entry.hash.0.to_vec(),
        position: entry.position.0,
    };
    wire::Manifest { entries: entries.into_iter().map(entry).collect() }.encode_to_vec()
}

/// Reads entries back.
///
/// # Errors
/// If they are not sorted, each a shard's key, hash and position, and at most [`SHARDS_MAX`].
pub fn decode_entries(bytes: &[u8]) -> Result<BTreeMap<ShardKey, ManifestEntry>, ManifestError> {
    let wire::Manifest { entries: list } = wire::Manifest::decode(bytes)?;
    let mut entries = BTreeMap::new();
    if list.len() > SHARDS_MAX {
        return Err(ManifestError::Entry(SHARDS_MAX));
    }
    for (index, entry) in list.into_iter().enumerate() {
        let malformed = ManifestError::Entry(index);
        let Ok(key) = entry.key.parse::<ShardKey>() else { return Err(malformed) };
        let Some(hash) = Hash::from_slice(&entry.hash) else { return Err(malformed) };
        if entries.last_key_value().is_some_and(|(last, _)| *last >= key) {
            return Err(malformed);
        }
        entries.insert(key, ManifestEntry { hash, position: Position(entry.position) });
    }
    Ok(entries)
}
