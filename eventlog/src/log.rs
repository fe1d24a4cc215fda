//! An open log: the owner of the tasks behind an [`Appender`] and its [`Reader`]s.

use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::Config;
use tokio_util::sync::CancellationToken;
use weft_model::version::Position;

use crate::append::{AppendTask, Appender, Unusable, Writer};
use crate::notify;
use crate::partitions::{self, Behind};
use crate::read::Reader;
use crate::rewind::Point;
use crate::session::StoreError;
use crate::settings::SettingsError;
use crate::tail::Delivered;

/// How long a shutdown waits for what is queued: a batch that began when the database went away is tried for ten
/// seconds, and a healthy database writes a full queue in one.
pub const SHUTDOWN_MAX: Duration = Duration::from_secs(15);

/// How to open a log.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// Where the database is; of several hosts, the one that accepts writes is used. TLS to the database is not
    /// supported: use a unix socket, a loopback address or a trusted network. Never logged with its password.
    pub connect: Config,
    /// Accept a server that may lose acknowledged events in a crash. For throw-away data only.
    pub allow_unsafe_settings: bool,
}

impl LogConfig {
    /// A log in the given database, on a server that loses nothing.
    #[must_use]
    pub const fn new(connect: Config) -> Self {
        Self { connect, allow_unsafe_settings: false }
    }
}

/// Why a log cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The server cannot be reached, or failed.
    #[error("cannot open the event log")]
    Store(#[source] StoreError),
    /// The server must not hold the log as it is configured.
    #[error("the server is not fit to hold the event log")]
    Unfit(#[source] SettingsError),
    /// The database has no event log yet; call [`migrate`](crate::migrate).
    #[error("the database has no event log; migrate it first")]
    NotMigrated,
}

impl From<Unusable> for OpenError {
    fn from(unusable: Unusable) -> Self {
        match unusable {
            Unusable::Store(StoreError::NotMigrated) => Self::NotMigrated,
            Unusable::Store(error) => Self::Store(error),
            Unusable::Unfit(error) => Self::Unfit(error),
        }
    }
}

/// A log that is open for appending and reading. Any number of processes may have the same one open.
///
/// End it with [`shutdown`](Self::shutdown); dropping it abandons what is queued.
#[derive(Debug)]
pub struct EventLog {
    appender: Appender,
    reader: Reader,
    committed: watch::Receiver<Position>,
    lost: watch::Receiver<Option<Point>>,
    closing: CancellationToken,
    tasks: JoinSet<()>,
}

impl EventLog {
    /// Connects, checks the server's settings, and opens an epoch if the database has another life than when the log
    /// was last open.
    ///
    /// # Errors
    /// See [`OpenError`]. Nothing is retried: whoever opens the log knows how long to wait for it.
    pub async fn open(config: LogConfig) -> Result<Self, OpenError> {
        let connect = config.connect.clone();
        let delivered = Delivered::default();
        let behind = Arc::new(Behind::default());
        let writer = Writer::open(config, delivered.clone(), Arc::clone(&behind)).await?;
        let wake = watch::Sender::new(writer.position());
        let lost = delivered.lost();
        let reader = Reader::with_shared(connect.clone(), wake.clone(), delivered, Arc::clone(&behind));
        let (committed, announced) = watch::channel(writer.position());
        let (appender, queue) = Appender::channel();
        let closing = CancellationToken::new();

        let mut tasks = JoinSet::new();
        tasks.spawn(notify::announce(connect.clone(), announced.clone(), closing.clone()));
        tasks.spawn(partitions::look_after(connect, behind, announced.clone(), closing.clone()));
        tasks.spawn(AppendTask::new(writer, queue, committed, wake, closing.clone()).run());
        Ok(Self { appender, reader, committed: announced, lost, closing, tasks })
    }

    /// A handle to append with.
    #[must_use]
    pub fn appender(&self) -> Appender {
        self.appender.clone()
    }

    /// A handle to read with; it outlives the log. Its tails wake as soon as this process commits.
    #[must_use]
    pub fn reader(&self) -> Reader {
        self.reader.clone()
    }

    /// Follows the last position that this process knows to be durable, from its own appends.
    #[must_use]
    pub fn committed(&self) -> watch::Receiver<Position> {
        self.committed.clone()
    }

    /// Follows the newest event that this process has read or appended and that the database then lost; none if it lost
    /// none. Once there is one, this process appends nothing more: what it remembers is of another history.
    #[must_use]
    pub fn lost(&self) -> watch::Receiver<Option<Point>> {
        self.lost.clone()
    }

    /// Refuses further appends, answers those that are queued, and ends the log's tasks, within
    /// [`SHUTDOWN_MAX`]; see [`shutdown_within`](Self::shutdown_within).
    pub async fn shutdown(self) {
        self.shutdown_within(SHUTDOWN_MAX).await;
    }

    /// As [`shutdown`](Self::shutdown), within a time of one's own. What is not answered by then is abandoned: its
    /// callers get [`StoreError::Unanswered`], and whether it was accepted is unknown to them; a repeat with the same
    /// command id, at any open log, finds out.
    pub async fn shutdown_within(mut self, limit: Duration) {
        self.closing.cancel();
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        if timeout(limit, ended).await.is_err() {
            tracing::warn!(
                ?limit,
                "the log was closed before every append was answered; what became of them is unknown"
            );
            self.tasks.shutdown().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_never_printed() {
        let connect: Config = "postgres://weft:hunter2@localhost/weft".parse().unwrap();
        let printed = format!("{:?} {:?}", LogConfig::new(connect.clone()), Reader::new(connect));
        assert!(printed.contains("localhost") && !printed.contains("hunter2"), "{printed}");
    }
}
