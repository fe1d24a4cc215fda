//! The few connections that a reader shares, and the statements prepared on each.

use futures_util::StreamExt;
use std::pin::pin;
use std::sync::{Mutex, PoisonError};
use tokio::sync::Semaphore;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Config, Row, Statement};

use super::{rows, sealed};
use crate::rewind;
use crate::session::{Duty, READ_SILENCE_MAX, Session, StoreError, within};

/// Connections per reader. One page uses one connection for milliseconds; more would only compete with the appender
/// for the server's cores.
const CONNECTIONS_MAX: usize = 4;

/// The statements that readers use.
#[derive(Clone, Copy, Debug)]
pub(super) enum Query {
    Head,
    Range,
    Segment,
    PositionAt,
    Outcomes,
    Evidence,
    Anchor,
    Rewinds,
    GivenUp,
    Adoption,
}

impl Query {
    /// Every query, in the order of its declaration.
    const ALL: [Self; 10] = [
        Self::Head,
        Self::Range,
        Self::Segment,
        Self::PositionAt,
        Self::Outcomes,
        Self::Evidence,
        Self::Anchor,
        Self::Rewinds,
        Self::GivenUp,
        Self::Adoption,
    ];

    const fn sql(self) -> &'static str {
        match self {
            Self::Head => rows::HEAD_SQL,
            Self::Range => rows::RANGE_SQL,
            Self::Segment => sealed::SEGMENT_SQL,
            Self::PositionAt => "select audit.position_at($1)",
            Self::Outcomes => rows::OUTCOMES_SQL,
            Self::Evidence => rows::EVIDENCE_SQL,
            Self::Anchor => rows::ANCHOR_SQL,
            Self::Rewinds => rewind::REWINDS_SQL,
            Self::GivenUp => rewind::GIVEN_UP_SQL,
            Self::Adoption => rewind::ADOPTION_SQL,
        }
    }

    const fn doing(self) -> &'static str {
        match self {
            Self::Head => "read the log's head",
            Self::Range => "read events",
            Self::Segment => "read sealed events",
            Self::PositionAt => "find a point in time",
            Self::Outcomes => "look up a command id",
            Self::Evidence => "read what testifies about the log",
            Self::Anchor => "look for an event that was read before",
            Self::Rewinds | Self::GivenUp => "look whether the log was rewound",
            Self::Adoption => "look whether the log was adopted",
        }
    }
}

#[derive(Debug)]
pub(super) struct Pool {
    config: Config,
    permits: Semaphore,
    idle: Mutex<Vec<Connection>>,
}

#[derive(Debug)]
struct Connection {
    session: Session,
    /// Indexed by [`Query`]; prepared when first used.
    statements: [Option<Statement>; Query::ALL.len()],
}

impl Pool {
    pub(super) fn new(config: Config) -> Self {
        Self { config, permits: Semaphore::new(CONNECTIONS_MAX), idle: Mutex::new(Vec::new()) }
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// Runs a query and returns its first rows, up to and including the one that reaches `bytes_max`.
    ///
    /// A connection that had died while idle is replaced once; queries change nothing, so that is safe. One that is
    /// silent for too long is given up, and replaced likewise.
    pub(super) async fn rows(
        &self,
        query: Query,
        params: &[&(dyn ToSql + Sync)],
        bytes_max: usize,
    ) -> Result<Vec<Row>, StoreError> {
        let _permit = self.permits.acquire().await.map_err(|_| StoreError::Unanswered)?;
        if let Some(mut connection) = self.take_idle() {
            let result = connection.rows(query, params, bytes_max).await;
            if !result.as_ref().is_err_and(is_about_the_connection) {
                self.give_back(connection);
                return result;
            }
        }
        let session = Session::open(&self.config, Duty::Read).await?;
        let mut connection = Connection { session, statements: Default::default() };
        let result = connection.rows(query, params, bytes_max).await;
        if result.is_ok() {
            self.give_back(connection);
        }
        result
    }

    fn take_idle(&self) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|connection| !connection.session.client.is_closed());
        idle.pop()
    }

    fn give_back(&self, connection: Connection) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }
}

/// The server or the network ended the connection; the query itself was not refused.
fn is_about_the_connection(error: &StoreError) -> bool {
    error.sql_state().is_none_or(|state| matches!(state.code().get(..2), Some("57" | "08")))
}

impl Connection {
    async fn rows(
        &mut self,
        query: Query,
        params: &[&(dyn ToSql + Sync)],
        bytes_max: usize,
    ) -> Result<Vec<Row>, StoreError> {
        let failed = StoreError::while_doing(query.doing());
        let statement = match &self.statements[query as usize] {
            Some(statement) => statement.clone(),
            None => {
                let preparing = self.session.client.prepare(query.sql());
                let statement = within(READ_SILENCE_MAX, preparing).await?.map_err(&failed)?;
                self.statements[query as usize].insert(statement).clone()
            }
        };
        let stream = self.session.client.query_raw(&statement, params.iter().copied());
        let mut stream = pin!(within(READ_SILENCE_MAX, stream).await?.map_err(&failed)?);
        let (mut rows, mut bytes) = (Vec::new(), 0);
        while bytes < bytes_max
            && let Some(row) = within(READ_SILENCE_MAX, stream.next()).await?
        {
            let row = row.map_err(&failed)?;
            bytes = bytes.saturating_add(row.raw_size_bytes());
            rows.push(row);
        }
        Ok(rows)
    }
}
