//! One connection to PostgreSQL, the task that drives it, and what can go wrong with it.

use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_postgres::config::TargetSessionAttrs;
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls, Notification};
use weft_model::version::Position;

/// How long a TCP connection attempt may take per address, unless the configuration says otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// After this long without an acknowledgement from a peer that owes one, the connection is dead. A COMMIT that waits
/// for a standby is not affected: the server's kernel acknowledges.
const TCP_SILENCE_MAX: Duration = Duration::from_secs(10);
/// Pause between two probes of a connection on which nothing was sent. The silence above is only looked at when a probe
/// is due, and the system's own pause is 75 s.
const TCP_PROBE_EVERY: Duration = Duration::from_secs(2);
/// How long a live server takes to let a login in, once the connection is made.
const LOGIN_MAX: Duration = Duration::from_secs(5);
/// Longest silence of the server while it works on what only reads. Each of these statements takes milliseconds, so a
/// server that is silent for so long is gone, or has stopped, which its kernel's acknowledgements would hide.
/// Commits have no such bound: see `append/writer.rs`.
pub(crate) const READ_SILENCE_MAX: Duration = Duration::from_secs(5);

/// Every statement of this crate that reads a table of the log walks a B-tree from a point on, and none reads more than
/// a page or a batch needs. Forbidding other plans keeps it so when statistics are missing or stale, as they are on a
/// new log.
const ONE_PLAN: &str = "set enable_seqscan = off; set enable_bitmapscan = off; set jit = off;";

/// The log's store could not do what it was asked. Repeating the operation is safe; an append must be repeated with
/// its command id.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No usable connection could be made.
    #[error("cannot connect to PostgreSQL")]
    Connect(#[source] Arc<tokio_postgres::Error>),
    /// The login may not act in the role that has the rights for this.
    #[error(
        "the login may not act as {role}; as an administrator of the database run: grant {role} to the login"
    )]
    Role {
        /// The role.
        role: &'static str,
        /// PostgreSQL's error.
        #[source]
        source: Arc<tokio_postgres::Error>,
    },
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
    /// An event that a tail has delivered, or was told to begin after, is not in the log any more or is another one:
    /// the database lost its tail, as a failover or a restored backup does. What was derived from the lost events is
    /// wrong, so whoever follows must begin anew; going on or asking again does not help.
    #[error("LOG_REWOUND: event {seen} is not in the log as it was read; the log now ends at {found}")]
    Rewound {
        /// The last event that was read before.
        seen: Position,
        /// Where the log ends now.
        found: Position,
    },
    /// Sealed events are not what was sealed.
    #[error("the segment of events from {first} on is damaged; run `weft verify`")]
    Segment {
        /// Its first event.
        first: Position,
        /// What is wrong with it.
        #[source]
        source: crate::segment::SegmentError,
    },
    /// An event does not follow the one before it: one of the two was changed, or events between them were removed.
    #[error("event {position} does not follow the one before it; run `weft verify`")]
    Broken {
        /// The later of the two.
        position: Position,
    },
}

impl StoreError {
    /// Wraps a failed statement; use as `.map_err(StoreError::while_doing("read events"))`.
    pub(crate) fn while_doing(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> Self {
        move |source| Self::Statement { doing, source: Arc::new(source) }
    }

    /// The name of the constraint that was violated, if one was.
    pub(crate) fn constraint(&self) -> Option<&str> {
        match self {
            Self::Statement { source, .. } => source.as_db_error()?.constraint(),
            _ => None,
        }
    }

    /// PostgreSQL's own code, where the server answered.
    pub(crate) fn sql_state(&self) -> Option<&SqlState> {
        match self {
            Self::Connect(source) | Self::Role { source, .. } | Self::Statement { source, .. } => {
                source.code()
            }
            Self::Unfit(_)
            | Self::Undecodable { .. }
            | Self::NotMigrated
            | Self::Unanswered
            | Self::Rewound { .. }
            | Self::Segment { .. }
            | Self::Broken { .. } => None,
        }
    }
}

/// What a session is for. It takes the role that can do this and no more, whatever its login could.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Duty {
    /// Reading, from any host.
    Read,
    /// Appending, on the host that takes writes.
    Append,
    /// What only the owner of the tables can do, there too. Takes no role.
    Own,
}

