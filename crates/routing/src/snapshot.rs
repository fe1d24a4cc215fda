//! Snapshots: a manifest and every shard that it lists, decoded and checked. What a sidecar runs.

use crate::hash::Hash;
use crate::manifest::{Manifest, ManifestError};
use crate::shard::{EndpointsShard, InboundShard, ShardError, ShardKey, TrustShard};
use std::collections::BTreeMap;
use std::sync::Arc;
use weft_model::{ConfigVersion, Position, ServiceName};

/// Longest canonical form of one shard. A service of 100,000 endpoints has about 8 MiB.
pub const SHARD_BYTES_MAX: usize = 16 << 20;

/// A whole configuration at one version: either all of it holds, or none (I3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The version.
    pub version: ConfigVersion,
    /// The manifest's hash; equal hashes, equal content.
    pub manifest_hash: Hash,
    /// The manifest.
    pub manifest: Manifest,
    /// The services that may be connected to.
    pub endpoints: BTreeMap<ServiceName, Arc<EndpointsShard>>,
    /// Who may connect here.
    pub inbound: Arc<InboundShard>,
    /// Whom to believe.
    pub trust: Arc<TrustShard>,
    /// Every shard's canonical bytes, to build the next snapshot from and to keep on disk.
    pub shards: BTreeMap<Hash, Arc<[u8]>>,
}

