//! The Weft sidecar: forwards TCP between workloads over mTLS, from a local snapshot alone.
//!
//! A connection's way, and where to read it: the app connects to a local address ([`listeners`]), an endpoint is chosen
//! and a tunnel opened to it ([`outbound`], [`routes`], [`balance`], [`tls`]), the other sidecar checks the policy and
//! dials its app ([`inbound`]), bytes move ([`tunnel`]), a record is written ([`connections`], [`records`]).
//!
//! Other ways in than a listener of its own: the kernel redirects ([`redirect`]), and names lead to addresses ([`dns`]). An app waits
//! at the [`gate`] until there is something behind them.
//!
//! Another process takes its place without a connection refused: [`upgrade`].
//!
//! Data path and control are apart. Data-plane threads ([`worker`]) read the snapshot through an atomic pointer
//! ([`shared`]); they take no lock that control tasks hold for long and ask nobody. Control tasks ([`discovery`],
//! [`health`], [`admin`], [`drain`]) run on the caller's runtime, and the data path goes on when all of them fail.
//!
//! Invariants kept here: I3 (a snapshot is swapped in whole), I4 (never an older one), I5 (without a controller the last
//! one goes on), I6 (without one nothing passes), I7 (who a peer is comes from its leaf), I9 (bytes), I10 (bounds), I11 (every
//! end has a reason). Deliberately absent: SQL, decisions about policy (that is `weft-routing`).
//!
//! All use of `socket2` is in [`socket`], all use of TLS on the data path in [`tls`]. Start with [`app`], then
//! [`outbound`]. The tests in `tests/` run two sidecars against a scripted controller.

pub mod app;
pub mod cli;
pub mod config;
pub mod gate;
pub mod limits;
pub mod metrics;

mod admin;
mod balance;
mod budget;
mod clock;
mod connections;
mod demand;
mod discovery;
mod dns;
mod drain;
#[cfg(test)]
mod fuzz;
mod health;
mod inbound;
mod lifetime;
mod listeners;
mod outbound;
mod outlier;
mod preface;
mod records;
mod redirect;
mod routes;
mod shared;
mod socket;
mod standing;
mod status;
mod tally;
mod tls;
mod tunnel;
mod upgrade;
mod worker;

pub use app::{Proxy, StartError};
pub use config::{Cli, Config};
pub use discovery::join::JoinError;
pub use redirect::rules;
pub use socket::ListenError;
pub use upgrade::UpgradeError;
