//! Folding the log up to a position of the past: for questions about then, for replay, and for verification.

use weft_eventlog::Reader;
use weft_model::Position;
use weft_routing::Projection;

use crate::checkpoint;
use crate::fault::Fault;
use crate::replay::{Replay, ReplayError};
use crate::store::Store;

/// How far a fold has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoldProgress {
    /// The last event that was folded.
    pub folded: Position,
    /// The last one that will be.
    pub of: Position,
}

/// The log could not be folded.
#[derive(Debug, thiserror::Error)]
pub enum FoldToError {
    /// It could not be read.
    #[error("the log could not be read")]
    Store(#[from] weft_eventlog::StoreError),
    /// It holds what cannot be folded.
    #[error("the log could not be folded")]
    Fault(#[from] Fault),
    /// It ends before the position.
    #[error("the log ends at position {head}, before {wanted}")]
    NotYet {
        /// The position asked for.
        wanted: Position,
        /// The log's last event.
        head: Position,
    },
}

/// What a fold begins with.
#[derive(Clone, Copy, Debug)]
pub enum FoldFrom<'a> {
    /// The log's first event: what comes out rests on the log alone. For verification.
    FirstEvent,
    /// The newest stored checkpoint at or before the position that can be gone on from, if there is one.
    Checkpoint(&'a Store),
}

/// The projection after the event at `position`. Reads the log in bulk; calls `progress` after each page. Needs no more
/// rights than `weft_reader` has.
///
/// # Errors
/// See [`FoldToError`].
pub async fn fold_to(
    reader: &Reader,
    position: Position,
    from: FoldFrom<'_>,
    mut progress: impl FnMut(FoldProgress) + Send,
) -> Result<Projection, FoldToError> {
    let begin = match from {
        FoldFrom::FirstEvent => Projection::default(),
        FoldFrom::Checkpoint(store) => checkpoint::load(store, reader, position).await,
    };
    let mut replay = Replay::from(begin);
    replay.fold_to(reader, position, |folded| progress(FoldProgress { folded, of: position })).await?;
    let head = replay.version().position;
    if head < position {
        return Err(FoldToError::NotYet { wanted: position, head });
    }
    Ok(replay.finish())
}

impl From<ReplayError> for FoldToError {
    fn from(error: ReplayError) -> Self {
        match error {
            ReplayError::Store(error) => Self::Store(error),
            ReplayError::Fault(fault) => Self::Fault(fault),
        }
    }
}
