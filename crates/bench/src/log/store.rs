//! Where a load goes: a door that our log and the baseline share.

use std::time::Duration;

use anyhow::Context as _;
use tokio::time::sleep;
use weft_eventlog::{AppendError, AppendRequest, Appended, Appender};

use crate::fleet::Lane;

/// What a caller asks for, again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// One event for one scope.
    One,
    /// As many events in a request, over randomly chosen scopes.
    Many(usize),
    /// As many events for one scope.
    ManyInOneScope(usize),
    /// One event; of a hundred requests so many expect a version that is past.
    Conflicting(u8),
}

/// What became of a request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Written {
    /// Events that are durable now.
    pub(crate) events: u64,
    /// Requests that were refused, as they were meant to be.
    pub(crate) refused: u64,
}

/// Where a load goes.
pub(crate) trait Store: Send + Sync + 'static {
    /// Writes one request and returns once it is durable.
    fn write(&self, lane: &mut Lane, load: Load) -> impl Future<Output = anyhow::Result<Written>> + Send;
}

/// Our log.
#[derive(Clone, Debug)]
pub(crate) struct Log(pub(crate) Appender);

impl Store for Log {
    async fn write(&self, lane: &mut Lane, load: Load) -> anyhow::Result<Written> {
        let request = match load {
            Load::One => lane.report()?.into_request(),
            Load::Many(count) => lane.reports(count)?,
            Load::ManyInOneScope(count) => lane.reports_of_one(count)?,
            Load::Conflicting(percent) if lane.chance(percent) => {
                return self.refuse(lane.stale_report()?.into_request()).await;
            }
            Load::Conflicting(_) => lane.report()?.into_request(),
        };
        let events = events(&self.append(request).await?);
        Ok(Written { events, refused: 0 })
    }
}

impl Log {
    /// Appends, and comes back when told to.
    pub(crate) async fn append(&self, request: AppendRequest) -> anyhow::Result<Appended> {
        loop {
            match self.0.append(request.clone()).await {
                Err(AppendError::Overloaded { retry_after_ms }) => {
                    sleep(Duration::from_millis(retry_after_ms)).await;
                }
                other => return other.context("an append failed"),
            }
        }
    }

    async fn refuse(&self, request: AppendRequest) -> anyhow::Result<Written> {
        match self.append(request).await {
            Ok(_) => anyhow::bail!("an append with a stale version was accepted"),
            Err(error) if matches!(error.downcast_ref(), Some(AppendError::Conflict { .. })) => {
                Ok(Written { events: 0, refused: 1 })
            }
            Err(error) => Err(error),
        }
    }
}

/// How many events an append recorded.
pub(crate) fn events(appended: &Appended) -> u64 {
    appended.positions.as_ref().map_or(0, |range| range.end().0 - range.start().0 + 1)
}
