//! Which folder holds the data: the one asked for, or, where the server's account cannot enter that, one that it can.
//!
//! A checkout under `/root` is the usual case: `/root` is closed to everyone else, and opening it is not ours to do. The
//! data then lives in a folder of its own under [`ELSEWHERE`], and the link `home` in the folder asked for leads there.
//! The link is the only record, so it survives every restart, and removing the folder asked for begins a new cluster.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::Say;
use crate::account::Account;

/// Folders that survive a reboot and that every account can enter, best first.
const ELSEWHERE: &[&str] = &["/var/lib/weft", "/var/tmp/weft"];
/// The link, in the folder asked for, to where the data really is.
const LINK: &str = "home";
/// May be entered by everyone and listed by its owner: the server's account has to pass through.
const PASSABLE: u32 = 0o711;

/// Creates a folder and what is missing above it, passable whatever the umask; leaves existing folders as they are.
pub(crate) fn create_passable(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent() {
        create_passable(parent)?;
    }
    match DirBuilder::new().mode(PASSABLE).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        other => other?,
    }
    fs::set_permissions(dir, Permissions::from_mode(PASSABLE))
}

/// The folder that an earlier run chose for `dir`.
pub(crate) fn chosen(dir: &Path) -> PathBuf {
    fs::read_link(dir.join(LINK)).unwrap_or_else(|_| dir.to_owned())
}

/// Chooses the folder for a cluster that does not exist yet.
pub(crate) fn choose(dir: &Path, account: &Account, say: Say<'_>) -> io::Result<PathBuf> {
    if account.reaches(dir)? {
        return Ok(dir.to_owned());
    }
    let mut last_error = io::Error::from(io::ErrorKind::PermissionDenied);
    for place in ELSEWHERE.iter().map(Path::new) {
        match create_elsewhere(place, account) {
            Ok(home) => {
                symlink(&home, dir.join(LINK))?;
                say(&format!(
                    "PostgreSQL runs as {}, who cannot enter {}; its data is in {} (linked from {})",
                    account.name(),
                    dir.display(),
                    home.display(),
                    dir.join(LINK).display(),
                ));
                return Ok(home);
            }
            Err(error) => last_error = error,
        }
    }
    Err(last_error)
}

fn create_elsewhere(place: &Path, account: &Account) -> io::Result<PathBuf> {
    create_passable(place)?;
    let home = tempfile::Builder::new().prefix("pg-").tempdir_in(place)?;
    fs::set_permissions(home.path(), Permissions::from_mode(PASSABLE))?;
    if !account.reaches(home.path())? {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(home.keep())
}
