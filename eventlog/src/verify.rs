//! Proves that the log is what was appended: nothing changed, missing, added or reordered.
//!
//! What the chain alone cannot show is a tail that was cut off, or a history rewritten from some point to the end
//! with every hash made anew. Two other append-only tables testify against that: the batches, which remember the hashes of
//! what each transaction appended and what its commands asked for, and the hash that each epoch found when it was opened.
//! Against somebody who rewrites all three, compare the reported head with one that was noted elsewhere.
//!
//! The log is cut into parts that are checked side by side (`part.rs`), each against the stored hash before it; what holds
//! across parts (each scope's versions, the order of epochs and times) is checked as they are joined in order (`join.rs`).
//!
//! Not checked: fingerprints of what is sealed, which are not kept.

mod join;
mod part;

use futures_util::{StreamExt, stream};
use std::num::NonZero;
use std::pin::pin;
use std::sync::Arc;
use std::thread::available_parallelism;
use tokio::task::JoinSet;
use tokio_postgres::Config;
use weft_model::version::{Epoch, Position, Version};

use crate::event::UnixMicros;
use crate::hash::EventHash;
use crate::read::replay::open_still;
use crate::read::{Evidence, Head, Reader};
use crate::segment::SegmentError;
use crate::session::{Session, StoreError};
use join::Whole;
use part::{Epochs, Part, Passed};

/// What is known of scopes. Asked for each event, and walked only where no order comes out.
#[expect(clippy::disallowed_types, reason = "a look-up per event; nothing depends on its order")]
type ByScope<T> = std::collections::HashMap<Box<str>, T>;

/// Events in a part: a fraction of a second of work, beside which a connection costs nothing; and with a scope for each,
/// some 30 MiB.
const PART_EVENTS: u64 = 262_144;
/// Parts that are checked at once. Each keeps one core of ours and one of the server's busy.
const PARTS_AT_ONCE_MAX: usize = 4;

/// How far a verification has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyProgress {
    /// The last event that was checked.
    pub checked: Position,
    /// The last event that will be checked: the log's end when the verification began.
    pub of: Position,
}

/// The log is sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyReport {
    /// The end of what was checked. Noted elsewhere, it proves the whole log up to it.
    pub head: Head,
    /// Events that were checked.
    pub events: u64,
    /// Scopes that have events.
    pub scopes: u64,
    /// Epochs that were opened.
    pub epochs: u64,
}

/// The log could not be proven sound.
#[derive(Clone, Debug, thiserror::Error)]
pub enum VerifyError {
    /// It is not what was appended; this is the first place where that shows.
    #[error("the log is damaged at position {position}")]
    Damaged {
        /// The first bad position.
        position: Position,
        /// What is wrong there.
        #[source]
        defect: Defect,
    },
    /// It could not be read.
    #[error("the log could not be read")]
    Store(#[from] StoreError),
}

/// How an event and its batch contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// No batch holds the event.
    #[error("no batch holds the event")]
    Missing,
    /// A batch does not begin where the one before it ends.
    #[error("a batch does not begin where the one before it ends")]
    Order,
    /// The batch remembers another event.
    #[error("it remembers another event, or another command")]
    Mark,
    /// The batch was recorded at another time or in another epoch.
    #[error("it was recorded at another time or in another epoch")]
    Time,
    /// The log had another hash at the batch's end.
    #[error("the log had another hash at its end")]
    Hash,
    /// The commands of the batch are not those that it recorded.
    #[error("its commands were others")]
    Commands,
}

/// What is wrong with a position of the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    /// No event is there, though later ones are.
    #[error("the event is missing; the next one is at position {next}")]
    Missing {
        /// Position of the next event.
        next: Position,
    },
    /// The event, or the hash before it, was changed after it was recorded.
    #[error("the event hashes to {computed}, but {recorded} was recorded")]
    Hash {
        /// The hash in the row.
        recorded: EventHash,
        /// The hash of the row's contents after the hash before it.
        computed: EventHash,
    },
    /// The versions of its scope have a gap or a repetition.
    #[error("scope {scope} is at version {expected} here, but {recorded} was recorded")]
    Version {
        /// The scope.
        scope: String,
        /// The version that follows the scope's last one.
        expected: Version,
        /// The version in the row.
        recorded: Version,
    },
    /// Its epoch is earlier than that of the event before it, or was never opened.
    #[error("the event claims epoch {recorded}, which was not open here")]
    Epoch {
        /// The epoch in the row.
        recorded: Epoch,
    },
    /// It was recorded before the event before it.
    #[error("the event was recorded at {recorded:?}, before the one before it at {previous:?}")]
    Time {
        /// Time in the row.
        recorded: UnixMicros,
        /// Time of the event before it.
        previous: UnixMicros,
    },
    /// When an epoch was opened, this position had another hash.
    #[error("epoch {epoch} found {found} here when it was opened")]
    Rewritten {
        /// The epoch.
        epoch: Epoch,
        /// The hash that it found.
        found: EventHash,
    },
    /// What was written down beside the event when it was appended says otherwise: it or its witness was changed, or one of
    /// the two was added or removed.
    #[error("the batch that was recorded with it says otherwise: {0}")]
    Witness(Contradiction),
    /// It is sealed, and its segment is not what was sealed.
    #[error("its segment is not what was sealed: {0}")]
    Segment(SegmentError),
    /// The log ends before this position, which is known to have been recorded.
    #[error("the log ends at {end}, but events up to {acknowledged} were acknowledged")]
    CutOff {
        /// The last event in the log.
        end: Position,
        /// The last event known to have been recorded.
        acknowledged: Position,
    },
}

