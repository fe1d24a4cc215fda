//! Where the PostgreSQL server programs are on this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::install;

/// The oldest PostgreSQL major version that Weft runs on.
pub const MIN_MAJOR: u32 = 15;

/// Folders in which distributions put one server version each; `*` stands for one folder name's rest.
const KNOWN_PLACES: &[&str] = &[
    "/usr/lib/postgresql/*/bin", // Debian, Ubuntu, Gentoo
    "/usr/pgsql-*/bin",          // PostgreSQL's own packages for Red Hat
    "/usr/lib/postgresql*/bin",  // SUSE
    "/usr/libexec/postgresql*",  // Alpine
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/usr/local/pgsql/bin", // built from source
];

/// The server programs of one PostgreSQL installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    dir: PathBuf,
    major: u32,
}

/// No usable PostgreSQL server is installed.
#[derive(Debug, thiserror::Error)]
#[error(
    "no PostgreSQL server of version {MIN_MAJOR} or newer found; looked in PATH, at `pg_config --bindir`, and in {}{}",
    KNOWN_PLACES.join(", "),
    too_old_note(.too_old)
)]
pub struct FindError {
    /// Servers that are here but older than [`MIN_MAJOR`].
    pub too_old: Vec<Binaries>,
}

fn too_old_note(too_old: &[Binaries]) -> String {
    let list: Vec<String> =
        too_old.iter().map(|found| format!("version {} in {}", found.major, found.dir.display())).collect();
    if list.is_empty() { String::new() } else { format!(" (too old: {})", list.join(", ")) }
}

impl Binaries {
    /// Finds a server of [`MIN_MAJOR`] or newer: the one in PATH, else the one that `pg_config` names, else the newest in
    /// the folders that distributions use.
    ///
    /// # Errors
    ///
    /// [`FindError`] when there is none; it names what was searched.
    pub fn find() -> Result<Self, FindError> {
        let (usable, too_old): (Vec<_>, Vec<_>) =
            installed().into_iter().partition(|found| found.major >= MIN_MAJOR);
        usable.into_iter().next().ok_or(FindError { too_old })
    }

    /// As [`Binaries::find`], and if there is none installs one with the system's package manager, where this user is
    /// root or may use `sudo` without a password. What is run is said before it is run.
    ///
    /// # Errors
    ///
    /// [`InstallError`](crate::InstallError) names the command to run by hand.
    pub fn find_or_install(say: crate::Say<'_>) -> Result<Self, install::InstallError> {
        Self::find().or_else(|absent| install::install(absent, say))
    }

    /// An installed server of exactly this major version, as data made by it can be read by no other.
    pub(crate) fn find_major(major: u32) -> Option<Self> {
        installed().into_iter().find(|found| found.major == major)
    }

    /// The server's major version.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// The folder that holds `postgres` and `initdb`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn at(dir: &Path) -> Option<Self> {
        let postgres = dir.join("postgres");
        if !postgres.is_file() || !dir.join("initdb").is_file() {
            return None;
        }
        let output = Command::new(&postgres).arg("--version").output().ok()?;
        let major = parse_major(&String::from_utf8_lossy(&output.stdout))?;
        Some(Self { dir: dir.to_owned(), major })
    }
}

/// Every server found, in the order of preference.
fn installed() -> Vec<Binaries> {
    let in_path = std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
    let mut found: Vec<Binaries> = Vec::new();
    for dir in in_path.into_iter().flatten().filter(|dir| dir.is_absolute()).chain(pg_config_bindir()) {
        found.extend(Binaries::at(&dir));
    }
    let mut known: Vec<Binaries> =
        KNOWN_PLACES.iter().flat_map(|place| matching(place)).filter_map(|dir| Binaries::at(&dir)).collect();
    known.sort_by_key(|found| std::cmp::Reverse(found.major));
    found.extend(known);
    found
}

fn pg_config_bindir() -> Option<PathBuf> {
    let output = Command::new("pg_config").arg("--bindir").output().ok()?;
    let dir = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(dir.trim()))
}

/// The folders that a pattern with at most one `*` names.
fn matching(pattern: &str) -> Vec<PathBuf> {
    let Some((before, after)) = pattern.split_once('*') else {
        return vec![PathBuf::from(pattern)];
    };
    let Some((parent, prefix)) = before.rsplit_once('/') else {
        return Vec::new();
    };
    let Ok(entries) = fs::read_dir(parent) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| match after.strip_prefix('/') {
            Some(below) => entry.path().join(below),
            None => entry.path(),
        })
        .collect()
}

/// The major version in what `postgres --version` prints: `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`.
fn parse_major(text: &str) -> Option<u32> {
    let version = text.split_once("(PostgreSQL) ")?.1;
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_from_released_and_unreleased_servers() {
        assert_eq!(parse_major("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), Some(15));
        assert_eq!(parse_major("postgres (PostgreSQL) 19devel\n"), Some(19));
        assert_eq!(parse_major("mysqld  Ver 8.0\n"), None);
    }

    #[test]
    fn a_pattern_names_the_folders_that_exist() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("pgsql-16/bin")).unwrap();
        fs::create_dir_all(root.path().join("other")).unwrap();
        let pattern = format!("{}/pgsql-*/bin", root.path().display());
        assert_eq!(matching(&pattern), [root.path().join("pgsql-16/bin")]);
    }

    #[test]
    fn the_error_names_the_places_and_the_servers_that_are_too_old() {
        let too_old = vec![Binaries { dir: PathBuf::from("/usr/lib/postgresql/13/bin"), major: 13 }];
        let text = FindError { too_old }.to_string();
        assert!(text.contains("pg_config --bindir"), "{text}");
        assert!(text.contains("too old: version 13 in /usr/lib/postgresql/13/bin"), "{text}");
    }
}
