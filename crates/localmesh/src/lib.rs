//! A whole mesh on one machine, for `weft up` and for tests: PostgreSQL, a controller, and three sample services behind
//! a sidecar each, as real processes.
//!
//! [`LocalMesh::open`] takes the home folder for itself and cleans up after an earlier run that was killed;
//! [`LocalMesh::start`] brings everything up in order and waits until a request passes through the whole mesh;
//! [`LocalMesh::stop`] ends it in the reverse order. In between, single processes can be killed, started again and
//! added. Everything lives in the home ([`home`]), so the next start resumes the same log.
//!
//! # Deliberately absent
//!
//! No gRPC: tokens are made and resources applied by running `weft`, as a person would. No restarts by itself: what dies
//! is reported ([`LocalMesh::next_exit`]) and left for a person to look at.
//!
//! # Invariants
//!
//! - One owner per home, by a file lock that dies with its holder.
//! - No process outlives its owner, even one that was killed: a watchdog then stops what is left ([`leftover`]). It and
//!   every later start signal only processes that are proven to be ours, by start time.
//! - Secrets are files of mode 0600 in a folder of mode 0700; join tokens are removed once used.
//!
//! The tests with real meshes are in the end-to-end package; `supervisor.rs` has the ones with simple children.

mod admin;
mod child;
mod database;
mod error;
pub mod home;
pub mod leftover;
mod mesh;
mod ports;
mod sample;
mod supervisor;

pub use child::{ChildState, Exited};
pub use error::StartError;
pub use mesh::{Config, LocalMesh, Process, Programs, Sidecar, Stopped};
pub use ports::{BASE_PORT, PortChoice};

/// What happens while a mesh starts or stops, for a person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// This takes a moment.
    Doing(String),
    /// This is worth knowing.
    Note(String),
    /// This is done: what, where or with what result, and how long it took.
    Done {
        /// What was to be done.
        what: String,
        /// What came of it.
        detail: String,
        /// How long it took.
        took: std::time::Duration,
    },
}

/// Where progress goes.
pub type Report<'a> = &'a mut (dyn FnMut(Progress) + Send);
