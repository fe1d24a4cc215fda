//! What the log says, asked in plain SQL and not through the event log's own code.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::journal::{Event, Polled};
use crate::server::Session;

/// Events that are asked for at once.
const PAGE: i64 = 5_000;
/// Pause of the poller when there was nothing, or the server was away.
const PAUSE: Duration = Duration::from_millis(5);

/// Every event.
pub(crate) async fn read_all(url: &str) -> anyhow::Result<Vec<Event>> {
    const SQL: &str = "select position, scope, version, command_id, epoch, \
                       (extract(epoch from recorded_at) * 1000000)::bigint, payload::text, hash \
                       from weft.event where position > $1 order by position limit $2";
    let session = Session::open(url).await?;
    let (mut events, mut after) = (Vec::new(), 0_i64);
    loop {
        let rows = session.client.query(SQL, &[&after, &PAGE]).await?;
        if rows.is_empty() {
            return Ok(events);
        }
        for row in rows {
            after = row.get(0);
            events.push(Event {
                position: after.cast_unsigned(),
                scope: row.get(1),
                version: row.get::<_, i64>(2).cast_unsigned(),
                command: row.get(3),
                epoch: row.get::<_, i64>(4).cast_unsigned(),
                recorded_at: row.get(5),
                payload: row.get(6),
                hash: first_bytes(row.get(7)),
            });
        }
    }
}

/// The first eight bytes of a hash.
pub(crate) fn first_bytes(hash: &[u8]) -> i64 {
    hash.iter().take(8).fold(0, |number, byte| number << 8 | i64::from(*byte))
}

/// The last position.
pub(crate) async fn head(url: &str) -> anyhow::Result<u64> {
    const SQL: &str = "select coalesce(max(position), 0) from weft.event";
    let row = Session::open(url).await?.client.query_one(SQL, &[]).await?;
    Ok(row.get::<_, i64>(0).cast_unsigned())
}

/// A reader that knows nothing but `position > cursor`, as the simplest consumer there is.
#[derive(Debug)]
pub(crate) struct Poller {
    /// Where the server is now.
    url: watch::Sender<String>,
    ending: Arc<AtomicBool>,
    polling: JoinSet<Vec<Polled>>,
}

impl Poller {
    pub(crate) fn start(url: String) -> Self {
        let (url, moved) = watch::channel(url);
        let ending = Arc::new(AtomicBool::new(false));
        let mut polling = JoinSet::new();
        polling.spawn(poll(moved, Arc::clone(&ending)));
        Self { url, ending, polling }
    }

    /// The server came back elsewhere.
    pub(crate) fn follow(&self, url: String) {
        self.url.send_replace(url);
    }

    /// What it got, once there is no more.
    pub(crate) async fn end(mut self) -> Vec<Polled> {
        self.ending.store(true, Ordering::SeqCst);
        self.polling.join_next().await.and_then(Result::ok).unwrap_or_default()
    }
}

async fn poll(url: watch::Receiver<String>, ending: Arc<AtomicBool>) -> Vec<Polled> {
    const SQL: &str = "select position, hash from weft.event where position > $1 order by position limit $2";
    let (mut got, mut cursor) = (Vec::new(), 0_i64);
    loop {
        let now = url.borrow().clone();
        if let Ok(session) = Session::open(&now).await {
            loop {
                // Looked at first, so that what is there when it is set is read.
                let last = ending.load(Ordering::SeqCst);
                let Ok(rows) = session.client.query(SQL, &[&cursor, &PAGE]).await else { break };
                if rows.is_empty() {
                    if last {
                        return got;
                    }
                    sleep(PAUSE).await;
                }
                for row in rows {
                    cursor = row.get(0);
                    got.push((cursor.cast_unsigned(), first_bytes(row.get(1))));
                }
            }
        }
        sleep(PAUSE).await;
    }
}
