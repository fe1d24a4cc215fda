//! A cluster at rest: its folder, taken for this process and initialised.
//!
//! In the folder asked for: `lock` (held while the cluster is open, holding our pid) and `server.log`. In the home, which
//! is that folder or the one that its link `home` names: `data/`, `socket/` and `password`.
//!
//! Called by the local mesh, the test kit and xtask; goes on to [`Server`](crate::Server).

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::account::Account;
use crate::binaries::Binaries;
use crate::{Say, home};

/// The role that owns the cluster. Every URL given out connects as this role.
pub const SUPERUSER: &str = "weft";

/// What a cluster is made of and how its server listens.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// The cluster's folder; created where missing. Keep it and what is above it passable (mode 0711 or more) for
    /// others, or, as root, the data goes elsewhere (with a link to it).
    pub dir: PathBuf,
    /// The loopback port to listen on; `None` picks a free one at each start.
    pub port: Option<u16>,
    /// PostgreSQL settings, name and value, over this crate's own.
    pub settings: Vec<(String, String)>,
}

impl ClusterConfig {
    /// A cluster in `dir`, on a free port, with the default settings.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), port: None, settings: Vec::new() }
    }
}

/// An initialised cluster that this process has for itself, and that no server runs on.
pub struct Cluster {
    pub(crate) binaries: Binaries,
    pub(crate) config: ClusterConfig,
    pub(crate) account: Account,
    pub(crate) home: PathBuf,
    pub(crate) password: String,
    /// Keeps others out until dropped. Declared before the folder that contains it, so released first.
    _lock: File,
    /// The folder, if it is to vanish with the cluster.
    pub(crate) scratch: Option<TempDir>,
}

/// A cluster could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Somebody else has it open.
    #[error("the PostgreSQL cluster in {} is in use by process {holder}; stop that first", dir.display())]
    InUse {
        /// The cluster's folder.
        dir: PathBuf,
        /// The holder's pid, or `unknown`.
        holder: String,
    },
    /// We are root and there is nobody else to be.
    #[error(
        "PostgreSQL does not run as root, and there is neither a user `postgres` nor `nobody` to run it as; create one with `useradd --system postgres`"
    )]
    NoAccount,
    /// The data belongs to another user.
    #[error("the PostgreSQL data in {} belongs to another user than {account}; start as its owner or as root, or remove {} to begin with an empty log", data.display(), dir.display())]
    WrongOwner {
        /// The data directory.
        data: PathBuf,
        /// The account that the server would run under.
        account: String,
        /// What to remove.
        dir: PathBuf,
    },
    /// The server's account can no longer reach existing data.
    #[error("PostgreSQL runs as {account}, who cannot enter {}; make the folders above it passable with `chmod o+x`", data.display())]
    Unreachable {
        /// The data directory.
        data: PathBuf,
        /// The account that the server would run under.
        account: String,
    },
    /// The data needs another PostgreSQL version than the one that is installed.
    #[error("the data in {} was made by PostgreSQL {data_major}, and only version {server_major} is installed; install PostgreSQL {data_major}, or remove {} to begin with an empty log", data.display(), dir.display())]
    VersionMismatch {
        /// The data directory.
        data: PathBuf,
        /// The version that made the data.
        data_major: String,
        /// The version that is installed.
        server_major: u32,
        /// What to remove.
        dir: PathBuf,
    },
    /// The link to the data, or the password beside the data, is there without the other.
    #[error("{} is missing, though {} belongs to a cluster that needs it; restore it, or remove {} to begin with an empty log", missing.display(), present.display(), dir.display())]
    Incomplete {
        /// What is missing.
        missing: PathBuf,
        /// What is there.
        present: PathBuf,
        /// What to remove.
        dir: PathBuf,
    },
    /// `initdb` failed.
    #[error("initdb failed in {}: {output}", dir.display())]
    Initdb {
        /// The cluster's folder.
        dir: PathBuf,
        /// What it printed.
        output: String,
    },
    /// A file operation failed.
    #[error("preparing the PostgreSQL cluster in {} failed", dir.display())]
    Io {
        /// The cluster's folder.
        dir: PathBuf,
        /// Which failure.
        source: io::Error,
    },
}

