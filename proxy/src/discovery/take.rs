//! From what was pulled to a snapshot. What is not newer, not whole, not what its hashes say, or not for this instance
//! is refused, and the one in use stays (I3, I4).

use std::collections::BTreeMap;
use std::sync::Arc;
use weft_model::{ConfigVersion, Epoch, InstanceId, Position, TrustDomain};
use weft_proto::v1;
use weft_routing::snapshot::{SHARD_BYTES_MAX, SnapshotError};
use weft_routing::{Hash, Snapshot};

/// A snapshot that was pulled is not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("version {offered} is not newer than {current}")]
    NotNewer { offered: ConfigVersion, current: ConfigVersion },
    #[error("answer names no snapshot")]
    Header,
    #[error("shard {key} is longer than it may be")]
    TooLong { key: String },
    #[error("shard {key} does not decompress")]
    Compression {
        key: String,
        #[source]
        source: std::io::Error,
    },
    #[error("snapshot does not hold together")]
    Snapshot(#[from] SnapshotError),
    #[error("snapshot is for {0}")]
    Service(String),
    #[error("snapshot is of trust domain {0}")]
    TrustDomain(TrustDomain),
    #[error("snapshot is of another mesh of the same name")]
    Authority,
}

/// A version as the wire has it.
pub(crate) fn version(version: &v1::ConfigVersion) -> ConfigVersion {
    ConfigVersion::new(Epoch(version.epoch), Position(version.position))
}

/// Names a snapshot to a controller.
pub(crate) fn header(snapshot: &Snapshot) -> v1::SnapshotHeader {
    v1::SnapshotHeader {
        version: Some(v1::ConfigVersion {
            epoch: snapshot.version.epoch.0,
            position: snapshot.version.position.0,
        }),
        manifest_hash: snapshot.manifest_hash.0.to_vec().into(),
    }
}

/// Puts together what was pulled and what is there. None if it is the snapshot in use.
///
/// # Errors
/// If it is not to be used.
pub(crate) fn take(
    pulled: &v1::PullResponse,
    current: Option<&Snapshot>,
    own: &InstanceId,
    trust_domain: &TrustDomain,
) -> Result<Option<Snapshot>, Refusal> {
    let header = pulled.header.as_ref().ok_or(Refusal::Header)?;
    let offered = header.version.as_ref().map(version).ok_or(Refusal::Header)?;
    let manifest_hash = Hash::from_slice(&header.manifest_hash).ok_or(Refusal::Header)?;
    if let Some(current) = current {
        if offered == current.version && manifest_hash == current.manifest_hash {
            return Ok(None);
        }
        if offered <= current.version {
            return Err(Refusal::NotNewer { offered, current: current.version });
        }
    }
    let mut shards: BTreeMap<Hash, Arc<[u8]>> = match current {
        Some(current) if !pulled.full => current.shards.clone(),
        Some(_) | None => BTreeMap::new(),
    };
    for shard in &pulled.shards {
        let bytes = decompress(shard)?;
        shards.insert(Hash::of(&bytes), bytes);
    }
    let snapshot = Snapshot::assemble(offered, manifest_hash, &pulled.manifest, &shards)?;
    belongs(&snapshot, own, trust_domain)?;
    Ok(Some(snapshot))
}

/// Whether a snapshot is for this instance's service and of its mesh.
pub(crate) fn belongs(
    snapshot: &Snapshot,
    own: &InstanceId,
    trust_domain: &TrustDomain,
) -> Result<(), Refusal> {
    if snapshot.inbound.service != own.service {
        return Err(Refusal::Service(snapshot.inbound.service.to_string()));
    }
    if snapshot.trust.trust_domain != *trust_domain {
        return Err(Refusal::TrustDomain(snapshot.trust.trust_domain.clone()));
    }
    Ok(())
}

/// Bounded by the announced length, and that by what a shard may have.
fn decompress(shard: &v1::Shard) -> Result<Arc<[u8]>, Refusal> {
    let length = usize::try_from(shard.length).unwrap_or(usize::MAX);
    if length > SHARD_BYTES_MAX {
        return Err(Refusal::TooLong { key: shard.key.clone() });
    }
    zstd::bulk::decompress(&shard.body_zstd, length)
        .map(Into::into)
        .map_err(|source| Refusal::Compression { key: shard.key.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;

    fn web() -> InstanceId {
        "default/web/web-1".parse().unwrap()
    }

    fn taken(pulled: &v1::PullResponse, current: Option<&Snapshot>) -> Result<Option<Snapshot>, Refusal> {
        take(pulled, current, &web(), &fixture::trust_domain())
    }

    #[test]
    fn a_whole_pull_becomes_a_snapshot_and_the_same_again_changes_nothing() {
        let snapshot = fixture::snapshot(&web());
        let pulled = fixture::pull(&snapshot);
        let taken_once = taken(&pulled, None).unwrap().unwrap();
        assert_eq!(taken_once, snapshot);
        assert!(taken(&pulled, Some(&snapshot)).unwrap().is_none());
    }

    #[test]
    fn a_difference_needs_only_what_changed() {
        let old = fixture::snapshot(&web());
        let new = fixture::changed_snapshot(&web());
        let mut pulled = fixture::pull(&new);
        pulled.full = false;
        pulled.shards.retain(|shard| shard.key.starts_with("inbound/"));
        assert_eq!(pulled.shards.len(), 1);
        assert_eq!(taken(&pulled, Some(&old)).unwrap().unwrap(), new);
        assert!(matches!(taken(&pulled, None), Err(Refusal::Snapshot(SnapshotError::Missing(_)))));
    }

    #[test]
    fn nothing_older_or_changed_is_taken() {
        let old = fixture::snapshot(&web());
        let new = fixture::changed_snapshot(&web());
        assert!(matches!(taken(&fixture::pull(&old), Some(&new)), Err(Refusal::NotNewer { .. })));

        let mut same_version = fixture::pull(&new);
        same_version.header.as_mut().unwrap().manifest_hash = vec![1; 32].into();
        assert!(matches!(taken(&same_version, Some(&new)), Err(Refusal::NotNewer { .. })));

        let mut corrupt = fixture::pull(&new);
        corrupt.shards[0].body_zstd = zstd::bulk::compress(b"something else", 3).unwrap().into();
        assert!(matches!(taken(&corrupt, Some(&old)), Err(Refusal::Snapshot(SnapshotError::Missing(_)))));

        let mut bomb = fixture::pull(&new);
        bomb.shards[0].body_zstd = zstd::bulk::compress(&vec![0; 1 << 20], 3).unwrap().into();
        assert!(matches!(taken(&bomb, Some(&old)), Err(Refusal::Compression { .. })));
        bomb.shards[0].length = u32::MAX;
        assert!(matches!(taken(&bomb, Some(&old)), Err(Refusal::TooLong { .. })));
    }

    #[test]
    fn a_snapshot_of_another_service_or_mesh_is_refused() {
        let pulled = fixture::pull(&fixture::snapshot(&web()));
        let other = "default/db/db-1".parse().unwrap();
        assert!(matches!(
            take(&pulled, None, &other, &fixture::trust_domain()),
            Err(Refusal::Service(service)) if service == "default/web"
        ));
        let elsewhere = "elsewhere.test".parse().unwrap();
        assert!(matches!(take(&pulled, None, &web(), &elsewhere), Err(Refusal::TrustDomain(_))));
    }
}
