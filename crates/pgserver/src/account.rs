//! Whom the server's processes run as.
//!
//! PostgreSQL refuses to run as root. As root, its programs are started under an unprivileged account; this process
//! keeps its own. As anybody else, they run as we do.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, lchown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::{Pid, Uid, User, geteuid};

/// Accounts to run the server under when we are root, best first: the one that the packages create, then the one that
/// every system has.
const UNPRIVILEGED: &[&str] = &["postgres", "nobody"];

/// The account of the server's processes.
#[derive(Debug, Clone)]
pub(crate) struct Account {
    /// Set when it is not our own: the uid and gid to change to.
    change_to: Option<(u32, u32)>,
    name: String,
}

impl Account {
    /// Our own account, or, as root, the unprivileged one: the owner of the data where there is some, so that a cluster
    /// made by a user still works when root starts it, else the best one that exists. `None`: root, and none exists.
    pub(crate) fn choose(data: Option<&Path>) -> io::Result<Option<Self>> {
        let ours = geteuid();
        if !ours.is_root() {
            return Ok(Some(Self { change_to: None, name: format!("uid {ours}") }));
        }
        let owner = match data.map(fs::metadata) {
            Some(Ok(found)) if found.uid() != 0 => Some((found.uid(), found.gid())),
            _ => None,
        };
        if let Some((uid, gid)) = owner {
            let name =
                User::from_uid(Uid::from_raw(uid))?.map_or_else(|| format!("uid {uid}"), |user| user.name);
            return Ok(Some(Self { change_to: Some((uid, gid)), name }));
        }
        for name in UNPRIVILEGED {
            if let Some(user) = User::from_name(name)? {
                return Ok(Some(Self {
                    change_to: Some((user.uid.as_raw(), user.gid.as_raw())),
                    name: user.name,
                }));
            }
        }
        Ok(None)
    }

    /// The account's name, for messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A command that runs under this account, from `/`, untouched by the caller's `PG…` settings and language.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        // The caller's folder may be one that the account cannot enter.
        command.current_dir("/").env("LC_ALL", "C");
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        if let Some((uid, gid)) = self.change_to {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// Gives a file or folder to this account; of a link, the link itself.
    pub(crate) fn give(&self, path: &Path) -> io::Result<()> {
        match self.change_to {
            Some((uid, gid)) => lchown(path, Some(uid), Some(gid)),
            None => Ok(()),
        }
    }

    /// Whether the account can enter a folder. Asked by trying, since access lists and mounts have a say too.
    pub(crate) fn reaches(&self, dir: &Path) -> io::Result<bool> {
        if self.change_to.is_none() {
            return Ok(true);
        }
        let status = self
            .command("/bin/sh")
            .args(["-c", "cd -- \"$1\"", "sh"])
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        Ok(status.success())
    }

    /// The working directory of a process, asked as this account: root without `CAP_SYS_PTRACE`, as in most containers,
    /// may not look at other accounts' processes, but each account may look at its own. `None` if it cannot be told.
    pub(crate) fn working_dir_of(&self, pid: Pid) -> io::Result<Option<PathBuf>> {
        let output = self
            .command("/bin/sh")
            .args(["-c", "cd -P -- \"$1\" && pwd -P", "sh"])
            .arg(format!("/proc/{pid}/cwd"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()?;
        let path = output.stdout.strip_suffix(b"\n").filter(|_| output.status.success());
        Ok(path.map(|path| PathBuf::from(OsStr::from_bytes(path))))
    }

    /// Whether files of this owner can serve as the server's data, which must be its own.
    pub(crate) fn owns(&self, path: &Path) -> io::Result<bool> {
        let uid = self.change_to.map_or_else(|| geteuid().as_raw(), |(uid, _)| uid);
        Ok(fs::metadata(path)?.uid() == uid)
    }
}
