//! Manifests: the list of shards that makes up a snapshot.

use crate::hash::Hash;
use crate::shard::ShardKey;
use crate::wire;
use prost::Message;
use std::collections::BTreeMap;
use weft_model::Position;

/// Most shards in one manifest, hence what a sidecar decodes; twice the services that a mesh may have, to leave room.
pub const SHARDS_MAX: usize = 100_000;

/// The shards of a snapshot, each with the hash of its bytes and the last event that touched it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Sorted by key.
    pub entries: BTreeMap<ShardKey, ManifestEntry>,
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
    /// The canonical bytes, and their hash.
    #[must_use]
    pub fn encode(&self) -> (Vec<u8>, Hash) {
        let entry = |(key, entry): (&ShardKey, &ManifestEntry)| wire::ManifestEntry {
            key: key.to_string(),
            hash: entry.hash.0.to_vec(),
            position: entry.position.0,
        };
        let bytes = wire::Manifest { entries: self.entries.iter().map(entry).collect() }.encode_to_vec();
        let hash = Hash::of(&bytes);
        (bytes, hash)
    }

    /// Reads canonical bytes back.
    ///
    /// # Errors
    /// If they are not what [`Manifest::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
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
        let manifest = Self { entries };
        if manifest.encode().0 != bytes {
            return Err(ManifestError::NotUnderstood);
        }
        Ok(manifest)
    }

    /// The last event that touched anything in it.
    #[must_use]
    pub fn position(&self) -> Position {
        self.entries.values().map(|entry| entry.position).max().unwrap_or_default()
    }
}
