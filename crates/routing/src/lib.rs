//! What follows from the events.
//!
//! [`RoutingState`] folds facts, scope by scope. [`Projection`] keeps, beside it, what sidecars get: **shards** (one
//! service's endpoints, one service's inbound policy, the trust bundle), each encoded once in canonical bytes and
//! hashed, and **manifests**, the lists of shards that the sidecars of one interest class run. [`Snapshot`] is the
//! other end: a manifest and its shards, decoded and checked, as a sidecar holds it. [`verdict`] is the one
//! evaluator; the sidecar asks it for every connection and [`why`] asks it for people. [`damping`] holds endpoints down
//! whose health flaps.
//!
//! Invariants kept here: I2 (the same facts give the same bytes, however they were batched), I3 (a snapshot is
//! whole or refused), I8 (one verdict). Pure: no I/O, no clock, no randomness. Called by the projector, the API and the
//! sidecar. [`Checkpoint`] is a projection as bytes, so that a start need not fold the whole log. Read `tests/golden/` to see it work.

mod address;
pub mod checkpoint;
pub mod damping;
pub mod decide;
#[cfg(feature = "fixture")]
#[expect(clippy::unwrap_used, clippy::missing_panics_doc, reason = "for tests only")]
pub mod fixture;
pub mod hash;
pub mod interest;
pub mod lane;
pub mod manifest;
pub mod projection;
mod rollout;
pub mod shard;
pub mod snapshot;
mod splice;
pub mod state;
pub mod verdict;
pub mod why;
mod wire;

pub use checkpoint::{Checkpoint, CheckpointError, FOLD_VERSION};
pub use hash::{Hash, HashStart};
pub use interest::{ClassId, InterestClass};
pub use lane::Lane;
pub use manifest::Manifest;
pub use projection::{Bulk, Changes, Projection};
pub use shard::{EndpointsShard, InboundShard, ShardKey, TrustShard};
pub use snapshot::Snapshot;
pub use splice::Splice;
pub use state::RoutingState;
