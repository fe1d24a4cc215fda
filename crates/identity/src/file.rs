//! Private files: never readable by others, never half written, never larger than expected.

use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Directories that hold private files.
pub(crate) const PRIVATE_DIR_MODE: u32 = 0o700;
/// Files that hold a private key.
pub(crate) const PRIVATE_FILE_MODE: u32 = 0o600;
/// Files that anybody may read.
pub(crate) const PUBLIC_FILE_MODE: u32 = 0o644;

/// A file with a key or a certificate cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Others may read or change the file, so what it holds is no secret any more.
    #[error(
        "{path} holds a private key but has mode {mode:03o}: others can use it; if nobody did, run `chmod 600 {path}`"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is larger than anything that belongs there.
    #[error("{path} has more than {bytes_max} bytes, so it is not the file that belongs there")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The bound.
        bytes_max: u64,
    },
    /// The operating system refused.
    #[error("cannot {operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl FileError {
    /// Whether the file or directory is simply not there.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

pub(crate) fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError::Io { operation, path, source }
}

/// Makes a directory that only its owner may enter. One that exists is left as it is.
pub(crate) fn create_private_dir(dir: &Path) -> Result<(), FileError> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(PRIVATE_DIR_MODE).create(dir).map_err(io_error("create", dir))
}

/// Reads a file that holds a private key. Its mode is taken from the opened file, so it is the mode of what is read.
pub(crate) fn read_private(path: &Path, bytes_max: u64) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let file = File::open(path).map_err(io_error("read", path))?;
    let mode = file.metadata().map_err(io_error("read", path))?.permissions().mode() & 0o777;
    if mode & !PRIVATE_DIR_MODE != 0 {
        return Err(FileError::Exposed { path: path.to_owned(), mode });
    }
    read(file, path, bytes_max)
}

/// Reads a file that anybody may see.
pub(crate) fn read_public(path: &Path, bytes_max: u64) -> Result<Zeroizing<Vec<u8>>, FileError> {
    read(File::open(path).map_err(io_error("read", path))?, path, bytes_max)
}

fn read(file: File, path: &Path, bytes_max: u64) -> Result<Zeroizing<Vec<u8>>, FileError> {
    // Reserved at once: a buffer that grows leaves copies of a key behind.
    let reserve = usize::try_from(bytes_max).unwrap_or(0) + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(reserve));
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    if bytes.len() as u64 > bytes_max {
        return Err(FileError::TooLarge { path: path.to_owned(), bytes_max });
    }
    Ok(bytes)
}

/// Puts a private file in place of what was there. After a crash at any point the path holds the old content or the new.
pub(crate) fn replace_private(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    create_private_dir(dir)?;
    let mut file = tempfile::Builder::new()
        .prefix(".new-")
        .permissions(Permissions::from_mode(PRIVATE_FILE_MODE))
        .tempfile_in(dir)
        .map_err(io_error("create a file in", dir))?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(io_error("write", path))?;
    file.persist(path).map_err(|error| error.error).map_err(io_error("replace", path))?;
    sync_dir(dir)
}

/// Writes a file that must not exist yet, and flushes it.
pub(crate) fn create(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), FileError> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    let mut file =
        options.write(true).create_new(true).mode(mode).open(path).map_err(io_error("create", path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io_error("write", path))
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), FileError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error("flush", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replaced_file_stays_private_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/key");
        for content in [b"one".as_slice(), b"two"] {
            replace_private(&path, content).unwrap();
            assert_eq!(read_private(&path, 3).unwrap().as_slice(), content);
        }
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_others_can_read_is_refused_with_the_next_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        replace_private(&path, b"secret").unwrap();
        for mode in [0o640, 0o604, 0o620, 0o777] {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let error = read_private(&path, 100).unwrap_err();
            assert!(error.to_string().contains(&format!("chmod 600 {}", path.display())), "{error}");
        }
    }

    #[test]
    fn a_file_larger_than_expected_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        replace_private(&path, b"four").unwrap();
        assert!(matches!(read_private(&path, 3), Err(FileError::TooLarge { bytes_max: 3, .. })));
        assert!(read_private(&dir.path().join("none"), 3).unwrap_err().is_absent());
    }
}
