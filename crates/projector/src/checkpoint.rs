//! Checkpoints of the fold in the database: writing one now and then, and going on from one at a start.
//!
//! A checkpoint is a cache. It is gone on from only if this version's fold wrote it, its body is what was written, and the
//! event that it ends with is in the log, at its position, with its epoch and chain hash, so that everything before that
//! event is what was folded. Otherwise it is said why not, and an older one or the first event serves. What it says is
//! proven by `weft verify` alone, which folds from the first event.
//!
//! A checkpoint is written when enough events have come since the last one or enough time went by, off the path of
//! publication: it is encoded from a clone on a thread of its own, one at a time. A failed one is not tried again before the
//! next is due: nothing depends on it but how long a start takes.
//!
//! Crashes: writing a row and removing old ones are two transactions. Whatever happens between them leaves a row too many,
//! which the next one removes.

use std::io::Read;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;
use weft_eventlog::{EventHash, Reader};
use weft_model::{Chain, ConfigVersion, Position};
use weft_routing::{Checkpoint, CheckpointError, FOLD_VERSION, Hash, Projection};

use crate::store::{Store, StoreError, StoredCheckpoint};

/// A checkpoint is written after so many events: what a start folds after it, in a fraction of a second.
const EVENTS: u64 = 65_536;
/// Or after this time, if there was any event: so a quiet mesh starts from near the end of its log, too.
const AFTER: Duration = Duration::from_secs(600);
/// Longest encoded checkpoint: a hundred thousand instances take half of it. What is longer is neither written nor read.
const BYTES_MAX: u64 = 256 << 20;
/// zstd's level: the default; the text of a mesh shrinks to a fifth.
const ZSTD_LEVEL: i32 = 3;

