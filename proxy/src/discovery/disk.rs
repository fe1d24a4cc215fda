//! The last good snapshot on disk: how a sidecar serves after a restart without any controller (I5), and how it knows what
//! it must not go back behind (I4).
//!
//! One file, whose form is in [`stored`]. Written beside and renamed, so a crash leaves the old one or the new one. What does not
//! check out is refused whole; then nothing passes until a controller has given a snapshot (I6).

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use weft_client::stored::{self, StoredError};
use weft_model::InstanceId;
use weft_routing::Snapshot;

/// The file in the state directory.
pub(crate) const FILE: &str = "snapshot";

/// What is being written; becomes [`FILE`] when it is whole. One name, so that a crash leaves at most one of them.
const NEW_FILE: &str = "snapshot.new";

/// Largest file that is read. A mesh of 30,000 services with three endpoints each is about 30 MiB.
const FILE_BYTES_MAX: u64 = 512 << 20;

/// The file is there, but cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("cannot {0} {1}")]
    Io(&'static str, PathBuf, #[source] io::Error),
    #[error(transparent)]
    Stored(#[from] StoredError),
}

/// Replaces the stored snapshot. One caller at a time.
///
/// # Errors
/// What the file system refuses.
pub(crate) fn save(dir: &Path, instance: &InstanceId, snapshot: &Snapshot) -> Result<(), DiskError> {
    let path = dir.join(FILE);
    let bytes = stored::encode(instance, snapshot);
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
        Ok(_) => Ok(Some(stored::decode(&bytes, instance)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(DiskError::Io("read", path, error)),
    }
}

/// What tells one stored snapshot from the next; none if there is none.
pub(crate) fn stamp(dir: &Path) -> Option<(u64, i64, i64)> {
    // Each is a new file.
    let metadata = fs::metadata(dir.join(FILE)).ok()?;
    Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use weft_routing::fixture;

    #[test]
    fn a_snapshot_is_read_back_as_it_was() {
        let web: InstanceId = "default/web/web-1".parse().unwrap();
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path(), &web).unwrap().is_none());
        let snapshot = fixture::snapshot(&web);
        save(dir.path(), &web, &snapshot).unwrap();
        assert_eq!(load(dir.path(), &web).unwrap().unwrap(), snapshot);
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let other = "default/web/web-2".parse().unwrap();
        assert!(matches!(load(dir.path(), &other), Err(DiskError::Stored(StoredError::Foreign(_)))));
    }
}
