//! Follows the log: folds events, stores what follows from them, and publishes it to the sidecars' side.
//!
//! Every controller runs one [`Projector`]. It tails the log and folds it into its [`View`] up to the head, whoever
//! writes: commands are decided against that. One of the projectors leads. It writes what each batch changed (shards,
//! manifests, status rows) together with its checkpoint in one transaction; only what a checkpoint covers is published,
//! by leader and followers alike. The module [`projector`] argues why a leader that lost its lease does no harm.
//!
//! A start goes on from a checkpoint of the fold, if there is a good one, and folds the rest of the log in bulk (the module
//! `checkpoint`). Verification never does.
//!
//! Deliberately absent: what an event means (`weft-model`, `weft-routing`), gRPC (`weft-api`), appending.
//!
//! Invariants: an event that cannot be read stops the fold ([`Fault`]), it is never skipped; rows and checkpoint
//! change together or not at all ([`Store::commit`]); what was published is part of the projection for good.
//!
//! Called by the controller (run), the API ([`View`], [`Store`]) and the command line ([`fold_to`], [`verify_rows`]).
//! Read `tests/` for takeover, fencing and tampering.

mod checkpoint;
mod decode;
mod fault;
#[cfg(test)]
mod fixture;
mod fold;
pub mod leadership;
pub mod projector;
pub mod published;
mod replay;
pub mod rows;
mod store;
mod verify;
mod view;
mod window;

pub use decode::{Decoder, Undecodable, UndecodableEvent};
pub use fault::Fault;
pub use fold::{FoldFrom, FoldProgress, FoldToError, fold_to};
pub use leadership::Leadership;
pub use projector::Projector;
pub use published::{
    Announced, Patch, Published, PublishedClass, PublishedShard, ShardChange, ShardPatch, WantedSnapshot,
};
pub use store::{
    Ack, CanaryWord, ClassAck, Commit, LeaderStatus, Lease, LeaseSession, Propagation, PropagationRow,
    Serving, SidecarStatus, Store, StoreError,
};
pub use verify::{Difference, RowsReport, VerifyRowsError, verify_rows};
pub use view::{Role, View};
