//! One connection to PostgreSQL, the task that drives it, and what can go wrong with it.

use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_postgres::config::TargetSessionAttrs;
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls, Notification};

/// How long a TCP connection attempt may take per address, unless the configuration says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// After this long without an acknowledgement from a peer that owes one, the connection is dead. A COMMIT that waits
/// for a standby is not affected: the server's kernel acknowledges.
const TCP_SILENCE_MAX: Duration = Duration::from_secs(10);

/// Every statement of this crate walks one B-tree in order. Forbidding other plans keeps it so when statistics are
/// missing or stale, as they are on a new log.
const ONE_PLAN: &str = "set enable_seqscan = off; set enable_bitmapscan = off; set jit = off;";

/// The log's store could not do what it was asked. Repeating the operation is safe; an append must be repeated with
/// its command id.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No usable connection could be made.
    #[error("cannot connect to PostgreSQL")]
    Connect(#[source] Arc<tokio_postgres::Error>),
    /// A statement failed, or the connection was lost during it.
    #[error("PostgreSQL failed to {doing}")]
    Statement {
        /// What the statement was for.
        doing: &'static str,
        /// PostgreSQL's or the connection's error.
        #[source]
        source: Arc<tokio_postgres::Error>,
    },
    /// The server became unfit for the log since it was opened.
    #[error("the server is no longer fit to hold the log")]
    Unfit(#[source] Arc<crate::settings::SettingsError>),
    /// A value that only this crate writes is outside its domain.
    #[error("{table}.{column} holds a value that the log never writes")]
    Undecodable {
        /// Table of the value.
        table: &'static str,
        /// Column of the value.
        column: &'static str,
    },
    /// The log's tables are missing.
    #[error("the database has no event log; migrate it first")]
    NotMigrated,
    /// The store did not answer in time; the operation may still happen.
    #[error("PostgreSQL did not answer in time")]
    Unanswered,
}

impl StoreError {
    /// Wraps a failed statement; use as `.map_err(StoreError::while_doing("read events"))`.
    pub(crate) fn while_doing(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> Self {
        move |source| Self::Statement { doing, source: Arc::new(source) }
    }

    /// PostgreSQL's own code, where the server answered.
    pub(crate) fn sql_state(&self) -> Option<&SqlState> {
        match self {
            Self::Connect(source) | Self::Statement { source, .. } => source.code(),
            Self::Unfit(_) | Self::Undecodable { .. } | Self::NotMigrated | Self::Unanswered => None,
        }
    }
}

/// Where a session may end up when several hosts are configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    ReadOnly,
    ReadWrite,
}

/// A connection together with the task that drives it; dropping it ends both.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) client: Client,
    driver: JoinSet<()>,
}

impl Session {
    /// Connects; notifications are dropped.
    pub(crate) async fn open(config: &Config, access: Access) -> Result<Self, StoreError> {
        Self::open_with(config, access, |_| ()).await
    }

    /// Connects and hands every notification to `on_notification`.
    pub(crate) async fn open_with(
        config: &Config,
        access: Access,
        mut on_notification: impl FnMut(&Notification) + Send + 'static,
    ) -> Result<Self, StoreError> {
        let config = hardened(config, access);
        let connect = |error| StoreError::Connect(Arc::new(error));
        let (client, mut connection) = config.connect(NoTls).await.map_err(connect)?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // An error here also reaches whoever waits for an answer, so it is not reported twice.
            while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                if let AsyncMessage::Notification(notification) = &message {
                    on_notification(notification);
                }
            }
        });
        client.batch_execute(ONE_PLAN).await.map_err(connect)?;
        Ok(Self { client, driver })
    }

    /// Resolves when the connection has ended.
    pub(crate) async fn closed(&mut self) {
        while self.driver.join_next().await.is_some() {}
    }
}

fn hardened(config: &Config, access: Access) -> Config {
    let mut config = config.clone();
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_TIMEOUT);
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(TCP_SILENCE_MAX).keepalives_idle(TCP_SILENCE_MAX);
    }
    if config.get_application_name().is_none() {
        config.application_name("weft-eventlog");
    }
    if access == Access::ReadWrite {
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    }
    config
}