impl Cluster {
    /// Takes the folder for this process and initialises it where it holds no data yet. Nothing is started.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]. Existing data is never changed or removed.
    pub fn open(binaries: Binaries, mut config: ClusterConfig, say: Say<'_>) -> Result<Self, OpenError> {
        let given = config.dir.clone();
        let io_error = |source| OpenError::Io { dir: given.clone(), source };
        home::create_passable(&config.dir).map_err(io_error)?;
        config.dir = config.dir.canonicalize().map_err(io_error)?;
        let lock = lock(&config.dir)?;

        let data = home::chosen(&config.dir).join("data");
        let account = Account::choose(Some(&data)).map_err(io_error)?.ok_or(OpenError::NoAccount)?;
        let (home, binaries) = if data.exists() {
            let binaries =
                check_existing(&config.dir, &data, &account, binaries).map_err(|e| e.or(io_error))?;
            (home::chosen(&config.dir), binaries)
        } else if config.dir.join("home").is_symlink() {
            let present = config.dir.join("home");
            return Err(OpenError::Incomplete { missing: data, present, dir: config.dir });
        } else {
            (home::choose(&config.dir, &account, say).map_err(io_error)?, binaries)
        };

        let password = password(&home, &account, data.exists()).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => OpenError::Incomplete {
                missing: home.join("password"),
                present: home.join("data"),
                dir: config.dir.clone(),
            },
            _ => io_error(error),
        })?;
        private_dir(&home.join("socket"), &account).map_err(io_error)?;
        let cluster = Self { binaries, config, account, home, password, _lock: lock, scratch: None };
        if !cluster.data_dir().exists() {
            say(&format!(
                "creating a PostgreSQL {} cluster in {}",
                cluster.binaries.major(),
                cluster.home.display()
            ));
            cluster.initdb()?;
        }
        Ok(cluster)
    }

    /// A new cluster in a folder of its own, on a free port, which is removed when the cluster is dropped or its
    /// process dies.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open_scratch(binaries: Binaries, say: Say<'_>) -> Result<Self, OpenError> {
        let system = std::env::temp_dir();
        let io_error = |source| OpenError::Io { dir: system.clone(), source };
        let account = Account::choose(None).map_err(io_error)?.ok_or(OpenError::NoAccount)?;
        let mut parent = PathBuf::from("/tmp");
        if account.reaches(&system).map_err(io_error)? {
            parent.clone_from(&system);
        }
        let scratch = tempfile::Builder::new().prefix("weft-pg-").tempdir_in(parent).map_err(io_error)?;
        fs::set_permissions(scratch.path(), Permissions::from_mode(0o711)).map_err(io_error)?;
        let mut cluster = Self::open(binaries, ClusterConfig::new(scratch.path()), say)?;
        cluster.scratch = Some(scratch);
        Ok(cluster)
    }

    /// PostgreSQL settings for its server, over those that it has.
    #[must_use]
    pub fn with_settings(mut self, settings: &[(&str, &str)]) -> Self {
        self.config.settings.extend(settings.iter().map(|(name, value)| ((*name).into(), (*value).into())));
        self
    }

    /// The server's data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.home.join("data")
    }

    /// The file with the superuser's password, mode 0600, nothing else in it.
    pub fn password_file(&self) -> PathBuf {
        self.home.join("password")
    }

    /// What the server prints, over all its runs.
    pub fn log_file(&self) -> PathBuf {
        self.config.dir.join("server.log")
    }

    /// Runs initdb beside the final place and renames, so that a half-made data directory is never taken for a whole one.
    fn initdb(&self) -> Result<(), OpenError> {
        let io_error = |source| OpenError::Io { dir: self.config.dir.clone(), source };
        let unfinished = self.home.join("data.unfinished");
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).map_err(io_error)?;
        }
        private_dir(&unfinished, &self.account).map_err(io_error)?;
        let output = self
            .account
            .command(self.binaries.program("initdb"))
            .arg("--pgdata")
            .arg(&unfinished)
            .arg("--pwfile")
            .arg(self.password_file())
            .args(["--username", SUPERUSER, "--auth-local=scram-sha-256", "--auth-host=scram-sha-256"])
            .args(["--encoding=UTF8", "--locale=C", "--data-checksums", "--no-instructions"])
            .output()
            .map_err(io_error)?;
        if !output.status.success() {
            let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(OpenError::Initdb { dir: self.config.dir.clone(), output });
        }
        fs::rename(&unfinished, self.data_dir()).map_err(io_error)
    }
}

