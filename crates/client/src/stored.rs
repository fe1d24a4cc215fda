//! A snapshot as it lies on a sidecar's disk: a line that says what it is, the SHA-256 of the rest, the rest in protobuf. What
//! does not check out is refused whole.

use prost::Message;
use std::collections::BTreeMap;
use std::sync::Arc;
use weft_model::{ConfigVersion, Epoch, InstanceId, Position};
use weft_routing::snapshot::SnapshotError;
use weft_routing::{Hash, Snapshot};

/// Says what the file is, and which version of the format.
const MAGIC: &[u8] = b"weft snapshot 2\n";
const HASH_BYTES: usize = 32;

/// Bytes are not a whole snapshot of this instance.
#[derive(Debug, thiserror::Error)]
pub enum StoredError {
    /// They are not what was written.
    #[error("the stored snapshot is damaged")]
    Damaged,
    /// They are another instance's.
    #[error("the stored snapshot is another instance's: {0}")]
    Foreign(String),
    /// They are not a whole snapshot.
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

/// A snapshot of this instance as bytes.
#[must_use]
pub fn encode(instance: &InstanceId, snapshot: &Snapshot) -> Vec<u8> {
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

/// Reads bytes back. Takes memory in proportion to them, so bound them before.
///
/// # Errors
/// If they are not what [`encode`] made for this instance.
pub fn decode(bytes: &[u8], instance: &InstanceId) -> Result<Snapshot, StoredError> {
    let (hash, body) = bytes
        .strip_prefix(MAGIC)
        .and_then(|rest| rest.split_at_checked(HASH_BYTES))
        .ok_or(StoredError::Damaged)?;
    if Hash::from_slice(hash) != Some(Hash::of(body)) {
        return Err(StoredError::Damaged);
    }
    let stored = Stored::decode(body).map_err(|_| StoredError::Damaged)?;
    if stored.instance != instance.to_string() {
        return Err(StoredError::Foreign(stored.instance));
    }
    let manifest_hash = Hash::from_slice(&stored.manifest_hash).ok_or(StoredError::Damaged)?;
    let shards: BTreeMap<_, Arc<[u8]>> =
        stored.shards.into_iter().map(|bytes| (Hash::of(&bytes), bytes.into())).collect();
    let version = ConfigVersion::new(Epoch(stored.epoch), Position(stored.position));
    Ok(Snapshot::assemble(version, manifest_hash, &stored.manifest, &shards)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use weft_routing::fixture;

    fn web() -> InstanceId {
        "default/web/web-1".parse().unwrap()
    }

    #[test]
    fn a_snapshot_is_read_back_by_its_instance_only() {
        let snapshot = fixture::snapshot(&web());
        let bytes = encode(&web(), &snapshot);
        assert_eq!(decode(&bytes, &web()).unwrap(), snapshot);
        let other = "default/web/web-2".parse().unwrap();
        assert!(
            matches!(decode(&bytes, &other), Err(StoredError::Foreign(name)) if name == "default/web/web-1")
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
