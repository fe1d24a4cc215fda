//! A private PostgreSQL server as a child process, for the local mesh, for tests and for the developer's commands.
//!
//! The path through this crate: [`Binaries::find`] (or [`Binaries::find_or_install`]) locates a server of
//! [`MIN_MAJOR`] or newer; [`Cluster::open`] takes the directory for itself and runs `initdb` once;
//! [`Cluster::start`] gives a [`Server`] that accepts connections; [`Server::stop`], or dropping it, ends it.
//!
//! # Why not a crate made for this
//!
//! `postgresql_embedded` downloads server binaries and brings an HTTP client along, and its companion for root changes
//! the user of the *whole process*, which a controller in the same process cannot have. What is needed here is
//! `initdb` and `postgres` run under another uid, which is what [`std::process::Command`] does.
//!
//! # Deliberately absent
//!
//! No SQL client: readiness is read from `postmaster.pid`, as `pg_ctl` does. No async: callers on a runtime use
//! `spawn_blocking`. No tuning of a database one has elsewhere: this server is only ever our own.
//!
//! # Invariants
//!
//! - One owner per directory: a file lock, which dies with its holder, guards it. Whoever holds the lock and finds a
//!   server still running there has found an orphan, and stops it before starting its own.
//! - No server outlives its owner: a watchdog process (see `watchdog.rs`) stops it even if the owner is killed.
//! - Only loopback and a unix socket of mode 0700; every connection needs the password. `fsync` is on.
//! - As root, nothing but `data/`, `socket/` and `password` is given to the unprivileged account.
//! - A directory holds either no data or a complete `initdb`: the data directory appears by rename.

mod account;
mod binaries;
mod cluster;
mod home;
mod install;
pub mod log;
mod port;
mod server;
mod watchdog;

pub use binaries::{Binaries, FindError, MIN_MAJOR};
pub use cluster::{Cluster, ClusterConfig, OpenError, SUPERUSER};
pub use install::{InstallError, root_shell};
pub use port::reserve_loopback_port;
pub use server::{Server, StartError, StopError};

/// Where progress goes: one line of text for a person, without a line end.
pub type Say<'a> = &'a mut dyn FnMut(&str);
