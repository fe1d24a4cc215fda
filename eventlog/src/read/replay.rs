//! Walking the log in bulk, from wherever its parts lie.

use tokio_postgres::Config;
use weft_model::version::Position;

use super::copy::Rows;
use super::sealed::{Segments, sealed_to};
use super::{REPLAY_SILENCE_MAX, broken};
use crate::page::Page;
use crate::session::{Duty, Session, StoreError, within};

/// While this lasts, no range is taken away from under the walk, so what is not sealed at its start stays where it is. Of the table
/// it matters only that nobody else locks it for long.
const STAND_STILL_SQL: &str = "begin read only; lock table weft.log_layout in access share mode";

/// A walk from `after` to `to`.
pub(super) struct Replay {
    config: Config,
    after: Position,
    to: Position,
    walk: Option<Walk>,
}

struct Walk {
    session: Session,
    sealed: Position,
    source: Source,
}

enum Source {
    Sealed(Segments),
    Rows(Rows),
}

impl Replay {
    pub(super) const fn new(config: Config, after: Position, to: Position) -> Self {
        Self { config, after, to, walk: None }
    }

    /// The next page; none at the end of the walk or of the log.
    pub(super) async fn next(&mut self) -> Result<Option<Page>, StoreError> {
        if self.after >= self.to {
            return Ok(None);
        }
        let walk = match &mut self.walk {
            Some(walk) => walk,
            none => none.insert(Walk::begin(&self.config, self.after, self.to).await?),
        };
        let page = walk.next(self.after, self.to).await?;
        self.after = page.as_ref().map_or(self.to, Page::last);
        Ok(page)
    }
}

impl Walk {
    async fn begin(config: &Config, after: Position, to: Position) -> Result<Self, StoreError> {
        let session = open_still(config).await?;
        let sealed = sealed_to(&session).await?;
        let source = if after < sealed {
            Source::Sealed(Segments::open(&session, after, to).await?)
        } else {
            Source::Rows(Rows::open(&session, after, to).await?)
        };
        Ok(Self { session, sealed, source })
    }

    async fn next(&mut self, after: Position, to: Position) -> Result<Option<Page>, StoreError> {
        if let Source::Sealed(segments) = &mut self.source {
            if let Some(segment) = segments.next().await? {
                let mut page = segment.open().map_err(|source| broken(&segment, source))?;
                page.clip(after, to);
                return Ok((!page.is_empty()).then_some(page));
            }
            if self.sealed >= to {
                return Ok(None);
            }
            self.source = Source::Rows(Rows::open(&self.session, self.sealed, to).await?);
        }
        match &mut self.source {
            Source::Rows(rows) => Ok(rows.next().await?.map(|(page, _)| page)),
            Source::Sealed(_) => Ok(None),
        }
    }
}

/// A session under which no range of the log is taken away.
pub(crate) async fn open_still(config: &Config) -> Result<Session, StoreError> {
    let session = Session::open(config, Duty::Read).await?;
    let begun = within(REPLAY_SILENCE_MAX, session.client.batch_execute(STAND_STILL_SQL)).await?;
    begun.map_err(StoreError::while_doing("begin to read"))?;
    Ok(session)
}
