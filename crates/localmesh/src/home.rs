//! The home: the one folder that a local mesh lives in, `.weft/` unless said otherwise.
//!
//! ```text
//! .weft/lock                 held while the mesh runs; names the process
//! .weft/context.json         how `weft` finds the mesh
//! .weft/mesh.json            the ports
//! .weft/mesh.yaml            the sample resources, to read and to change
//! .weft/processes.json       what runs, for whoever has to clean up
//! .weft/pg/                  the private PostgreSQL cluster
//! .weft/controller/          the root's key, the operator's credential
//! .weft/proxies/<instance>/  one sidecar's identity and last good snapshot
//! .weft/logs/                one log per process, and per sidecar its connections
//! .weft/secrets/             passwords and tokens, 0600
//! ```

use crate::error::StartError;
use serde::Serialize;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use weft_pgserver::log;

/// The home's usual name, in the current folder.
pub const HOME_DIR: &str = ".weft";
/// The context file in the home.
pub const CONTEXT_FILE: &str = "context.json";

/// How much of a log's end an error shows.
const TAIL_LINES: usize = 15;

/// Paths in a home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    dir: PathBuf,
}

/// The right to be the only one in a home; ends with the process that holds it.
#[derive(Debug)]
pub(crate) struct HomeLock {
    _file: File,
}

impl Home {
    /// The home at `dir`, whether it exists or not.
    #[must_use]
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The folder itself.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How `weft` finds the mesh.
    #[must_use]
    pub fn context(&self) -> PathBuf {
        self.dir.join(CONTEXT_FILE)
    }

    /// The sample resources.
    #[must_use]
    pub fn resources(&self) -> PathBuf {
        self.dir.join("mesh.yaml")
    }

    /// The logs.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// One process's log.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs().join(format!("{name}.log"))
    }

    /// The records of one sidecar's connections, one JSON object per line.
    #[must_use]
    pub fn connections(&self, instance: &str) -> PathBuf {
        self.logs().join(format!("{instance}.connections.jsonl"))
    }

    /// A secret.
    #[must_use]
    pub fn secret(&self, name: &str) -> PathBuf {
        self.dir.join("secrets").join(name)
    }

    /// The private PostgreSQL cluster.
    #[must_use]
    pub fn postgres(&self) -> PathBuf {
        self.dir.join("pg")
    }

    /// The controller's state.
    #[must_use]
    pub fn controller(&self) -> PathBuf {
        self.dir.join("controller")
    }

    /// One sidecar's state.
    #[must_use]
    pub fn proxy(&self, instance: &str) -> PathBuf {
        self.dir.join("proxies").join(instance)
    }

    pub(crate) fn ports(&self) -> PathBuf {
        self.dir.join("mesh.json")
    }

    pub(crate) fn processes(&self) -> PathBuf {
        self.dir.join("processes.json")
    }

    fn lock_file(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// Makes the folders. The home itself is passable, since PostgreSQL may run as another user below it; what others
    /// must not see has a mode of its own.
    pub(crate) fn create(&mut self) -> Result<(), StartError> {
        let create = |dir: &Path, mode: u32| {
            let made = DirBuilder::new().recursive(true).mode(mode).create(dir);
            made.map_err(StartError::io(format!("creating {}", dir.display())))
        };
        create(&self.dir, 0o711)?;
        // Children run elsewhere, so their paths must not depend on where we are.
        let dir = self.dir.canonicalize();
        self.dir = dir.map_err(StartError::io(format!("resolving {}", self.dir.display())))?;
        create(&self.dir.join("secrets"), 0o700)?;
        create(&self.controller(), 0o700)?;
        create(&self.dir.join("proxies"), 0o700)?;
        create(&self.logs(), 0o700)
    }

    /// Takes the home for this process.
    pub(crate) fn lock(&self) -> Result<HomeLock, StartError> {
        let path = self.lock_file();
        let io = || StartError::io(format!("locking {}", path.display()));
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = opened.map_err(io())?;
        match file.try_lock() {
            Ok(()) => {
                file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(io())?;
                Ok(HomeLock { _file: file })
            }
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid).map_err(io())?;
                let pid = if pid.trim().is_empty() { "unknown" } else { pid.trim() };
                Err(StartError::AlreadyRuns { home: self.dir.clone(), pid: pid.to_owned() })
            }
            Err(TryLockError::Error(source)) => Err(io()(source)),
        }
    }

    /// The process that runs a mesh here now.
    ///
    /// # Errors
    /// The lock cannot be looked at.
    pub fn holder(&self) -> io::Result<Option<i32>> {
        let mut file = match File::open(self.lock_file()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(None),
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid)?;
                pid.trim().parse().map(Some).map_err(|_| io::Error::other("the lock names no process"))
            }
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

/// Replaces a file as a whole, readable by us only: after a crash it is the old one or the new one.
pub(crate) fn write_private(path: &Path, content: &str) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    // 0600 from the start, as tempfile makes it.
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(content.as_bytes())?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

/// As [`write_private`], a value as JSON.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write_private(path, &(serde_json::to_string_pretty(value)? + "\n"))
}

/// A log to append to; a long one is moved aside first.
pub(crate) fn open_log(path: &Path) -> io::Result<File> {
    log::open(path, 0o600)
}

/// The last lines of a file, indented; empty if it cannot be read.
#[must_use]
pub fn tail(path: &Path) -> String {
    let lines = log::tail(path, TAIL_LINES);
    let indented: Vec<String> = lines.lines().map(|line| format!("    {line}")).collect();
    indented.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let mut home = Home::at(dir.path().join(HOME_DIR));
        home.create().unwrap();
        (dir, home)
    }

    #[test]
    fn a_home_has_one_owner_and_names_it() {
        let (_dir, home) = home();
        assert_eq!(home.holder().unwrap(), None);
        let lock = home.lock().unwrap();
        assert_eq!(home.holder().unwrap(), Some(std::process::id().cast_signed()));
        let second = home.lock().unwrap_err();
        let text = second.to_string();
        assert!(text.contains(&std::process::id().to_string()) && text.contains("`weft down`"), "{text}");
        drop(lock);
        assert_eq!(home.holder().unwrap(), None);
        home.lock().unwrap();
    }

    #[test]
    fn secrets_are_ours_alone() {
        let (_dir, home) = home();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        write_private(&home.secret("a"), "x").unwrap();
        assert_eq!(mode(&home.secret("a")), 0o600);
        assert_eq!(mode(&home.dir().join("secrets")), 0o700);
    }

    #[test]
    fn a_tail_is_the_last_lines() {
        let (_dir, home) = home();
        let path = home.log("x");
        let lines: Vec<String> = (0..100).map(|i| i.to_string()).collect();
        fs::write(&path, lines.join("\n")).unwrap();
        let tail = tail(&path);
        assert!(tail.starts_with("    85\n") && tail.ends_with("    99"), "{tail}");
        assert_eq!(super::tail(&home.log("absent")), "");
    }
}
