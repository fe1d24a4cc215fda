//! The newest point of the log that a controller told this sidecar of, in the controllers' own words: opaque here, shown to
//! them when the sidecar subscribes, so that a log which lost its end is noticed.
//!
//! In memory, and on disk beside the snapshot, so that a restart shows it too. The file is written at most once a second, one
//! write at a time; one that is missing or broken is no fault, it only proves less. Of two, the one of the newer head is kept: a
//! controller that is behind takes nothing away.
//!
//! A mesh that was made anew would take an old mesh's witness for a forged one, for ever. So the roots are written beside it,
//! and one whose roots are all others is dropped.

use prost::Message;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use weft_identity::credential::Credential;
use weft_identity::fingerprint::Fingerprint;
use weft_model::{ConfigVersion, Epoch, Position};
use weft_routing::Hash;

/// The file in the state directory.
pub(crate) const FILE: &str = "witness";
/// What is being written; becomes [`FILE`] when it is whole.
const NEW_FILE: &str = "witness.new";
/// Says what the file is, and which version of the format.
const MAGIC: &[u8] = b"weft witness 1\n";
const HASH_BYTES: usize = 32;
/// Longest witness that is taken; controllers make some 130 bytes.
pub(crate) const WITNESS_BYTES_MAX: usize = 512;
/// Largest file that is read: a witness and the fingerprints of some dozens of roots.
const FILE_BYTES_MAX: u64 = 16 * 1024;
/// Shortest time between two writes. A busy log has a new end with each notice; what a crash loses of them is a second.
const WRITE_EVERY: Duration = Duration::from_secs(1);

/// A witness, and what it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Witness {
    /// The log's end that it was told with.
    pub(crate) head: ConfigVersion,
    pub(crate) bytes: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Stored {
    #[prost(uint64, tag = "1")]
    epoch: u64,
    #[prost(uint64, tag = "2")]
    position: u64,
    #[prost(bytes = "vec", tag = "3")]
    witness: Vec<u8>,
    /// Fingerprints of the roots that were trusted then.
    #[prost(bytes = "vec", repeated, tag = "4")]
    roots: Vec<Vec<u8>>,
}

/// The newest one. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Witnesses {
    newest: watch::Sender<Option<Witness>>,
    dir: PathBuf,
}

impl Witnesses {
    /// Begins with what is on disk, if it is of the credential's mesh.
    pub(crate) fn load(dir: PathBuf, credential: &Credential) -> Self {
        let newest = match read(&dir).map(|bytes| decode(&bytes, &roots(credential))) {
            Ok(Some(witness)) => Some(witness),
            Ok(None) => {
                tracing::warn!("the stored witness of the log is damaged or of another mesh; not used");
                None
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(%error, "the stored witness of the log cannot be read; not used");
                None
            }
        };
        Self { newest: watch::Sender::new(newest), dir }
    }

    /// What to show; empty if there is nothing.
    pub(crate) fn show(&self) -> Vec<u8> {
        self.newest.borrow().as_ref().map(|witness| witness.bytes.clone()).unwrap_or_default()
    }

    /// A controller told one, with its head.
    pub(crate) fn told(&self, head: Option<ConfigVersion>, bytes: &[u8]) {
        let Some(head) = head.filter(|_| !bytes.is_empty() && bytes.len() <= WITNESS_BYTES_MAX) else {
            return;
        };
        self.newest.send_if_modified(|newest| {
            let newer = newest.as_ref().is_none_or(|known| known.head < head);
            if newer {
                *newest = Some(Witness { head, bytes: bytes.to_vec() });
            }
            newer
        });
    }

