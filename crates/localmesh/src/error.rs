//! Why a local mesh does not start.

use crate::child::Exited;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A local mesh could not be opened or started. What was started before is stopped by [`LocalMesh::stop`].
///
/// [`LocalMesh::stop`]: crate::LocalMesh::stop
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Another process runs a mesh in this home.
    #[error("a local mesh runs already in {} (process {pid}); look at it with `weft status`, stop it with `weft down`", home.display())]
    AlreadyRuns {
        /// The home.
        home: PathBuf,
        /// Who runs it; `unknown` if it did not say.
        pid: String,
    },
    /// A port is taken.
    #[error(
        "port {port}, wanted for {what}, is taken by another program; find it with `ss -ltnp 'sport = :{port}'` and stop it, or choose other ports with `weft up --base-port N`"
    )]
    PortBusy {
        /// The port.
        port: u16,
        /// What it was wanted for.
        what: String,
    },
    /// A program of Weft is missing.
    #[error("{} is missing; build it with `cargo build -p weft-controller -p weft-proxy -p weft-cli`, or put it beside `weft`", path.display())]
    NoProgram {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// There is no PostgreSQL on this machine and it cannot be installed.
    #[error("PostgreSQL cannot be provided")]
    Install(#[from] weft_pgserver::InstallError),
    /// The private cluster cannot be opened.
    #[error("the private PostgreSQL cluster cannot be opened")]
    Cluster(#[from] weft_pgserver::OpenError),
    /// The private server does not start.
    #[error("the private PostgreSQL does not start")]
    Server(#[from] weft_pgserver::StartError),
    /// The databases and roles cannot be made.
    #[error("the database server does not let us {doing}")]
    Database {
        /// What was tried.
        doing: &'static str,
        /// Why it failed.
        source: tokio_postgres::Error,
    },
    /// `WEFT_DATABASE_URL` is not usable.
    #[error("the database URL cannot be used: {0}; write postgres://USER:PASSWORD@HOST:PORT/DATABASE")]
    DatabaseUrl(&'static str),
    /// A child ended while the mesh started.
    #[error("{0}")]
    Exited(Exited),
    /// A child is not ready in time.
    #[error("{name} is not ready after {} s: {why}\n  the end of {}:\n{tail}", after.as_secs(), log.display())]
    NotReady {
        /// The child.
        name: String,
        /// What was waited for.
        why: String,
        /// How long was waited.
        after: Duration,
        /// Its log.
        log: PathBuf,
        /// The log's end.
        tail: String,
    },
    /// A `weft` command that sets the mesh up failed.
    #[error("`weft {command}` failed:\n{output}")]
    Command {
        /// Its arguments.
        command: String,
        /// What it said.
        output: String,
    },
    /// No process or instance of this name.
    #[error("the local mesh has no {0:?}; it has {1}")]
    Unknown(String, String),
    /// A file or process operation failed.
    #[error("{doing} failed")]
    Io {
        /// What was tried.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl StartError {
    /// For `map_err` on a file or process operation.
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}
