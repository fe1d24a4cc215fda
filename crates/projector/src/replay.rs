//! Folding many events at once, straight from the log's bulk reads, in memory that does not grow with the log.

use futures_util::TryStreamExt;
use std::pin::pin;
use weft_eventlog::{Reader, StoreError};
use weft_model::{ConfigVersion, Fact, Position};
use weft_routing::{Bulk, Projection};

use crate::decode::Decoder;
use crate::fault::Fault;

/// A fold under way.
#[derive(Debug)]
pub(crate) struct Replay {
    bulk: Bulk,
    decoder: Decoder,
    facts: Vec<Fact>,
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
        Self { bulk: projection.into_bulk(), decoder: Decoder::default(), facts: Vec::new() }
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
            let decoded = self.decoder.decode_into(page.events(), &mut self.facts);
            decoded.map_err(|undecodable| ReplayError::Fault(undecodable.into()))?;
            self.bulk.apply(&self.facts).map_err(|error| ReplayError::Fault(Fault::Fold(error)))?;
            progress(self.version().position);
        }
        Ok(())
    }

    /// What it comes to.
    pub(crate) fn finish(self) -> Projection {
        self.bulk.finish()
    }
}
