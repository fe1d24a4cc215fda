//! A projection as bytes and back, so that a start folds the end of the log and not all of it.
//!
//! **Content.** Every scope's state, and what else follows from the log's *order* and not from the state: loopback
//! addresses, what the data plane sees of health, how endpoints are damped, the positions of shards, the event that put a sidecar into its class. What
//! follows from those (shards, manifests, who lives) is built again, by the code that runs, so a checkpoint cannot
//! bring an old encoding of them back.
//!
//! **Format.** A header and then one record per scope, in the order of scopes, each a protobuf message with its length
//! before it; a scope's state is JSON inside its record. Protobuf, because this crate speaks it already, because its
//! encoding by `prost` is deterministic, and because it allocates no more than the bytes it reads; JSON, because those are
//! the shapes that the payloads of events have, with their reading, their strictness and their compatibility, and a second
//! shape for each would be one more thing to keep equal. Records one by one, so that bytes which are not a checkpoint
//! are refused at the first record that is none, before they take memory. Ten thousand instances take some tens of
//! milliseconds. It is a cache in the reach of the one program that wrote it: no reader but [`decode`](Checkpoint::decode)
//! of the same [`FOLD_VERSION`] exists.
//!
//! **Canonical.** Equal projections have equal bytes. Bytes are not encoded again to see whether they are what is written,
//! as shards are: that would be half the time of a start, and whoever keeps them keeps their hash.
//!
//! Deliberately absent: where checkpoints are kept, and whether one belongs to the log that is there (the projector's);
//! compression. `weft verify` never starts from one. Read `tests/properties.rs` (checkpoint and rest equal the whole)
//! and `tests/golden.rs` (bytes change only with the version).

mod read;
mod wire;
mod write;

use crate::projection::Projection;
use crate::shard::ShardKey;
use crate::state::RoutingState;
use std::collections::BTreeMap;
use weft_model::{ConfigVersion, InstanceId, Position};

/// Names what the fold makes of events and how a checkpoint writes it down. Raise it with every change of either: a
/// checkpoint of another version is not read, and the log is folded from its first event.
pub const FOLD_VERSION: u32 = 7;

/// A projection, as far as it cannot be built again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    state: RoutingState,
    shards: BTreeMap<ShardKey, Position>,
    since: BTreeMap<InstanceId, Position>,
}

/// Bytes are not a checkpoint of this version.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Another version of the fold wrote them.
    #[error("the checkpoint is of fold version {found}, not {FOLD_VERSION}")]
    Version {
        /// The version that they name.
        found: u32,
    },
    /// They end early, or are not protobuf.
    #[error("record {record} of the checkpoint is not readable")]
    Encoding {
        /// Which record; 0 is the header.
        record: u64,
        /// What is wrong.
        #[source]
        source: prost::DecodeError,
    },
    /// A scope's state does not have its shape.
    #[error("record {record} of the checkpoint holds a state that its scope cannot have")]
    State {
        /// Which record.
        record: u64,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A field has a value that it cannot have.
    #[error("record {record} of the checkpoint has a malformed {field}")]
    Field {
        /// Which record.
        record: u64,
        /// Which field.
        field: &'static str,
    },
}

impl Checkpoint {
    /// What there is to keep of a projection. Cheap beside encoding it: most of it is shared.
    #[must_use]
    pub fn of(projection: &Projection) -> Self {
        let position =
            |(key, shard): (&ShardKey, &crate::projection::BuiltShard)| (key.clone(), shard.position);
        Self {
            state: projection.state().clone(),
            shards: projection.shards().iter().map(position).collect(),
            since: projection.since().map(|(id, since)| (id.clone(), since)).collect(),
        }
    }

    /// The last event that is part of it.
    #[must_use]
    pub const fn version(&self) -> ConfigVersion {
        self.state.version()
    }

    /// The canonical bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        write::encode(self)
    }

    /// Reads bytes back. Takes memory in proportion to them, so bound them before.
    ///
    /// # Errors
    /// If they are not a checkpoint of this [`FOLD_VERSION`].
    pub fn decode(bytes: &[u8]) -> Result<Self, CheckpointError> {
        read::decode(bytes)
    }

    /// The projection, with all that follows.
    #[must_use]
    pub fn into_projection(self) -> Projection {
        let Self { state, shards, since } = self;
        Projection::of_state(
            state,
            |key| shards.get(key).copied().unwrap_or_default(),
            |id| since.get(id).copied().unwrap_or_default(),
        )
    }
}
