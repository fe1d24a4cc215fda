//! The control plane in one thread with one seed, under faults, with every invariant checked after each step.
//!
//! **What is real**: the code that decides. The fold, shards and manifests (`weft-routing`), who writes and what is published
//! ([`weft_projector::Leadership`], [`weft_projector::View`]), what a subscriber is told and what a pull brings
//! ([`weft_api::telling`], [`weft_api::pull`]), what a sidecar takes, keeps and acknowledges ([`weft_client::follow`],
//! [`weft_client::take`], [`weft_client::stored`]), which requests of a batch are accepted ([`weft_eventlog::decide`]).
//!
//! **What is modelled**: PostgreSQL (`database.rs`, with its assumptions), the network, disks, clocks, and the order in which tasks ask
//! for the decisions (`world/`). A model's fault is not found here: the torture of the log and the stories run the real ones.
//!
//! **What is looked at** ([`run()`]): acknowledged commands are in the log once (I1); every fold, start, row and publication is what the log
//! says, and rows are written by the lease's holder alone (I2); a sidecar runs what its version had in one of the log's
//! histories, whole (I3), never an older one, across restarts (I4), with its disk's from its start on (I5), with nothing from a spoiled disk
//! (I6), of its own service (I7). Where the faults of a seed end, everybody gets to the log's end, and then a change
//! reaches everybody within the mesh's bound.
//!
//! That it finds faults is tested with [`Plant`]s. `README.md` says how to use it.

mod database;
mod oracle;
mod plant;
mod run;
mod trace;
mod world;

pub use plant::Plant;
pub use run::{Outcome, run};