/// Walks the whole log from its first event to the end that it has at the start, and checks all that its events and
/// the tables beside it promise. Calls `progress` after each part, in order. Needs memory for every scope's name.
///
/// # Errors
/// [`VerifyError::Damaged`] with the first defect, or a failure of the store.
pub async fn verify(
    reader: &Reader,
    mut progress: impl FnMut(VerifyProgress) + Send,
) -> Result<VerifyReport, VerifyError> {
    // Held to the end: what is rows now stays rows, whatever an archive seals meanwhile.
    let still = open_still(reader.config()).await?;
    // All of one moment: an epoch that opens or an event that comes in between would not fit the rest. Rows up to there do
    // not change.
    let evidence = reader.evidence().await?;
    let epochs = Arc::new(Epochs::new(&evidence.forks));
    let mut whole = Whole::default();
    epochs.check(Position::ZERO, EventHash::GENESIS).map_err(|defect| damaged(Position::ZERO, defect))?;

    if let Some(part) = left_over(&still, evidence.sealed).await?
        && let (_, Some((position, defect))) =
            check(reader.config().clone(), part, Arc::clone(&epochs)).await?
    {
        return Err(damaged(position, defect));
    }
    let parts = cut(&still, &evidence).await?;
    let at_once = available_parallelism().map_or(1, NonZero::get).min(PARTS_AT_ONCE_MAX);
    let checks = stream::iter(parts).map(|part| check(reader.config().clone(), part, Arc::clone(&epochs)));
    let mut checks = pin!(checks.buffered(at_once));
    while let Some(passed) = checks.next().await {
        let (passed, defect) = passed?;
        let checked = whole.join(passed).map_err(|(position, defect)| damaged(position, defect))?;
        if let Some((position, defect)) = defect {
            return Err(damaged(position, defect));
        }
        progress(VerifyProgress { checked, of: evidence.head.position });
    }
    let known = evidence.forks.iter().map(|fork| fork.1).fold(evidence.acknowledged, Position::max);
    let end = whole.position();
    if known > end {
        return Err(damaged(end.next(), Defect::CutOff { end, acknowledged: known }));
    }
    Ok(VerifyReport {
        head: evidence.head,
        events: end.0,
        scopes: whole.scopes(),
        epochs: evidence.forks.len() as u64,
    })
}

const fn damaged(position: Position, defect: Defect) -> VerifyError {
    VerifyError::Damaged { position, defect }
}

/// A part that passed up to where its first defect is, and that one.
type Checked = Result<(Passed, Option<(Position, Defect)>), VerifyError>;

/// Checks a part in a task of its own, which ends with the future.
fn check(config: Config, part: Part, epochs: Arc<Epochs>) -> impl Future<Output = Checked> {
    let mut task = JoinSet::new();
    task.spawn(async move { part.check(&config, &epochs).await });
    async move {
        match task.join_next().await {
            Some(Ok(checked)) => Ok(checked?),
            // The runtime is ending, or the check has a fault that was reported where it is.
            Some(Err(_)) | None => Err(VerifyError::Store(StoreError::Unanswered)),
        }
    }
}

/// Rows of what is sealed, which an archive that was interrupted has not taken away yet: readers may still get them. They are no
/// part of the whole, but what they say must be true as well.
async fn left_over(session: &Session, sealed: Position) -> Result<Option<Part>, StoreError> {
    const SQL: &str = "select min(position), max(position) from weft.event where position <= $1";
    let row = session.client.query_one(SQL, &[&signed(sealed)]).await;
    let row = row.map_err(StoreError::while_doing("look for rows of what is sealed"))?;
    let position = |at| row.get::<_, Option<i64>>(at).map(|position| Position(position.cast_unsigned()));
    let ends = position(0).zip(position(1));
    Ok(ends.map(|(first, to)| Part { after: Position(first.0.saturating_sub(1)), to, sealed: false }))
}

/// Cuts the log into parts that end with segments, and where it is not sealed, with batches.
async fn cut(session: &Session, evidence: &Evidence) -> Result<Vec<Part>, StoreError> {
    const SEALED_SQL: &str = "select end_of.last_position from generate_series($1::bigint, $2::bigint - 1, $1::bigint) as at \
         cross join lateral (select last_position from weft.log_segment where last_position >= at \
         order by last_position limit 1) as end_of order by 1";
    const ROWS_SQL: &str = "select end_of.last_position from generate_series($2::bigint + $1::bigint, $3::bigint - 1, $1::bigint) as at \
         cross join lateral (select last_position from weft.log_batch where last_position >= at \
         order by last_position limit 1) as end_of order by 1";
    let doing = StoreError::while_doing("cut the log into parts");
    let (step, sealed, head) =
        (PART_EVENTS.cast_signed(), signed(evidence.sealed), signed(evidence.head.position));
    let in_segments = session.client.query(SEALED_SQL, &[&step, &sealed]).await.map_err(&doing)?;
    let in_rows = session.client.query(ROWS_SQL, &[&step, &sealed, &head]).await.map_err(&doing)?;
    let ends = |rows: &[tokio_postgres::Row]| -> Vec<Position> {
        rows.iter().map(|row| Position(row.get::<_, i64>(0).cast_unsigned())).collect()
    };
    let mut parts = Vec::new();
    let mut after = Position::ZERO;
    let mut push = |to: Position, sealed: bool| {
        if to > after {
            parts.push(Part { after, to, sealed });
            after = to;
        }
    };
    ends(&in_segments).into_iter().filter(|end| *end < evidence.sealed).for_each(|end| push(end, true));
    push(evidence.sealed, true);
    ends(&in_rows).into_iter().filter(|end| *end < evidence.head.position).for_each(|end| push(end, false));
    push(evidence.head.position, false);
    Ok(parts)
}

const fn signed(position: Position) -> i64 {
    position.0.cast_signed()
}