    /// Writes what changes, until the task is aborted.
    pub(crate) async fn keep(self, credential: impl Fn() -> Arc<Credential> + Send) {
        let mut changes = self.newest.subscribe();
        let mut failed = false;
        while changes.changed().await.is_ok() {
            let Some(witness) = changes.borrow_and_update().clone() else { continue };
            let (dir, roots) = (self.dir.clone(), roots(&credential()));
            let written = spawn_blocking(move || write(&dir, &encode(&witness, roots))).await;
            let error = match written {
                Ok(written) => written.err().map(|error| error.to_string()),
                Err(error) => Some(error.to_string()),
            };
            if let Some(error) = error.as_ref().filter(|_| !failed) {
                tracing::warn!(error, "the witness of the log is not on disk");
            }
            failed = error.is_some();
            sleep(WRITE_EVERY).await;
        }
    }
}

fn roots(credential: &Credential) -> Vec<Vec<u8>> {
    credential.roots().iter().map(|root| Fingerprint::of_certificate(root).as_bytes().to_vec()).collect()
}

fn read(dir: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(dir.join(FILE))?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Replaces the file, so that a crash leaves the old one or the new one.
fn write(dir: &Path, bytes: &[u8]) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let new = dir.join(NEW_FILE);
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, dir.join(FILE))?;
    File::open(dir)?.sync_all()
}

fn encode(witness: &Witness, roots: Vec<Vec<u8>>) -> Vec<u8> {
    let Witness { head, bytes } = witness;
    let stored = Stored { epoch: head.epoch.0, position: head.position.0, witness: bytes.clone(), roots };
    let body = stored.encode_to_vec();
    [MAGIC, &Hash::of(&body).0, &body].concat()
}

fn decode(bytes: &[u8], roots: &[Vec<u8>]) -> Option<Witness> {
    let (hash, body) = bytes.strip_prefix(MAGIC)?.split_at_checked(HASH_BYTES)?;
    if Hash::from_slice(hash) != Some(Hash::of(body)) {
        return None;
    }
    let stored = Stored::decode(body).ok()?;
    let ours = stored.roots.iter().any(|root| roots.contains(root));
    (ours && stored.witness.len() <= WITNESS_BYTES_MAX).then(|| Witness {
        head: ConfigVersion::new(Epoch(stored.epoch), Position(stored.position)),
        bytes: stored.witness,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;

    fn at(epoch: u64, position: u64) -> ConfigVersion {
        ConfigVersion::new(Epoch(epoch), Position(position))
    }

    fn witness() -> Witness {
        Witness { head: at(1, 7), bytes: b"signed".to_vec() }
    }

    #[test]
    fn a_witness_is_read_back_by_the_same_mesh_only() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, others) = (vec![vec![1; 32], vec![2; 32]], vec![vec![3; 32]]);
        write(dir.path(), &encode(&witness(), ours.clone())).unwrap();
        let bytes = read(dir.path()).unwrap();
        assert_eq!(decode(&bytes, &ours[1..]), Some(witness()));
        assert_eq!(decode(&bytes, &others), None);
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn only_a_newer_one_replaces_another() {
        let witnesses = Witnesses { newest: watch::Sender::new(None), dir: PathBuf::new() };
        assert!(witnesses.show().is_empty());
        for (head, bytes, shown) in [
            (Some(at(1, 7)), &b"a"[..], &b"a"[..]),
            (Some(at(1, 6)), b"b", b"a"),
            (Some(at(1, 7)), b"c", b"a"),
            (None, b"d", b"a"),
            (Some(at(2, 3)), b"", b"a"),
            (Some(at(2, 3)), &[0; WITNESS_BYTES_MAX + 1], b"a"),
            (Some(at(2, 3)), b"e", b"e"),
        ] {
            witnesses.told(head, bytes);
            assert_eq!(witnesses.show(), shown);
        }
    }

    proptest! {
        #[test]
        fn no_changed_or_cut_file_is_believed(at: prop::sample::Index, flip in 1u8..) {
            let roots = vec![vec![1; 32]];
            let bytes = encode(&witness(), roots.clone());
            let at = at.index(bytes.len());
            let mut changed = bytes.clone();
            changed[at] ^= flip;
            prop_assert_eq!(decode(&changed, &roots), None);
            prop_assert_eq!(decode(&bytes[..at], &roots), None);
        }
    }
}
