//! Which folder holds the data: the one asked for, or, where the server's account cannot enter that, one that it can.
//!
//! A checkout under `/root` is the usual case: `/root` is closed to everyone else, and opening it is not ours to do. The
//! data then lives in a folder of its own under [`ELSEWHERE`], and the link `home` in the folder asked for leads there.
//! The link is the only record, so it survives every restart, and removing the folder asked for begins a new cluster.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::unistd::{User, geteuid};

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
    check_ours(place)?;
    let home = tempfile::Builder::new().prefix("pg-").tempdir_in(place)?;
    fs::set_permissions(home.path(), Permissions::from_mode(PASSABLE))?;
    if !account.reaches(home.path())? {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(home.keep())
}

/// Refuses a place in which somebody else could exchange what is there. One of the places is below a folder where
/// everybody may create it before us.
fn check_ours(place: &Path) -> io::Result<()> {
    // Not of what a link leads to: the link is the other's too.
    let found = fs::symlink_metadata(place)?;
    if found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!(
            "{} is not a folder that only {} may change; remove it if it is nobody's, or make the cluster's own \
             folder passable with `chmod o+x`",
            place.display(),
            User::from_uid(geteuid()).ok().flatten().map_or_else(|| "its user".to_owned(), |user| user.name),
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_others_could_change_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let place = root.path().join("place");
        create_passable(&place).unwrap();
        check_ours(&place).unwrap();

        for mode in [0o731, 0o713, 0o777, 0o1777] {
            fs::set_permissions(&place, Permissions::from_mode(mode)).unwrap();
            let refused = check_ours(&place).unwrap_err();
            assert!(refused.to_string().contains(&place.display().to_string()), "{refused}");
        }
        fs::set_permissions(&place, Permissions::from_mode(PASSABLE)).unwrap();

        let link = root.path().join("link");
        symlink(&place, &link).unwrap();
        check_ours(&link).unwrap_err();
        let account = Account::choose(None).unwrap().unwrap();
        account.give(&link).unwrap();
        check_ours(&place).unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        check_ours(&root.path().join("file")).unwrap_err();
        if geteuid().is_root() {
            account.give(&place).unwrap();
            check_ours(&place).unwrap_err();
            let refused = create_elsewhere(&place, &account).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            assert_eq!(fs::read_dir(&place).unwrap().count(), 0, "nothing was created");
        }
    }
}
