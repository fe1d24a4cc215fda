//! Why a fold ends for good.

use weft_model::{ConfigVersion, Position};
use weft_routing::state::FoldError;

use crate::decode::Undecodable;

/// The log cannot be followed any further. Nothing is skipped: the projection stays as it is, and an operator has to
/// look.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// An event cannot be read by this version of Weft.
    #[error(
        "the log holds an event that this version of weft cannot read; run the version that wrote it, or a newer one"
    )]
    Undecodable(#[from] Undecodable),
    /// Events do not follow each other.
    #[error("the log is not in order; run `weft verify`")]
    Fold(#[source] FoldError),
    /// The log lost events that were folded, or is damaged. What was folded cannot be taken back: a restart folds the log
    /// as it is.
    #[error(
        "the log does not continue what was read of it; find out what was lost, then restart this controller"
    )]
    History(#[source] weft_eventlog::StoreError),
    /// The log is shorter than what was projected from it, and does not say that it began a new epoch.
    #[error(
        "LOG_REWOUND: events up to {projected} were projected, and the log now ends at {head}; restore the lost events"
    )]
    Rewound {
        /// The checkpoint.
        projected: ConfigVersion,
        /// The log's last event.
        head: Position,
    },
}
