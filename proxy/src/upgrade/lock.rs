//! The lock of a state directory: who has it is the sidecar of its instance. The kernel lets go of it when the last process that has it
//! ends, however it ends.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The file in the state directory.
const FILE: &str = "lock";

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Lock(File);

impl Lock {
    /// Takes the lock; none if another process has it.
    ///
    /// # Errors
    /// If the file system has no locks, or the directory cannot be written.
    pub(crate) fn take(state_dir: &Path) -> io::Result<Option<Self>> {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(state_dir.join(FILE))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// The same lock once more, for another process.
    ///
    /// # Errors
    /// If this process may open no more files.
    pub(crate) fn share(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }
}

impl From<OwnedFd> for Lock {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl AsFd for Lock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_it_until_the_last_share_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::take(dir.path()).unwrap().unwrap();
        assert!(Lock::take(dir.path()).unwrap().is_none());
        let share = lock.share().unwrap();
        drop(lock);
        assert!(Lock::take(dir.path()).unwrap().is_none());
        drop(share);
        assert!(Lock::take(dir.path()).unwrap().is_some());
    }
}