/// By hand, to leave the password out.
impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { binaries, config, account, home, password: _, _lock: _, scratch } = self;
        f.debug_struct("Cluster")
            .field("binaries", binaries)
            .field("config", config)
            .field("account", account)
            .field("home", home)
            .field("scratch", scratch)
            .finish_non_exhaustive()
    }
}

/// A refusal, or a file operation that failed.
enum CheckError {
    Refused(OpenError),
    Io(io::Error),
}

impl CheckError {
    fn or(self, io_error: impl FnOnce(io::Error) -> OpenError) -> OpenError {
        match self {
            Self::Refused(error) => error,
            Self::Io(source) => io_error(source),
        }
    }
}

impl From<io::Error> for CheckError {
    fn from(source: io::Error) -> Self {
        Self::Io(source)
    }
}

/// Whether a server can be started on existing data, and which one.
fn check_existing(
    dir: &Path,
    data: &Path,
    account: &Account,
    binaries: Binaries,
) -> Result<Binaries, CheckError> {
    let (dir, data, name) = (dir.to_owned(), data.to_owned(), account.name().to_owned());
    if !account.owns(&data)? {
        return Err(CheckError::Refused(OpenError::WrongOwner { data, account: name, dir }));
    }
    if !account.reaches(&data)? {
        return Err(CheckError::Refused(OpenError::Unreachable { data, account: name }));
    }
    let data_major = fs::read_to_string(data.join("PG_VERSION"))?.trim().to_owned();
    if data_major == binaries.major().to_string() {
        return Ok(binaries);
    }
    let server_major = binaries.major();
    data_major
        .parse()
        .ok()
        .and_then(Binaries::find_major)
        .ok_or(CheckError::Refused(OpenError::VersionMismatch { data, data_major, server_major, dir }))
}

/// Takes the folder. The lock is the kernel's: it goes with this process, however that ends.
fn lock(dir: &Path) -> Result<File, OpenError> {
    let io_error = |source| OpenError::Io { dir: dir.to_owned(), source };
    let path = dir.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(io_error)?;
    match file.try_lock() {
        Ok(()) => {
            file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(io_error)?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            file.read_to_string(&mut holder).map_err(io_error)?;
            let holder = if holder.trim().is_empty() { "unknown" } else { holder.trim() };
            Err(OpenError::InUse { dir: dir.to_owned(), holder: holder.to_owned() })
        }
        Err(TryLockError::Error(source)) => Err(io_error(source)),
    }
}

/// Creates a folder that only the server's account may use.
pub(crate) fn private_dir(dir: &Path, account: &Account) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    account.give(dir)
}

/// The superuser's password: read, or made from 192 random bits if the cluster is new. It belongs to the server's
/// account, since initdb reads it and keeps its verifier anyway.
fn password(home: &Path, account: &Account, exists: bool) -> io::Result<String> {
    let path = home.join("password");
    if exists || path.exists() {
        return Ok(fs::read_to_string(path)?.trim().to_owned());
    }
    let mut random = [0_u8; 24];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let password: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    // By rename, so that a crash leaves no file with half a password.
    let unfinished = home.join("password.unfinished");
    let _ = fs::remove_file(&unfinished);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
    writeln!(file, "{password}")?;
    account.give(&unfinished)?;
    fs::rename(&unfinished, path)?;
    Ok(password)
}