impl Duty {
    const fn role(self) -> &'static str {
        match self {
            Self::Read => "weft_reader",
            Self::Append => "weft_appender",
            Self::Own => "none",
        }
    }

    const fn take_role(self) -> &'static str {
        match self {
            Self::Read => "set role weft_reader",
            Self::Append => "set role weft_appender",
            Self::Own => "set role none",
        }
    }
}

/// A connection together with the task that drives it; dropping it ends both.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) client: Arc<Client>,
    driver: JoinSet<()>,
}

impl Session {
    /// Connects; notifications are dropped.
    pub(crate) async fn open(config: &Config, duty: Duty) -> Result<Self, StoreError> {
        Self::open_with(config, duty, |_| ()).await
    }

    /// Connects and hands every notification to `on_notification`.
    pub(crate) async fn open_with(
        config: &Config,
        duty: Duty,
        mut on_notification: impl FnMut(&Notification) + Send + 'static,
    ) -> Result<Self, StoreError> {
        let config = hardened(config, duty);
        let connect = |error| StoreError::Connect(Arc::new(error));
        let login = within(open_max(&config), config.connect(NoTls)).await?;
        let (client, mut connection) = login.map_err(connect)?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // An error here also reaches whoever waits for an answer, so it is not reported twice.
            while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                if let AsyncMessage::Notification(notification) = &message {
                    on_notification(notification);
                }
            }
        });
        within(LOGIN_MAX, client.batch_execute(ONE_PLAN)).await?.map_err(connect)?;
        within(LOGIN_MAX, client.batch_execute(duty.take_role()))
            .await?
            .map_err(|error| refused(duty, error))?;
        Ok(Self { client: Arc::new(client), driver })
    }

    /// Resolves when the connection has ended.
    pub(crate) async fn closed(&mut self) {
        while self.driver.join_next().await.is_some() {}
    }
}

/// A role that is missing means that the log is; one that may not be taken is the administrator's to give.
fn refused(duty: Duty, error: tokio_postgres::Error) -> StoreError {
    match error.code() {
        Some(&SqlState::UNDEFINED_OBJECT | &SqlState::INVALID_PARAMETER_VALUE) => StoreError::NotMigrated,
        Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            StoreError::Role { role: duty.role(), source: Arc::new(error) }
        }
        _ => StoreError::Connect(Arc::new(error)),
    }
}

/// Waits for an answer of the server, for as long as it may take.
pub(crate) async fn within<T>(limit: Duration, answer: impl Future<Output = T>) -> Result<T, StoreError> {
    tokio::time::timeout(limit, answer).await.map_err(|_| StoreError::Unanswered)
}

/// Every host is tried in its turn, each for as long as a connection may take.
fn open_max(config: &Config) -> Duration {
    let hosts = u32::try_from(config.get_hosts().len()).unwrap_or(u32::MAX);
    let connect = config.get_connect_timeout().copied().unwrap_or(CONNECT_TIMEOUT);
    connect.saturating_mul(hosts).saturating_add(LOGIN_MAX)
}

fn hardened(config: &Config, duty: Duty) -> Config {
    let mut config = config.clone();
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(CONNECT_TIMEOUT);
    }
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(TCP_SILENCE_MAX).keepalives_idle(TCP_SILENCE_MAX);
    }
    if config.get_keepalives_interval().is_none() {
        config.keepalives_interval(TCP_PROBE_EVERY);
    }
    if config.get_application_name().is_none() {
        config.application_name("weft-eventlog");
    }
    if duty != Duty::Read {
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_host_is_noticed_in_seconds_unless_the_configuration_says_otherwise() {
        let given: Config = "host=a,b user=u".parse().unwrap();
        let config = hardened(&given, Duty::Append);
        let found = config.get_keepalives_idle() + config.get_keepalives_interval().unwrap();
        assert!(found <= Duration::from_secs(12), "{found:?}");
        assert_eq!(open_max(&config), 2 * CONNECT_TIMEOUT + LOGIN_MAX);

        let given: Config =
            "host=a user=u keepalives_interval=30 tcp_user_timeout=7 connect_timeout=1".parse().unwrap();
        let config = hardened(&given, Duty::Read);
        assert_eq!(config.get_keepalives_interval(), Some(Duration::from_secs(30)));
        assert_eq!(config.get_tcp_user_timeout(), Some(&Duration::from_secs(7)));
        assert_eq!(open_max(&config), Duration::from_secs(1) + LOGIN_MAX);
    }
}
