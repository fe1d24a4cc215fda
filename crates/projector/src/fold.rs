//! Folding the log up to a position of the past: for questions about then, for replay, and for verification.

use futures_util::TryStreamExt;
use std::pin::pin;
use weft_eventlog::Reader;
use weft_model::{Fact, Position};
use weft_routing::Projection;

use crate::decode::{Undecodable, decode};
use crate::fault::Fault;

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

/// The projection after the event at `position`. Reads the log from its beginning, a page at a time; calls `progress`
/// after each page. Needs no more rights than `weft_reader` has.
///
/// # Errors
/// See [`FoldToError`].
pub async fn fold_to(
    reader: &Reader,
    position: Position,
    mut progress: impl FnMut(FoldProgress) + Send,
) -> Result<Projection, FoldToError> {
    let mut projection = Projection::default();
    let mut pages = pin!(reader.stream(Position::ZERO, position));
    while let Some(page) = pages.try_next().await? {
        let facts: Vec<Fact> =
            page.iter().map(decode).collect::<Result<_, Undecodable>>().map_err(Fault::from)?;
        projection.apply(&facts).map_err(Fault::Fold)?;
        progress(FoldProgress { folded: projection.version().position, of: position });
    }
    let head = projection.version().position;
    if head < position {
        return Err(FoldToError::NotYet { wanted: position, head });
    }
    Ok(projection)
}
