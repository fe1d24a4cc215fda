//! Snapshots: a manifest and every shard that it lists, decoded and checked. What a sidecar runs.

use crate::hash::{Hash, HashStart};
use crate::manifest::{Manifest, ManifestEntry, ManifestError};
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
    pub shards: BTreeMap<ShardKey, Arc<[u8]>>,
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
        let manifest = Manifest::decode(manifest_bytes)?;
        is_announced(&manifest, version, |hash| hash == manifest_hash)?;
        let mut parts = Parts::default();
        for (key, entry) in manifest.entries() {
            parts.put(key, decode(key, entry.hash, shards)?)?;
        }
        parts.into_snapshot(version, manifest)
    }

    /// The snapshot after these entries of its manifest changed, with the shards that it lacks: a change costs what it changes.
    /// The manifest follows, and must have the announced hash.
    ///
    /// # Errors
    /// As [`assemble`](Self::assemble).
    pub fn next(
        &self,
        version: ConfigVersion,
        manifest_hash: Hash,
        changes: &BTreeMap<ShardKey, Option<ManifestEntry>>,
        shards: &BTreeMap<Hash, Arc<[u8]>>,
    ) -> Result<Self, SnapshotError> {
        let manifest = self.manifest.with(changes);
        is_announced(&manifest, version, |hash| hash == manifest_hash)?;
        self.succeeded(version, manifest, changes, shards)
    }

    fn succeeded(
        &self,
        version: ConfigVersion,
        manifest: Manifest,
        changes: &BTreeMap<ShardKey, Option<ManifestEntry>>,
        shards: &BTreeMap<Hash, Arc<[u8]>>,
    ) -> Result<Self, SnapshotError> {
        let mut parts = Parts {
            endpoints: self.endpoints.clone(),
            inbound: Some(Arc::clone(&self.inbound)),
            trust: Some(Arc::clone(&self.trust)),
            shards: self.shards.clone(),
        };
        for (key, change) in changes {
            let held = self.manifest.get(key).map(|entry| entry.hash);
            match change {
                Some(entry) if Some(entry.hash) == held => {}
                Some(entry) => {
                    let decoded = decode(key, entry.hash, shards)?;
                    parts.remove(key);
                    parts.put(key, decoded)?;
                }
                None => parts.remove(key),
            }
        }
        parts.into_snapshot(version, manifest)
    }

    /// The snapshot after some of its shards changed: each with the last event that touched it and its new bytes, or none
    /// if only its position moved. The manifest follows, and its hash must begin as announced.
    ///
    /// # Errors
    /// As [`assemble`](Self::assemble); also if a shard is not in this snapshot.
    pub fn patched(
        &self,
        version: ConfigVersion,
        announced: HashStart,
        changes: impl IntoIterator<Item = (ShardKey, Position, Option<Arc<[u8]>>)>,
    ) -> Result<Self, SnapshotError> {
        let (mut entries, mut shards) = (BTreeMap::new(), BTreeMap::new());
        for (key, position, bytes) in changes {
            let Some(entry) = self.manifest.get(&key) else { return Err(SnapshotError::Missing(key)) };
            let mut entry = ManifestEntry { position, ..*entry };
            if let Some(bytes) = bytes {
                entry.hash = Hash::of(&bytes);
                shards.insert(entry.hash, bytes);
            }
            entries.insert(key, Some(entry));
        }
        let manifest = self.manifest.with(&entries);
        is_announced(&manifest, version, |hash| hash.start() == announced)?;
        self.succeeded(version, manifest, &entries, &shards)
    }

    /// A shard's canonical bytes.
    #[must_use]
    pub fn shard(&self, key: &ShardKey) -> Option<&Arc<[u8]>> {
        self.shards.get(key)
    }

    /// The manifest's canonical bytes.
    #[must_use]
    pub fn manifest_bytes(&self) -> Vec<u8> {
        self.manifest.encode()
    }
}

/// A snapshot in the making.
#[derive(Default)]
struct Parts {
    endpoints: BTreeMap<ServiceName, Arc<EndpointsShard>>,
    inbound: Option<Arc<InboundShard>>,
    trust: Option<Arc<TrustShard>>,
    shards: BTreeMap<ShardKey, Arc<[u8]>>,
}

impl Parts {
    fn put(&mut self, key: &ShardKey, (bytes, shard): (Arc<[u8]>, Decoded)) -> Result<(), SnapshotError> {
        match (key, shard) {
            (ShardKey::Endpoints(service), Decoded::Endpoints(shard)) if shard.service == *service => {
                self.endpoints.insert(service.clone(), shard);
            }
            (ShardKey::Inbound(service), Decoded::Inbound(shard))
                if shard.service == *service && self.inbound.is_none() =>
            {
                self.inbound = Some(shard);
            }
            (ShardKey::Trust, Decoded::Trust(shard)) => self.trust = Some(shard),
            _ => return Err(SnapshotError::Misplaced(key.clone())),
        }
        self.shards.insert(key.clone(), bytes);
        Ok(())
    }

    fn remove(&mut self, key: &ShardKey) {
        if self.shards.remove(key).is_none() {
            return;
        }
        match key {
            ShardKey::Endpoints(service) => {
                self.endpoints.remove(service);
            }
            ShardKey::Inbound(_) => self.inbound = None,
            ShardKey::Trust => self.trust = None,
        }
    }

    fn into_snapshot(self, version: ConfigVersion, manifest: Manifest) -> Result<Snapshot, SnapshotError> {
        Ok(Snapshot {
            version,
            manifest_hash: manifest.hash(),
            manifest,
            endpoints: self.endpoints,
            inbound: self.inbound.ok_or(SnapshotError::Incomplete("inbound policy"))?,
            trust: self.trust.ok_or(SnapshotError::Incomplete("trust bundle"))?,
            shards: self.shards,
        })
    }
}

/// Whether a manifest is the one that was announced, with nothing newer in it than was announced.
fn is_announced(
    manifest: &Manifest,
    version: ConfigVersion,
    is_meant: impl FnOnce(Hash) -> bool,
) -> Result<(), SnapshotError> {
    if !is_meant(manifest.hash()) {
        return Err(SnapshotError::ManifestHash);
    }
    if manifest.position() > version.position {
        return Err(SnapshotError::Version { claimed: version, held: manifest.position().0 });
    }
    Ok(())
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
