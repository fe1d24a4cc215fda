//! Folding many events at once, straight from the log's bulk reads, in memory that does not grow with the log.

use futures_util::TryStreamExt;
use std::pin::pin;
use weft_eventlog::{EventView, Reader, StoreError};
use weft_model::{ConfigVersion, Position};
use weft_routing::{Bulk, Projection};

use crate::decode::Decoder;
use crate::fault::Fault;

/// A fold under way.
#[derive(Debug)]
pub(crate) struct Replay {
    bulk: Bulk,
    decoder: Decoder,
}

/// Why a replay did not get to its end.
#[derive(Debug)]
pub(crate) enum ReplayError {
    /// The log could not be read; what was folded stays good.
    Store(StoreError),
    /// It holds what cannot be folded.
    Fault(Fault),
}

impl Replay {
    pub(crate) fn from(projection: Projection) -> Self {
        Self { bulk: projection.into_bulk(), decoder: Decoder::default() }
    }

    /// The last event that was folded.
    pub(crate) const fn version(&self) -> ConfigVersion {
        self.bulk.version()
    }

    /// Folds up to `to`, or to the log's end if that comes first. Calls `progress` after each page.
    pub(crate) async fn fold_to(
        &mut self,
        reader: &Reader,
        to: Position,
        mut progress: impl FnMut(Position) + Send,
    ) -> Result<(), ReplayError> {
        let mut pages = pin!(reader.replay(self.version().position, to));
        while let Some(page) = pages.try_next().await.map_err(ReplayError::Store)? {
            for event in page.events() {
                self.fold(&event).map_err(ReplayError::Fault)?;
            }
            progress(self.version().position);
        }
        Ok(())
    }

    /// One event at a time: what is read of it is folded while it is in the processor's cache.
    fn fold(&mut self, event: &EventView<'_>) -> Result<(), Fault> {
        let fact = self.decoder.decode(event)?;
        self.bulk.apply([&fact]).map_err(Fault::Fold)
    }

    /// What it comes to.
    pub(crate) fn finish(self) -> Projection {
        self.bulk.finish()
    }
}