/// Why a stored checkpoint is not gone on from.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    #[error("it is of fold version {found}, this is version {FOLD_VERSION}")]
    FoldVersion { found: i32 },
    #[error("the log does not have the event that it ends with")]
    NotInLog,
    #[error("it is {0} bytes long, more than is ever written")]
    Long(i64),
    #[error("it was removed in the meantime")]
    Removed,
    #[error("its body does not have the hash beside it")]
    Hash,
    #[error("its body cannot be decompressed")]
    Compression(#[source] std::io::Error),
    #[error("its body is not a checkpoint")]
    Encoding(#[from] CheckpointError),
    #[error("its body is of {found}")]
    Version { found: ConfigVersion },
    #[error("it could not be read")]
    Store(#[from] StoreError),
    #[error("the log could not be read")]
    Log(#[from] weft_eventlog::StoreError),
    #[error("reading it was given up")]
    GivenUp,
}

/// The projection of the newest stored checkpoint at or before `to` that can be gone on from; empty if there is none. Says
/// in the log of this process what was found.
pub(crate) async fn load(store: &Store, reader: &Reader, to: Position) -> Projection {
    let stored = match store.fold_checkpoints().await {
        Ok(stored) => stored,
        Err(error) => {
            tracing::warn!(error = %Chain(&error), "the fold's checkpoints cannot be read; folding from the first event");
            return Projection::default();
        }
    };
    for checkpoint in stored.into_iter().filter(|stored| stored.version.position <= to) {
        let at = checkpoint.version;
        let started = Instant::now();
        match read(store, reader, &checkpoint).await {
            Ok(projection) => {
                tracing::info!(checkpoint = %at, took = ?started.elapsed(), "going on from a checkpoint of the fold");
                return projection;
            }
            Err(error) => {
                tracing::warn!(checkpoint = %at, error = %Chain(&error), "a checkpoint of the fold is ignored");
            }
        }
    }
    Projection::default()
}

async fn read(store: &Store, reader: &Reader, stored: &StoredCheckpoint) -> Result<Projection, Unusable> {
    let checkpoint = body(store, stored);
    let (checkpoint, in_log) = tokio::join!(checkpoint, is_in_log(reader, stored));
    if !in_log? {
        return Err(Unusable::NotInLog);
    }
    let checkpoint = checkpoint?;
    let built = tokio::task::spawn_blocking(move || checkpoint.into_projection()).await;
    built.map_err(|_| Unusable::GivenUp)
}

/// The checkpoint that a row holds, checked in itself.
pub(crate) async fn body(store: &Store, stored: &StoredCheckpoint) -> Result<Checkpoint, Unusable> {
    let version = stored.version;
    if u32::try_from(stored.fold_version) != Ok(FOLD_VERSION) {
        return Err(Unusable::FoldVersion { found: stored.fold_version });
    }
    if u64::try_from(stored.body_bytes).is_ok_and(|bytes| bytes > BYTES_MAX) {
        return Err(Unusable::Long(stored.body_bytes));
    }
    let body = store.fold_checkpoint_body(version.position).await?.ok_or(Unusable::Removed)?;
    let expected = stored.body_hash;
    let decoded = tokio::task::spawn_blocking(move || decode(&body, expected)).await;
    let checkpoint = decoded.map_err(|_| Unusable::GivenUp)??;
    if checkpoint.version() != version {
        return Err(Unusable::Version { found: checkpoint.version() });
    }
    Ok(checkpoint)
}

/// Whether the log has the event that a checkpoint ends with.
pub(crate) async fn is_in_log(
    reader: &Reader,
    stored: &StoredCheckpoint,
) -> Result<bool, weft_eventlog::StoreError> {
    let ConfigVersion { epoch, position } = stored.version;
    let events = reader.read(Position(position.0.saturating_sub(1)), 1).await?;
    Ok(events.first().is_some_and(|event| {
        event.position == position && event.epoch == epoch && event.hash == stored.log_hash
    }))
}

fn decode(body: &[u8], expected: Hash) -> Result<Checkpoint, Unusable> {
    if Hash::of(body) != expected {
        return Err(Unusable::Hash);
    }
    let mut bytes = Vec::new();
    let reading = zstd::stream::read::Decoder::with_buffer(body).and_then(|decoder| {
        // What says that it is longer is cut, and then is not a checkpoint.
        decoder.take(BYTES_MAX).read_to_end(&mut bytes)
    });
    reading.map_err(Unusable::Compression)?;
    Ok(Checkpoint::decode(&bytes)?)
}

/// Writes checkpoints while its projector leads.
#[derive(Debug)]
pub(crate) struct Keeper {
    /// How many events make one due: [`EVENTS`].
    pub(crate) every: u64,
    /// The newest checkpoint that was written, gone on from, or tried.
    last: Position,
    since: Instant,
    /// At most one.
    writing: JoinSet<()>,
}

impl Keeper {
    pub(crate) fn new() -> Self {
        Self { every: EVENTS, last: Position::ZERO, since: Instant::now(), writing: JoinSet::new() }
    }

    /// What was gone on from needs no writing.
    pub(crate) fn begin_at(&mut self, position: Position) {
        self.last = position;
        self.since = Instant::now();
    }

    /// Whether a checkpoint at `position` is due, and none is being written.
    pub(crate) fn is_due(&mut self, position: Position) -> bool {
        while self.writing.try_join_next().is_some() {}
        let news = position.0.saturating_sub(self.last.0);
        self.writing.is_empty() && (news >= self.every || news > 0 && self.since.elapsed() >= AFTER)
    }

    /// Writes a checkpoint beside everything else. The last event of it has the hash `log_hash`.
    pub(crate) fn write(&mut self, store: Store, checkpoint: Checkpoint, log_hash: EventHash) {
        self.begin_at(checkpoint.version().position);
        self.writing.spawn(async move {
            let (version, started) = (checkpoint.version(), Instant::now());
            match write(&store, checkpoint, log_hash).await {
                Ok(bytes) => {
                    tracing::info!(checkpoint = %version, bytes, took = ?started.elapsed(), "wrote a checkpoint of the fold");
                    metrics::counter!("weft_projector_fold_checkpoints_total").increment(1);
                }
                Err(error) => {
                    tracing::warn!(checkpoint = %version, error = %Chain(&error), "no checkpoint of the fold was written");
                }
            }
        });
    }
}

/// Writes a checkpoint and removes those that it makes needless; returns the length of its body.
pub(crate) async fn write(
    store: &Store,
    checkpoint: Checkpoint,
    log_hash: EventHash,
) -> Result<usize, Unwritten> {
    let version = checkpoint.version();
    let body = tokio::task::spawn_blocking(move || {
        let bytes = checkpoint.encode();
        if bytes.len() as u64 > BYTES_MAX {
            return Err(Unwritten::Long(bytes.len()));
        }
        zstd::bulk::compress(&bytes, ZSTD_LEVEL).map_err(Unwritten::Compression)
    });
    let body = body.await.map_err(|_| Unwritten::GivenUp)??;
    let stored = StoredCheckpoint {
        version,
        log_hash,
        fold_version: i32::try_from(FOLD_VERSION).unwrap_or(i32::MAX),
        body_hash: Hash::of(&body),
        body_bytes: i64::try_from(body.len()).unwrap_or(i64::MAX),
    };
    store.put_fold_checkpoint(&stored, &body).await?;
    store.prune_fold_checkpoints().await?;
    Ok(body.len())
}

/// Why a checkpoint was not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unwritten {
    #[error("it would be {0} bytes long, more than would be read")]
    Long(usize),
    #[error("it could not be compressed")]
    Compression(#[source] std::io::Error),
    #[error("it could not be stored")]
    Store(#[from] StoreError),
    #[error("encoding it was given up")]
    GivenUp,
}

#[cfg(test)]
mod tests;
