//! What a pull answers: the difference between what a sidecar has and what it should run. Pure: it looks at what is
//! published. The [`discovery`](crate::discovery) service and the simulation of the control plane ask it.

use weft_model::{ConfigVersion, InstanceId};
use weft_projector::{Patch, Published, PublishedShard, ShardPatch};
use weft_proto::v1 as pb;
use weft_routing::manifest::{Changed, encode_entries};
use weft_routing::{Hash, Manifest, ShardKey};

use crate::convert::config_version;
use crate::status::ApiError;

/// What is to be sent, taken from one moment; bytes are shared, not copied.
#[derive(Debug)]
pub struct Plan {
    version: ConfigVersion,
    /// The newest manifest, and the one that the caller has.
    newest: Manifest,
    known: Option<Manifest>,
    /// The caller's manifest is not known any more: it gets everything.
    pub(crate) full: bool,
    shards: Vec<(ShardKey, PublishedShard)>,
}

/// What a sidecar needs that has `have`.
///
/// # Errors
/// If it does not take part; if it has something newer than is published here, since it is to get nothing older (I4).
pub fn plan(
    published: &Published,
    instance: &InstanceId,
    have: Option<(ConfigVersion, Hash)>,
) -> Result<Plan, ApiError> {
    let wanted = published.wanted(instance).ok_or_else(|| not_registered(instance))?;
    if have.is_some_and(|(version, _)| version > wanted.version) {
        return Err(ApiError::Unavailable("this controller is behind what you run; try again".into()));
    }
    let newest = wanted.class.manifest.clone();
    let known = have.and_then(|(_, hash)| wanted.class.manifest_with(hash)).cloned();
    let nothing = Manifest::default();
    let mut shards = Vec::new();
    for Changed { key, entry, before } in newest.since(known.as_ref().unwrap_or(&nothing)).changed {
        if before.is_some_and(|before| before.hash == entry.hash) {
            continue;
        }
        let shard = published.shard(key).filter(|shard| shard.built.hash == entry.hash);
        let shard = shard.ok_or_else(|| ApiError::Internal(format!("shard {key} is not published")))?;
        shards.push((key.clone(), shard.clone()));
    }
    Ok(Plan { version: wanted.version, full: known.is_none(), newest, known, shards })
}

/// Whether what a sidecar runs is beyond all that the log has, which ends at `head`: then the log lost its end.
#[must_use]
pub fn is_beyond(have: ConfigVersion, head: ConfigVersion) -> bool {
    have > head
}

pub(crate) fn not_registered(instance: &InstanceId) -> ApiError {
    ApiError::NotFound(format!("{instance} is not registered; register it, then pull again"))
}

impl Plan {
    /// The answer. Compresses what nobody asked for before.
    ///
    /// # Errors
    /// If the compressor fails, or a shard is longer than one may be.
    pub fn into_response(self) -> Result<pb::PullResponse, ApiError> {
        let shard = |(key, shard): (ShardKey, PublishedShard)| {
            let body_zstd = shard.compressed().map_err(|error| ApiError::Internal(error.to_string()))?;
            let length = u32::try_from(shard.built.bytes.len());
            let length = length.map_err(|_| ApiError::Internal(format!("shard {key} is too large")))?;
            Ok(pb::Shard { key: key.to_string(), body_zstd, length })
        };
        let (manifest, removed) = match &self.known {
            Some(known) => {
                let difference = self.newest.since(known);
                let entries = difference.changed.iter().map(|changed| (changed.key, changed.entry));
                (encode_entries(entries), difference.removed.iter().map(ToString::to_string).collect())
            }
            None => (self.newest.encode(), Vec::new()),
        };
        Ok(pb::PullResponse {
            header: Some(header(self.version, self.newest.hash())),
            full: self.full,
            manifest: manifest.into(),
            shards: self.shards.into_iter().map(shard).collect::<Result<_, ApiError>>()?,
            removed,
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
