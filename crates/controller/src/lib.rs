//! The control plane's process: configuration, start order, TLS listener, admin port, shutdown.
//!
//! [`start::Controller::start`] is the start order, top to bottom. Any number of controllers run on one database; all of them
//! serve, one projects.
//!
//! Deliberately absent: what the services do (`weft-api`), folding (`weft-projector`), issuing (`weft-identity`).
//!
//! Invariants: the listener is the only source of a caller's name; nothing is served before the log is folded; at
//! shutdown nothing that was acknowledged is lost, and nothing is waited for without a bound.

pub mod admin;
pub mod clock;
pub mod config;
mod history;
pub mod listener;
mod operator;
mod renewal;
pub mod start;

pub use config::{Config, OperatorIssue};
pub use operator::issue as issue_operator;
pub use start::Controller;
