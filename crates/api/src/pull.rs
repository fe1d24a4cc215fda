//! What a pull answers: the difference between what a sidecar has and what it should run.

use std::collections::BTreeSet;
use weft_model::{ConfigVersion, InstanceId};
use weft_projector::{Patch, PublishedShard, ShardPatch, View};
use weft_proto::v1 as pb;
use weft_routing::{Hash, ShardKey};

use crate::convert::config_version;
use crate::status::ApiError;

/// What is to be sent, taken from one moment; bytes are shared, not copied.
pub(crate) struct Plan {
    pub(crate) version: ConfigVersion,
    hash: Hash,
    manifest: bytes::Bytes,
    /// The caller's manifest is not known any more: it gets everything.
    pub(crate) full: bool,
    shards: Vec<(ShardKey, PublishedShard)>,
}

/// What a sidecar needs that has `have`; none if it does not take part.
pub(crate) fn plan(view: &View, instance: &InstanceId, have: Option<Hash>) -> Result<Option<Plan>, ApiError> {
    view.published(|published| {
        let Some(wanted) = published.wanted(instance) else { return Ok(None) };
        let class = wanted.class;
        let known = have.and_then(|hash| class.manifest_with(hash));
        let held: BTreeSet<Hash> =
            known.iter().flat_map(|manifest| manifest.entries.values()).map(|entry| entry.hash).collect();
        let mut shards = Vec::new();
        for (key, entry) in class.manifest.entries.iter().filter(|(_, entry)| !held.contains(&entry.hash)) {
            let shard = published.shard(key).filter(|shard| shard.built.hash == entry.hash);
            let shard = shard.ok_or_else(|| ApiError::Internal(format!("shard {key} is not published")))?;
            shards.push((key.clone(), shard.clone()));
        }
        let (version, hash, manifest) = (wanted.version, class.hash, class.bytes.clone());
        Ok(Some(Plan { version, hash, manifest, full: known.is_none(), shards }))
    })
}

impl Plan {
    /// The answer. Compresses what nobody asked for before.
    pub(crate) fn into_response(self) -> Result<pb::PullResponse, ApiError> {
        let shard = |(key, shard): (ShardKey, PublishedShard)| {
            let body_zstd = shard.compressed().map_err(|error| ApiError::Internal(error.to_string()))?;
            let length = u32::try_from(shard.built.bytes.len());
            let length = length.map_err(|_| ApiError::Internal(format!("shard {key} is too large")))?;
            Ok(pb::Shard { key: key.to_string(), body_zstd, length })
        };
        Ok(pb::PullResponse {
            header: Some(header(self.version, self.hash)),
            full: self.full,
            manifest: self.manifest,
            shards: self.shards.into_iter().map(shard).collect::<Result<_, ApiError>>()?,
        })
    }
}

/// A patch in the words of the wire.
pub(crate) fn patch(patch: &Patch) -> pb::Patch {
    let shard = |shard: &ShardPatch| pb::ShardPatch {
        key: shard.key.to_string(),
        position: shard.position.0,
        delta_zstd: shard.delta.clone(),
        // Bounded by what a shard may have.
        length: u32::try_from(shard.length).unwrap_or(u32::MAX),
    };
    pb::Patch { base: patch.base.prefix(), shards: patch.shards.iter().map(shard).collect() }
}

pub(crate) fn header(version: ConfigVersion, hash: Hash) -> pb::SnapshotHeader {
    pb::SnapshotHeader { version: Some(config_version(version)), manifest_hash: hash.0.to_vec().into() }
}
