//! From what a controller sent to a snapshot: a pull, or the patch in a notice. What is not newer, not whole, not what its
//! hashes say, or not for this instance is refused, and the one in use stays (I3, I4).

use std::collections::BTreeMap;
use std::sync::Arc;
use weft_model::{ConfigVersion, Epoch, InstanceId, Position, TrustDomain};
use weft_proto::v1;
use weft_routing::manifest::{self, ManifestEntry};
use weft_routing::snapshot::{SHARD_BYTES_MAX, SnapshotError};
use weft_routing::{Hash, HashStart, ShardKey, Snapshot, Splice};

/// A snapshot that was pulled is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It is not newer than the one in use.
    #[error("version {offered} is not newer than {current}")]
    NotNewer {
        /// What was sent.
        offered: ConfigVersion,
        /// What is in use.
        current: ConfigVersion,
    },
    /// It does not say which snapshot it is.
    #[error("answer names no snapshot")]
    Header,
    /// It names a shard that cannot be.
    #[error("{0:?} names no shard")]
    Key(String),
    /// It names a place at which nothing is listed.
    #[error("there is no shard at place {0}")]
    Place(u32),
    /// A shard is not what was changed.
    #[error("shard {key} is not what was changed")]
    Splice {
        /// The shard.
        key: String,
    },
    /// A shard is above its bound.
    #[error("shard {key} is longer than it may be")]
    TooLong {
        /// The shard.
        key: String,
    },
    /// A shard does not decompress.
    #[error("shard {key} does not decompress")]
    Compression {
        /// The shard.
        key: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not whole, or not what it says.
    #[error("snapshot does not hold together")]
    Snapshot(#[from] SnapshotError),
    /// It is another service's.
    #[error("snapshot is for {0}")]
    Service(String),
    /// It is of another trust domain.
    #[error("snapshot is of trust domain {0}")]
    TrustDomain(TrustDomain),
    /// It is of another mesh of the same trust domain.
    #[error("snapshot is of another mesh of the same name")]
    Authority,
}

/// Largest answer to a pull that is taken: a mesh seen whole, compressed.
pub const PULL_BYTES_MAX: usize = 256 << 20;

/// A version as the wire has it.
#[must_use]
pub fn version(version: &v1::ConfigVersion) -> ConfigVersion {
    ConfigVersion::new(Epoch(version.epoch), Position(version.position))
}

/// A version for the wire.
#[must_use]
pub const fn wire_version(version: ConfigVersion) -> v1::ConfigVersion {
    v1::ConfigVersion { epoch: version.epoch.0, position: version.position.0 }
}

/// Names a snapshot to a controller.
#[must_use]
pub fn header(snapshot: &Snapshot) -> v1::SnapshotHeader {
    v1::SnapshotHeader {
        version: Some(wire_version(snapshot.version)),
        manifest_hash: snapshot.manifest_hash.0.to_vec().into(),
    }
}

/// The snapshot that a controller names.
fn named(header: Option<&v1::SnapshotHeader>) -> Result<(ConfigVersion, Hash), Refusal> {
    let header = header.ok_or(Refusal::Header)?;
    let offered = header.version.as_ref().map(version).ok_or(Refusal::Header)?;
    Ok((offered, Hash::from_slice(&header.manifest_hash).ok_or(Refusal::Header)?))
}

/// Puts together what was pulled and what is there. None if it is the snapshot in use.
///
/// # Errors
/// If it is not to be used.
pub fn take(
    pulled: &v1::PullResponse,
    current: Option<&Snapshot>,
    own: &InstanceId,
    trust_domain: &TrustDomain,
) -> Result<Option<Snapshot>, Refusal> {
    let (offered, manifest_hash) = named(pulled.header.as_ref())?;
    if let Some(current) = current {
        if offered == current.version && manifest_hash == current.manifest_hash {
            return Ok(None);
        }
        if offered <= current.version {
            return Err(Refusal::NotNewer { offered, current: current.version });
        }
    }
    let mut shards: BTreeMap<Hash, Arc<[u8]>> = BTreeMap::new();
    for shard in &pulled.shards {
        let bytes = decompress(shard)?;
        shards.insert(Hash::of(&bytes), bytes);
    }
    let snapshot = match current {
        Some(current) if !pulled.full => current.next(offered, manifest_hash, &changes(pulled)?, &shards)?,
        current => {
            // What was held need not be sent; that it has the hash it is listed with is checked again.
            for (key, entry) in current.iter().flat_map(|current| current.manifest.entries()) {
                if let Some(held) = current.and_then(|current| current.shard(key)) {
                    shards.entry(entry.hash).or_insert_with(|| Arc::clone(held));
                }
            }
            Snapshot::assemble(offered, manifest_hash, &pulled.manifest, &shards)?
        }
    };
    belongs(&snapshot, own, trust_domain)?;
    Ok(Some(snapshot))
}

/// The entries of the manifest that a difference changes.
fn changes(pulled: &v1::PullResponse) -> Result<BTreeMap<ShardKey, Option<ManifestEntry>>, Refusal> {
    let changed = manifest::decode_entries(&pulled.manifest).map_err(SnapshotError::from)?;
    let mut changes: BTreeMap<_, _> = changed.into_iter().map(|(key, entry)| (key, Some(entry))).collect();
    for key in &pulled.removed {
        changes.insert(key.parse().map_err(|_| Refusal::Key(key.clone()))?, None);
    }
    Ok(changes)
}

/// Takes the patch of a notice. None if it does not begin with the snapshot in use: then a pull tells.
///
/// # Errors
/// If what it makes is not to be used; a pull may bring something that is.
pub fn take_patch(
    notice: &v1::Notice,
    current: &Snapshot,
    own: &InstanceId,
    trust_domain: &TrustDomain,
) -> Result<Option<Snapshot>, Refusal> {
    let Some(patch) = notice.patch.as_ref().filter(|patch| patch.base == current.manifest_hash.prefix())
    else {
        return Ok(None);
    };
    let header = notice.wanted.as_ref().ok_or(Refusal::Header)?;
    let offered = header.version.as_ref().map(version).ok_or(Refusal::Header)?;
    let announced = HashStart::from_slice(&header.manifest_hash).ok_or(Refusal::Header)?;
    if offered <= current.version {
        return Err(Refusal::NotNewer { offered, current: current.version });
    }
    let changes = patch.shards.iter().map(|shard| change(shard, offered, current));
    let snapshot = current.patched(offered, announced, changes.collect::<Result<Vec<_>, _>>()?)?;
    belongs(&snapshot, own, trust_domain)?;
    Ok(Some(snapshot))
}

type Change = (ShardKey, Position, Option<Arc<[u8]>>);

fn change(shard: &v1::ShardPatch, offered: ConfigVersion, current: &Snapshot) -> Result<Change, Refusal> {
    let place = usize::try_from(shard.place).unwrap_or(usize::MAX);
    let key = current.manifest.key_at(place).ok_or(Refusal::Place(shard.place))?.clone();
    let position = offered.position.0.checked_sub(shard.before).map(Position).ok_or(Refusal::Header)?;
    let present = current.shard(&key).ok_or_else(|| SnapshotError::Missing(key.clone()))?;
    let bytes = match &shard.splice {
        Some(splice) => {
            Some(spliced(splice, present).ok_or_else(|| Refusal::Splice { key: key.to_string() })?)
        }
        None if shard.delta_zstd.is_empty() => None,
        None => {
            let compression = |source| Refusal::Compression { key: key.to_string(), source };
            let length = bounded(&key.to_string(), shard.length)?;
            let mut delta = zstd::bulk::Decompressor::with_dictionary(present).map_err(compression)?;
            Some(delta.decompress(&shard.delta_zstd, length).map_err(compression)?)
        }
    };
    Ok((key, position, bytes.map(Into::into)))
}

/// What a shard becomes; none if that is not what it was made from, or longer than it may be.
fn spliced(splice: &v1::Splice, present: &[u8]) -> Option<Vec<u8>> {
    let number = |number| usize::try_from(number).ok();
    let splice = Splice { at: number(splice.at)?, cut: number(splice.cut)?, put: splice.put.to_vec() };
    splice.apply(present).filter(|bytes| bytes.len() <= SHARD_BYTES_MAX)
}

/// Whether a snapshot is for this instance's service and of its mesh.
///
/// # Errors
/// If it is not.
pub fn belongs(snapshot: &Snapshot, own: &InstanceId, trust_domain: &TrustDomain) -> Result<(), Refusal> {
    if snapshot.inbound.service != own.service {
        return Err(Refusal::Service(snapshot.inbound.service.to_string()));
    }
    if snapshot.trust.trust_domain != *trust_domain {
        return Err(Refusal::TrustDomain(snapshot.trust.trust_domain.clone()));
    }
    Ok(())
}

fn decompress(shard: &v1::Shard) -> Result<Arc<[u8]>, Refusal> {
    let length = bounded(&shard.key, shard.length)?;
    zstd::bulk::decompress(&shard.body_zstd, length)
        .map(Into::into)
        .map_err(|source| Refusal::Compression { key: shard.key.clone(), source })
}

/// The announced length, which is all that is decompressed, and is bounded by what a shard may have.
fn bounded(key: &str, length: u32) -> Result<usize, Refusal> {
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > SHARD_BYTES_MAX {
        return Err(Refusal::TooLong { key: key.to_owned() });
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_routing::fixture;

    fn shard(snapshot: &Snapshot, key: &ShardKey) -> v1::Shard {
        let bytes = snapshot.shard(key).unwrap();
        v1::Shard {
            key: key.to_string(),
            body_zstd: zstd::bulk::compress(bytes, 3).unwrap().into(),
            length: bytes.len().try_into().unwrap(),
        }
    }

    /// The answer that brings a snapshot to somebody who has none.
    fn pull(snapshot: &Snapshot) -> v1::PullResponse {
        v1::PullResponse {
            header: Some(header(snapshot)),
            full: true,
            manifest: snapshot.manifest_bytes().into(),
            shards: snapshot.shards.keys().map(|key| shard(snapshot, key)).collect(),
            ..v1::PullResponse::default()
        }
    }

    /// The answer that brings one snapshot to somebody who has the other.
    fn difference(old: &Snapshot, new: &Snapshot) -> v1::PullResponse {
        let difference = new.manifest.since(&old.manifest);
        let entries = difference.changed.iter().map(|changed| (changed.key, changed.entry));
        v1::PullResponse {
            header: Some(header(new)),
            full: false,
            manifest: manifest::encode_entries(entries).into(),
            shards: difference.changed.iter().map(|changed| shard(new, changed.key)).collect(),
            removed: difference.removed.iter().map(ToString::to_string).collect(),
            held_wanted: false,
        }
    }

    /// The notice that brings one snapshot to somebody who has the other: whole deltas, or splices.
    fn patch(old: &Snapshot, new: &Snapshot, splices: bool) -> v1::Notice {
        let changed = new.manifest.since(&old.manifest).changed;
        let shard = |key: &ShardKey, position: Position| {
            let (before, bytes) = (old.shard(key).unwrap(), new.shard(key).unwrap());
            let mut told = v1::ShardPatch {
                place: old.manifest.place(key).unwrap().try_into().unwrap(),
                before: new.version.position.0 - position.0,
                ..v1::ShardPatch::default()
            };
            if splices {
                let Splice { at, cut, put } = Splice::between(before, bytes);
                let (at, cut) = (at.try_into().unwrap(), cut.try_into().unwrap());
                told.splice = Some(v1::Splice { at, cut, put: put.into() });
            } else {
                let mut delta = zstd::bulk::Compressor::with_dictionary(3, before).unwrap();
                told.delta_zstd = delta.compress(bytes).unwrap().into();
                told.length = bytes.len().try_into().unwrap();
            }
            told
        };
        let shards = changed.iter().map(|changed| shard(changed.key, changed.entry.position)).collect();
        let patch = v1::Patch { base: old.manifest_hash.prefix(), shards };
        let mut wanted = header(new);
        wanted.manifest_hash = new.manifest_hash.start().bytes().to_vec().into();
        v1::Notice { wanted: Some(wanted), patch: Some(patch), ..v1::Notice::default() }
    }

    fn patched(notice: &v1::Notice, current: &Snapshot) -> Result<Option<Snapshot>, Refusal> {
        take_patch(notice, current, &web(), &fixture::trust_domain())
    }

    #[test]
    fn a_patch_makes_what_a_pull_would() {
        let (old, new) = (fixture::snapshot(&web()), fixture::changed_snapshot(&web()));
        for splices in [false, true] {
            let notice = patch(&old, &new, splices);
            assert_eq!(notice.patch.as_ref().unwrap().shards.len(), 1);
            assert_eq!(patched(&notice, &old).unwrap().unwrap(), new);
            // One that begins elsewhere, or none, is not for us.
            assert!(patched(&notice, &new).unwrap().is_none());
            assert!(patched(&v1::Notice { patch: None, ..notice }, &old).unwrap().is_none());
        }
    }

    #[test]
    fn a_patch_that_does_not_make_the_announced_snapshot_is_refused() {
        let (old, new) = (fixture::snapshot(&web()), fixture::changed_snapshot(&web()));
        let refused = |splices, change: fn(&mut v1::ShardPatch)| {
            let mut notice = patch(&old, &new, splices);
            change(&mut notice.patch.as_mut().unwrap().shards[0]);
            patched(&notice, &old).unwrap_err()
        };
        for splices in [false, true] {
            let moved = refused(splices, |shard| shard.before += 1);
            assert!(matches!(moved, Refusal::Snapshot(SnapshotError::ManifestHash)));
            assert!(matches!(refused(splices, |shard| shard.before = u64::MAX), Refusal::Header));
            assert!(matches!(refused(splices, |shard| shard.place = 100), Refusal::Place(100)));
            let elsewhere = refused(splices, |shard| shard.place = 0);
            assert!(matches!(
                elsewhere,
                Refusal::Snapshot(_) | Refusal::Splice { .. } | Refusal::Compression { .. }
            ));
        }
        let junk = refused(false, |shard| shard.delta_zstd = b"nothing".to_vec().into());
        assert!(matches!(junk, Refusal::Compression { .. }));
        assert!(matches!(refused(false, |shard| shard.length = u32::MAX), Refusal::TooLong { .. }));
        assert!(matches!(
            refused(false, |shard| shard.delta_zstd = b"".to_vec().into()),
            Refusal::Snapshot(_)
        ));
        let cut = |shard: &mut v1::ShardPatch| shard.splice.as_mut().unwrap().cut = u32::MAX;
        assert!(matches!(refused(true, cut), Refusal::Splice { .. }));
        let other = |shard: &mut v1::ShardPatch| shard.splice.as_mut().unwrap().put = b"x".to_vec().into();
        assert!(matches!(refused(true, other), Refusal::Snapshot(_)));

        let mut older = patch(&new, &old, true);
        assert!(matches!(patched(&older, &new).unwrap_err(), Refusal::NotNewer { .. }));
        let mut short = patch(&old, &new, true);
        short.wanted.as_mut().unwrap().manifest_hash = vec![1; 7].into();
        assert!(matches!(patched(&short, &old).unwrap_err(), Refusal::Header));
        older.wanted = None;
        assert!(matches!(patched(&older, &new).unwrap_err(), Refusal::Header));
    }

    fn web() -> InstanceId {
        "default/web/web-1".parse().unwrap()
    }

    fn taken(pulled: &v1::PullResponse, current: Option<&Snapshot>) -> Result<Option<Snapshot>, Refusal> {
        take(pulled, current, &web(), &fixture::trust_domain())
    }

    #[test]
    fn a_whole_pull_becomes_a_snapshot_and_the_same_again_changes_nothing() {
        let snapshot = fixture::snapshot(&web());
        let pulled = pull(&snapshot);
        let taken_once = taken(&pulled, None).unwrap().unwrap();
        assert_eq!(taken_once, snapshot);
        assert!(taken(&pulled, Some(&snapshot)).unwrap().is_none());
    }

    #[test]
    fn a_difference_needs_only_what_changed() {
        let old = fixture::snapshot(&web());
        let new = fixture::changed_snapshot(&web());
        let pulled = difference(&old, &new);
        assert_eq!(pulled.shards.len(), 1);
        assert_eq!(taken(&pulled, Some(&old)).unwrap().unwrap(), new);
        assert!(matches!(taken(&pulled, None), Err(Refusal::Snapshot(SnapshotError::ManifestHash))));
        // With the whole manifest the rest is what is held.
        let listed = v1::PullResponse { full: true, manifest: new.manifest_bytes().into(), ..pulled.clone() };
        assert_eq!(taken(&listed, Some(&old)).unwrap().unwrap(), new);
        assert!(matches!(taken(&listed, None), Err(Refusal::Snapshot(SnapshotError::Missing(_)))));
        let mut lacking = pulled.clone();
        lacking.shards.clear();
        assert!(matches!(taken(&lacking, Some(&old)), Err(Refusal::Snapshot(SnapshotError::Missing(_)))));
        let mut fewer = pulled.clone();
        fewer.removed = vec!["trust".into()];
        assert!(matches!(taken(&fewer, Some(&old)), Err(Refusal::Snapshot(SnapshotError::ManifestHash))));
        let mut nonsense = pulled;
        nonsense.removed = vec!["trust/me".into()];
        assert!(matches!(taken(&nonsense, Some(&old)), Err(Refusal::Key(key)) if key == "trust/me"));
    }

    #[test]
    fn nothing_older_or_changed_is_taken() {
        let old = fixture::snapshot(&web());
        let new = fixture::changed_snapshot(&web());
        assert!(matches!(taken(&pull(&old), Some(&new)), Err(Refusal::NotNewer { .. })));

        let mut same_version = pull(&new);
        same_version.header.as_mut().unwrap().manifest_hash = vec![1; 32].into();
        assert!(matches!(taken(&same_version, Some(&new)), Err(Refusal::NotNewer { .. })));

        let mut corrupt = pull(&new);
        let changed = corrupt.shards.iter_mut().find(|shard| shard.key.starts_with("inbound/")).unwrap();
        changed.body_zstd = zstd::bulk::compress(b"something else", 3).unwrap().into();
        assert!(matches!(taken(&corrupt, Some(&old)), Err(Refusal::Snapshot(SnapshotError::Missing(_)))));

        let mut bomb = pull(&new);
        bomb.shards[0].body_zstd = zstd::bulk::compress(&vec![0; 1 << 20], 3).unwrap().into();
        assert!(matches!(taken(&bomb, Some(&old)), Err(Refusal::Compression { .. })));
        bomb.shards[0].length = u32::MAX;
        assert!(matches!(taken(&bomb, Some(&old)), Err(Refusal::TooLong { .. })));
    }

    #[test]
    fn a_snapshot_of_another_service_or_mesh_is_refused() {
        let pulled = pull(&fixture::snapshot(&web()));
        let other = "default/db/db-1".parse().unwrap();
        assert!(matches!(
            take(&pulled, None, &other, &fixture::trust_domain()),
            Err(Refusal::Service(service)) if service == "default/web"
        ));
        let elsewhere = "elsewhere.test".parse().unwrap();
        assert!(matches!(take(&pulled, None, &web(), &elsewhere), Err(Refusal::TrustDomain(_))));
    }
}
