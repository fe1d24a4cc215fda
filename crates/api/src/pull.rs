//! What a pull answers: the difference between what a sidecar has and what it should run. Pure: it looks at what is
//! published. The [`discovery`](crate::discovery) service and the simulation of the control plane ask it.

use std::collections::BTreeSet;
use weft_model::{ConfigVersion, InstanceId};
use weft_projector::{Patch, Published, PublishedShard, ShardChange, ShardPatch};
use weft_proto::v1 as pb;
use weft_routing::manifest::{Changed, encode_entries};
use weft_routing::{Hash, Manifest, ShardKey, Splice};

use crate::convert::config_version;
use crate::status::ApiError;

/// What is to be sent, taken from one moment; bytes are shared, not copied.
#[derive(Debug)]
pub struct Plan {
    version: ConfigVersion,
    newest: Manifest,
    pub(crate) against: Against,
    /// For a former manifest: the entries that changed, encoded, and the shards that are gone.
    listed: (Vec<u8>, Vec<String>),
    shards: Vec<(ShardKey, PublishedShard)>,
}

/// What an answer is a difference to.
#[derive(Debug)]
pub(crate) enum Against {
    /// A former manifest.
    Known(Manifest),
    /// A manifest that is not known here: the caller is to tell what it holds.
    Unknown,
    /// What the caller told that it holds.
    Held,
    /// Nothing; it gets everything.
    Nothing,
}

impl Against {
    /// For the metric of pulls.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Known(_) => "difference",
            Self::Unknown => "unknown",
            Self::Held => "held",
            Self::Nothing => "full",
        }
    }

    /// Whether the answer lists the whole manifest, and may be large.
    pub(crate) const fn is_whole(&self) -> bool {
        matches!(self, Self::Held | Self::Nothing)
    }
}

/// What a sidecar needs that has `have`. If that is not known here, `held` counts: first bytes of the hashes of the shards that
/// it holds. Should two shards ever agree in these, the sidecar finds that one is missing, and pulls everything.
///
/// # Errors
/// If it does not take part; if it has something newer than is published here, since it is to get nothing older (I4).
pub fn plan(
    published: &Published,
    instance: &InstanceId,
    have: Option<(ConfigVersion, Hash)>,
    held: &[u32],
) -> Result<Plan, ApiError> {
    let wanted = published.wanted(instance).ok_or_else(|| not_registered(instance))?;
    if have.is_some_and(|(version, _)| version > wanted.version) {
        return Err(ApiError::Unavailable("this controller is behind what you run; try again".into()));
    }
    let newest = wanted.class.manifest.clone();
    let against = match have.map(|(_, hash)| wanted.class.manifest_with(hash)) {
        Some(Some(known)) => Against::Known(known.clone()),
        Some(None) if held.is_empty() => Against::Unknown,
        Some(None) => Against::Held,
        None => Against::Nothing,
    };
    let nothing = Manifest::default();
    let (before, held): (_, BTreeSet<u32>) = match &against {
        Against::Known(known) => (known, BTreeSet::new()),
        Against::Unknown => (&newest, BTreeSet::new()),
        Against::Held => (&nothing, held.iter().copied().collect()),
        Against::Nothing => (&nothing, BTreeSet::new()),
    };
    let difference = newest.since(before);
    let listed = if let Against::Known(_) = against {
        let entries = difference.changed.iter().map(|changed| (changed.key, changed.entry));
        (encode_entries(entries), difference.removed.iter().map(ToString::to_string).collect())
    } else {
        Default::default()
    };
    let mut shards = Vec::new();
    for Changed { key, entry, before } in difference.changed {
        if before.is_some_and(|before| before.hash == entry.hash) || held.contains(&entry.hash.prefix()) {
            continue;
        }
        let shard = published.shard(key, entry.hash);
        let shard = shard.ok_or_else(|| ApiError::Internal(format!("shard {key} is not published")))?;
        shards.push((key.clone(), shard.clone()));
    }
    Ok(Plan { version: wanted.version, newest, against, listed, shards })
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
        let (manifest, removed) = match &self.against {
            Against::Known(_) | Against::Unknown => self.listed,
            Against::Held | Against::Nothing => (self.newest.encode(), Vec::new()),
        };
        Ok(pb::PullResponse {
            header: Some(header(self.version, self.newest.hash())),
            full: self.against.is_whole(),
            manifest: manifest.into(),
            shards: self.shards.into_iter().map(shard).collect::<Result<_, ApiError>>()?,
            removed,
            held_wanted: matches!(self.against, Against::Unknown),
        })
    }
}

/// A patch that leads to `wanted`, in the words of the wire.
pub(crate) fn patch(patch: &Patch, wanted: ConfigVersion) -> pb::Patch {
    // Places and lengths are bounded by what a manifest and a shard may have.
    let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    let shard = |shard: &ShardPatch| {
        let mut told = pb::ShardPatch {
            place: number(shard.place),
            before: wanted.position.0.saturating_sub(shard.position.0),
            ..pb::ShardPatch::default()
        };
        match &shard.change {
            Some(ShardChange::Splice(splice)) => {
                let Splice { at, cut, put } = &**splice;
                told.splice =
                    Some(pb::Splice { at: number(*at), cut: number(*cut), put: put.clone().into() });
            }
            Some(ShardChange::Delta { zstd, length }) => {
                (told.delta_zstd, told.length) = (zstd.clone(), number(*length));
            }
            None => {}
        }
        told
    };
    pb::Patch { base: patch.base.prefix(), shards: patch.shards.iter().map(shard).collect() }
}

/// A header whose hash is only how it begins.
pub(crate) fn short_header(version: ConfigVersion, hash: Hash) -> pb::SnapshotHeader {
    let manifest_hash = hash.start().bytes().to_vec().into();
    pb::SnapshotHeader { version: Some(config_version(version)), manifest_hash }
}

pub(crate) fn header(version: ConfigVersion, hash: Hash) -> pb::SnapshotHeader {
    pb::SnapshotHeader { version: Some(config_version(version)), manifest_hash: hash.0.to_vec().into() }
}