/// Bytes do not make a whole snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The manifest's bytes do not have the announced hash.
    #[error("manifest does not have the announced hash")]
    ManifestHash,
    /// The manifest does not decode.
    #[error("manifest is malformed")]
    Manifest(#[from] ManifestError),
    /// The version is older than an event in the manifest.
    #[error("snapshot claims version {claimed}, but holds an event of position {held}")]
    Version {
        /// What it claims.
        claimed: ConfigVersion,
        /// The newest position in it.
        held: u64,
    },
    /// A listed shard is not there.
    #[error("shard {0} is missing")]
    Missing(ShardKey),
    /// A shard's bytes do not decode.
    #[error("shard {key} is malformed")]
    Shard {
        /// Which.
        key: ShardKey,
        /// Why.
        #[source]
        source: ShardError,
    },
    /// A shard says that it is another one.
    #[error("shard {0} holds another one's content")]
    Misplaced(ShardKey),
    /// The manifest lists no inbound policy, more than one, or no trust bundle.
    #[error("snapshot has no {0}")]
    Incomplete(&'static str),
}

impl Snapshot {
    /// Puts a snapshot together. `shards` may hold more than the manifest lists; what it lists is looked up by hash, and
    /// only bytes that have that hash are taken.
    ///
    /// # Errors
    /// If anything is missing, malformed, or not what the manifest says.
    pub fn assemble(
        version: ConfigVersion,
        manifest_hash: Hash,
        manifest_bytes: &[u8],
        shards: &BTreeMap<Hash, Arc<[u8]>>,
    ) -> Result<Self, SnapshotError> {
        Self::build(None, version, manifest_hash, manifest_bytes, shards)
    }

    /// The same, of what this snapshot lacks: shards that it holds already are neither looked for nor decoded again, so that a
    /// change costs what it changes.
    ///
    /// # Errors
    /// As [`assemble`](Self::assemble).
    pub fn assemble_next(
        &self,
        version: ConfigVersion,
        manifest_hash: Hash,
        manifest_bytes: &[u8],
        shards: &BTreeMap<Hash, Arc<[u8]>>,
    ) -> Result<Self, SnapshotError> {
        Self::build(Some(self), version, manifest_hash, manifest_bytes, shards)
    }

    fn build(
        previous: Option<&Self>,
        version: ConfigVersion,
        manifest_hash: Hash,
        manifest_bytes: &[u8],
        shards: &BTreeMap<Hash, Arc<[u8]>>,
    ) -> Result<Self, SnapshotError> {
        if Hash::of(manifest_bytes) != manifest_hash {
            return Err(SnapshotError::ManifestHash);
        }
        let manifest = Manifest::decode(manifest_bytes)?;
        if manifest.position() > version.position {
            return Err(SnapshotError::Version { claimed: version, held: manifest.position().0 });
        }
        let mut endpoints = BTreeMap::new();
        let mut inbound = None;
        let mut trust = None;
        let mut kept = BTreeMap::new();
        for (key, entry) in &manifest.entries {
            let held = previous.and_then(|previous| previous.held(key, entry.hash));
            let (bytes, shard) = match held {
                Some(held) => held,
                None => decode(key, entry.hash, shards)?,
            };
            match (key, shard) {
                (ShardKey::Endpoints(service), Decoded::Endpoints(shard)) if shard.service == *service => {
                    endpoints.insert(service.clone(), shard);
                }
                (ShardKey::Inbound(service), Decoded::Inbound(shard))
                    if shard.service == *service && inbound.is_none() =>
                {
                    inbound = Some(shard);
                }
                (ShardKey::Trust, Decoded::Trust(shard)) => trust = Some(shard),
                _ => return Err(SnapshotError::Misplaced(key.clone())),
            }
            kept.insert(entry.hash, bytes);
        }
        Ok(Self {
            version,
            manifest_hash,
            manifest,
            endpoints,
            inbound: inbound.ok_or(SnapshotError::Incomplete("inbound policy"))?,
            trust: trust.ok_or(SnapshotError::Incomplete("trust bundle"))?,
            shards: kept,
        })
    }

    /// The snapshot after some of its shards changed: each with the last event that touched it and its new bytes, or none
    /// if only its position moved. The manifest follows, and must have the announced hash.
    ///
    /// # Errors
    /// As [`assemble`](Self::assemble); also if a shard is not in this snapshot.
    pub fn patched(
        &self,
        version: ConfigVersion,
        manifest_hash: Hash,
        changes: impl IntoIterator<Item = (ShardKey, Position, Option<Arc<[u8]>>)>,
    ) -> Result<Self, SnapshotError> {
        let (mut manifest, mut shards) = (self.manifest.clone(), BTreeMap::new());
        for (key, position, bytes) in changes {
            let Some(entry) = manifest.entries.get_mut(&key) else { return Err(SnapshotError::Missing(key)) };
            entry.position = position;
            if let Some(bytes) = bytes {
                entry.hash = Hash::of(&bytes);
                shards.insert(entry.hash, bytes);
            }
        }
        self.assemble_next(version, manifest_hash, &manifest.encode().0, &shards)
    }

    /// A shard of this hash that is here under this key, with its bytes.
    fn held(&self, key: &ShardKey, hash: Hash) -> Option<(Arc<[u8]>, Decoded)> {
        let bytes = self.manifest.entries.get(key).filter(|entry| entry.hash == hash)?;
        let bytes = Arc::clone(self.shards.get(&bytes.hash)?);
        let decoded = match key {
            ShardKey::Endpoints(service) => Decoded::Endpoints(Arc::clone(self.endpoints.get(service)?)),
            ShardKey::Inbound(_) => Decoded::Inbound(Arc::clone(&self.inbound)),
            ShardKey::Trust => Decoded::Trust(Arc::clone(&self.trust)),
        };
        Some((bytes, decoded))
    }

    /// A shard's canonical bytes.
    #[must_use]
    pub fn shard(&self, key: &ShardKey) -> Option<&Arc<[u8]>> {
        self.shards.get(&self.manifest.entries.get(key)?.hash)
    }

    /// The manifest's canonical bytes.
    #[must_use]
    pub fn manifest_bytes(&self) -> Vec<u8> {
        self.manifest.encode().0
    }
}

enum Decoded {
    Endpoints(Arc<EndpointsShard>),
    Inbound(Arc<InboundShard>),
    Trust(Arc<TrustShard>),
}

/// Finds and decodes a shard.
fn decode(
    key: &ShardKey,
    hash: Hash,
    shards: &BTreeMap<Hash, Arc<[u8]>>,
) -> Result<(Arc<[u8]>, Decoded), SnapshotError> {
    let bytes = shards.get(&hash).filter(|bytes| Hash::of(bytes) == hash);
    let bytes = bytes.ok_or_else(|| SnapshotError::Missing(key.clone()))?;
    let decoded = match key {
        ShardKey::Endpoints(_) => EndpointsShard::decode(bytes).map(Arc::new).map(Decoded::Endpoints),
        ShardKey::Inbound(_) => InboundShard::decode(bytes).map(Arc::new).map(Decoded::Inbound),
        ShardKey::Trust => TrustShard::decode(bytes).map(Arc::new).map(Decoded::Trust),
    };
    let malformed = |source| SnapshotError::Shard { key: key.clone(), source };
    Ok((Arc::clone(bytes), decoded.map_err(malformed)?))
}
