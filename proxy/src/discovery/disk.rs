//! The last good snapshot on disk: how a sidecar serves after a restart without any controller (I5), and how it knows what
//! it must not go back behind (I4).
//!
//! One file: a line that says what it is, the SHA-256 of the rest, the rest in protobuf. Written beside and renamed, so
//! a crash leaves the old one or the new one. What does not check out is refused whole; then nothing passes until a
//! controller has given a snapshot (I6).

use prost::Message;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use weft_model::{ConfigVersion, Epoch, InstanceId, Position};
use weft_routing::snapshot::SnapshotError;
use weft_routing::{Hash, Snapshot};

/// The file in the state directory.
pub(crate) const FILE: &str = "snapshot";

/// What is being written; becomes [`FILE`] when it is whole. One name, so that a crash leaves at most one of them.
const NEW_FILE: &str = "snapshot.new";

/// Says what the file is, and which version of the format.
const MAGIC: &[u8] = b"weft snapshot 1\n";
const HASH_BYTES: usize = 32;

/// Largest file that is read. A mesh of 30,000 services with three endpoints each is about 30 MiB.
const FILE_BYTES_MAX: u64 = 512 << 20;

/// The file is there, but cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("cannot {0} {1}")]
    Io(&'static str, PathBuf, #[source] io::Error),
    #[error("the stored snapshot is damaged")]
    Damaged,
    #[error("the stored snapshot is another instance's: {0}")]
    Foreign(String),
    #[error("the stored snapshot does not hold together")]
    Snapshot(#[from] SnapshotError),
}

#[derive(Clone, PartialEq, Message)]
struct Stored {
    #[prost(string, tag = "1")]
    instance: String,
    #[prost(uint64, tag = "2")]
    epoch: u64,
    #[prost(uint64, tag = "3")]
    position: u64,
    #[prost(bytes = "vec", tag = "4")]
    manifest_hash: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    manifest: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "6")]
    shards: Vec<Vec<u8>>,
}

/// Replaces the stored snapshot. One caller at a time.
///
/// # Errors
/// What the file system refuses.
pub(crate) fn save(dir: &Path, instance: &InstanceId, snapshot: &Snapshot) -> Result<(), DiskError> {
    let path = dir.join(FILE);
    let bytes = encode(instance, snapshot);
    let write = || {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let new = dir.join(NEW_FILE);
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        // The rename is durable once the directory is.
        File::open(dir)?.sync_all()
    };
    write().map_err(|error| DiskError::Io("write", path.clone(), error))
}

/// The stored snapshot; none if there is no file.
///
/// # Errors
/// If there is a file, and it is not a whole snapshot of this instance.
pub(crate) fn load(dir: &Path, instance: &InstanceId) -> Result<Option<Snapshot>, DiskError> {
    let path = dir.join(FILE);
    let mut bytes = Vec::new();
    match File::open(&path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)) {
        Ok(_) => decode(&bytes, instance).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(DiskError::Io("read", path, error)),
    }
}

fn encode(instance: &InstanceId, snapshot: &Snapshot) -> Vec<u8> {
    let body = Stored {
        instance: instance.to_string(),
        epoch: snapshot.version.epoch.0,
        position: snapshot.version.position.0,
        manifest_hash: snapshot.manifest_hash.0.to_vec(),
        manifest: snapshot.manifest_bytes(),
        shards: snapshot.shards.values().map(|bytes| bytes.to_vec()).collect(),
    }
    .encode_to_vec();
    [MAGIC, &Hash::of(&body).0, &body].concat()
}

fn decode(bytes: &[u8], instance: &InstanceId) -> Result<Snapshot, DiskError> {
    let (hash, body) = bytes
        .strip_prefix(MAGIC)
        .and_then(|rest| rest.split_at_checked(HASH_BYTES))
        .ok_or(DiskError::Damaged)?;
    if Hash::from_slice(hash) != Some(Hash::of(body)) {
        return Err(DiskError::Damaged);
    }
    let stored = Stored::decode(body).map_err(|_| DiskError::Damaged)?;
    if stored.instance != instance.to_string() {
        return Err(DiskError::Foreign(stored.instance));
    }
    let manifest_hash = Hash::from_slice(&stored.manifest_hash).ok_or(DiskError::Damaged)?;
    let shards: BTreeMap<_, Arc<[u8]>> =
        stored.shards.into_iter().map(|bytes| (Hash::of(&bytes), bytes.into())).collect();
    let version = ConfigVersion::new(Epoch(stored.epoch), Position(stored.position));
    Ok(Snapshot::assemble(version, manifest_hash, &stored.manifest, &shards)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;
    use weft_routing::fixture;

    fn web() -> InstanceId {
        "default/web/web-1".parse().unwrap()
    }

    #[test]
    fn a_snapshot_is_read_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path(), &web()).unwrap().is_none());
        let snapshot = fixture::snapshot(&web());
        save(dir.path(), &web(), &snapshot).unwrap();
        assert_eq!(load(dir.path(), &web()).unwrap().unwrap(), snapshot);
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn another_instances_snapshot_is_refused() {
        let bytes = encode(&web(), &fixture::snapshot(&web()));
        let other = "default/web/web-2".parse().unwrap();
        assert!(
            matches!(decode(&bytes, &other), Err(DiskError::Foreign(name)) if name == "default/web/web-1")
        );
    }

    proptest! {
        #[test]
        fn no_changed_or_cut_file_is_believed(at: prop::sample::Index, flip in 1u8..) {
            let bytes = encode(&web(), &fixture::snapshot(&web()));
            let at = at.index(bytes.len());
            let mut changed = bytes.clone();
            changed[at] ^= flip;
            prop_assert!(decode(&changed, &web()).is_err());
            prop_assert!(decode(&bytes[..at], &web()).is_err());
        }

        #[test]
        fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(decode(&bytes, &web()).is_err());
            let body = [MAGIC, &Hash::of(&bytes).0, &bytes].concat();
            prop_assert!(decode(&body, &web()).is_err());
        }
    }
}
