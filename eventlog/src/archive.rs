//! Sealing old ranges of the log: their rows become segments, which every reader takes for rows.
//!
//! Nothing is thrown away: a segment is written only when its events chain from the ones before, and reads back as exactly
//! the rows that it is made of. Segments come first, in a transaction per range; only then is the range's table taken
//! away. Whoever dies in between leaves both, which is as good as either, and the next run goes on from there.
//!
//! Never sealed are the range in which the log ends, and events whose commands may still be repeated
//! ([`OUTCOME_KEPT`](crate::OUTCOME_KEPT)): what they were answered is known only from rows.
//!
//! Runs with the rights of the tables' owner, which no appender, projector or reader has.

use std::time::Duration;
use tokio::time::sleep;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Config, Row};
use weft_model::version::Position;

use crate::append::{CLOCK_AHEAD_MAX, OUTCOME_KEPT};
use crate::epoch::decode_hash;
use crate::hash::EventHash;
use crate::page::{EventView, Page};
use crate::read::copy::{Beside, Rows};
use crate::read::replay::open_still;
use crate::read::sealed::sealed_to;
use crate::segment::{SEGMENT_BYTES_MAX, SEGMENT_EVENTS, Segment, SegmentError};
use crate::session::{Duty, Session, StoreError};

/// How young what is sealed may be: a command's id may be repeated for [`OUTCOME_KEPT`], may have been made with a clock
/// that is ahead, and an hour is for caution.
pub const SEALED_AGE_MIN: Duration = OUTCOME_KEPT.saturating_add(CLOCK_AHEAD_MAX.saturating_mul(2));

/// Nobody walks the log, or begins to: see [`open_still`]. Not waited for, since a walk may take long.
const NOBODY_WALKS_SQL: &str = "begin; lock table weft.log_layout in access exclusive mode nowait";
/// Taking a table away then waits for short transactions only, and everybody else waits behind. So it waits briefly, and often.
const LOCK_WAIT_SQL: &str = "set lock_timeout = '500ms'";
const ATTEMPTS_MAX: u32 = 60;
const ATTEMPT_PAUSE: Duration = Duration::from_secs(1);

/// What to seal.
#[derive(Clone, Debug)]
pub struct ArchiveConfig {
    /// The database, with a login that owns the log's tables.
    pub connect: Config,
    /// Whole ranges are sealed whose events are all older than this.
    pub older_than: Duration,
    /// Seal also what is younger than [`SEALED_AGE_MIN`]. A command that is repeated later may then be recorded twice: for
    /// logs to which nothing is appended any more, and for measurements.
    pub forget_outcomes: bool,
}

/// How far an archive has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArchiveProgress {
    /// The last event that is sealed.
    pub sealed: Position,
    /// The last event that will be.
    pub of: Position,
}

/// What was sealed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArchiveReport {
    /// Up to where the log is sealed now.
    pub sealed: Position,
    /// Events that this run sealed.
    pub events: u64,
    /// Segments that it made of them.
    pub segments: u64,
    /// Bytes that those take.
    pub bytes: u64,
    /// Tables that it took away.
    pub tables: u64,
}

/// The log could not be sealed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// Commands in it may still be repeated.
    #[error("events younger than {} hours cannot be sealed: their commands may still be repeated", SEALED_AGE_MIN.as_secs() / 3_600)]
    TooYoung,
    /// What is to be sealed is not what was appended.
    #[error("the log is damaged at position {position}; nothing after it was sealed; run `weft verify`")]
    Damaged {
        /// The first event that does not follow.
        position: Position,
    },
    /// A segment does not hold what it was made of.
    #[error("the segment from {first} on would not hold its events; nothing of it was sealed")]
    Segment {
        /// Its first event.
        first: Position,
        /// What is wrong; none if it holds other events.
        #[source]
        source: Option<SegmentError>,
    },
    /// What is sealed is still there as rows too, because somebody read it all the time.
    #[error("{table} is sealed, but could not be taken away: somebody reads it; run this again later")]
    InUse {
        /// The table.
        table: String,
    },
    /// The store failed.
    #[error("the store failed")]
    Store(#[from] StoreError),
}

/// A range of positions.
struct Range {
    first: Position,
    last: Position,
    table: String,
}

/// Seals what is old enough, and calls `progress` after each segment.
///
/// # Errors
/// See [`ArchiveError`]; what was sealed before it stays sealed.
pub async fn archive(
    config: &ArchiveConfig,
    mut progress: impl FnMut(ArchiveProgress) + Send,
) -> Result<ArchiveReport, ArchiveError> {
    if config.older_than < SEALED_AGE_MIN && !config.forget_outcomes {
        return Err(ArchiveError::TooYoung);
    }
    let session = Session::open(&config.connect, Duty::Own).await?;
    let ranges = due(&session, config.older_than).await?;
    let of = ranges.last().map(|range| range.last).unwrap_or_default();
    let mut report = ArchiveReport::default();
    for range in &ranges {
        seal(config, &session, range, &mut report, |sealed| progress(ArchiveProgress { sealed, of })).await?;
    }
    report.sealed = sealed_to(&session).await?;
    for range in ranges_with_rows(&session, report.sealed).await? {
        take_away(&session, &range).await?;
        report.tables += 1;
    }
    Ok(report)
}

/// The ranges that are not sealed, are old enough and end before the log does.
async fn due(session: &Session, older_than: Duration) -> Result<Vec<Range>, StoreError> {
    const SQL: &str = "select first_position, last_position, table_name from weft.log_partition \
         where last_position > (select coalesce(max(last_position), 0) from weft.log_segment) \
         and last_position < (select coalesce(max(position), 0) from weft.event) \
         and last_position <= audit.position_at(clock_timestamp() - make_interval(secs => $1)) order by 1";
    let rows = session.client.query(SQL, &[&older_than.as_secs_f64()]).await;
    rows.map(|rows| rows.iter().map(range).collect())
        .map_err(StoreError::while_doing("find what can be sealed"))
}

/// The ranges that are sealed and still have a table.
async fn ranges_with_rows(session: &Session, sealed: Position) -> Result<Vec<Range>, StoreError> {
    const SQL: &str = "select first_position, last_position, table_name from weft.log_partition \
         where last_position <= $1 and to_regclass('weft.' || quote_ident(table_name)) is not null order by 1";
    let rows = session.client.query(SQL, &[&sealed.0.cast_signed()]).await;
    rows.map(|rows| rows.iter().map(range).collect()).map_err(StoreError::while_doing("find what is sealed"))
}

fn range(row: &Row) -> Range {
    let position = |column| Position(row.get::<_, i64>(column).cast_unsigned());
    Range { first: position(0), last: position(1), table: row.get(2) }
}

/// Seals one range in one transaction.
async fn seal(
    config: &ArchiveConfig,
    session: &Session,
    range: &Range,
    report: &mut ArchiveReport,
    mut progress: impl FnMut(Position),
) -> Result<(), ArchiveError> {
    let doing = StoreError::while_doing("seal events");
    // One at a time. Whoever waited here finds the range sealed.
    let begin = "begin; lock table weft.log_segment in share row exclusive mode";
    session.client.batch_execute(begin).await.map_err(&doing)?;
    let sealed = sealed_to(session).await?;
    if sealed < range.last {
        let reading = open_still(&config.connect).await?;
        let mut rows = Rows::open(&reading, Position(range.first.0 - 1).max(sealed), range.last).await?;
        let mut sealer = Sealer::new(session, sealed).await?;
        while let Some((page, beside)) = rows.next().await? {
            sealer.page(&page, &beside).await?;
            progress(sealer.position);
        }
        if sealer.position != range.last {
            return Err(ArchiveError::Damaged { position: sealer.position.next() });
        }
        report.events += sealer.position.0 - sealed.0;
        report.segments += sealer.segments;
        report.bytes += sealer.bytes;
    }
    session.client.batch_execute("commit").await.map_err(&doing)?;
    Ok(())
}

/// Makes segments of rows.
struct Sealer<'a> {
    session: &'a Session,
    position: Position,
    hash: EventHash,
    segments: u64,
    bytes: u64,
}

impl<'a> Sealer<'a> {
    async fn new(session: &'a Session, sealed: Position) -> Result<Self, StoreError> {
        const SQL: &str = "select last_hash from weft.log_segment where last_position = $1";
        let row = session.client.query_opt(SQL, &[&sealed.0.cast_signed()]).await;
        let row = row.map_err(StoreError::while_doing("read the last segment"))?;
        let hash = row.map_or(Ok(EventHash::GENESIS), |row| decode_hash(row.get(0)))?;
        Ok(Self { session, position: sealed, hash, segments: 0, bytes: 0 })
    }

    /// A page is a segment, or if its texts are long, several.
    async fn page(&mut self, page: &Page, beside: &[Beside]) -> Result<(), ArchiveError> {
        let events: Vec<EventView<'_>> = page.events().collect();
        let (mut hash, mut position) = (self.hash, self.position);
        for (event, beside) in events.iter().zip(beside) {
            hash = event.chain(hash);
            if event.position != position.next() || hash != beside.hash {
                return Err(ArchiveError::Damaged { position: position.next() });
            }
            position = event.position;
        }
        let hashes: Vec<EventHash> = beside.iter().map(|beside| beside.hash).collect();
        let mut at = 0;
        while at < events.len() {
            let end = at + segment_length(&events[at..]);
            self.segment(&events[at..end], hashes[end - 1]).await?;
            at = end;
        }
        Ok(())
    }

    async fn segment(&mut self, events: &[EventView<'_>], last_hash: EventHash) -> Result<(), ArchiveError> {
        const SQL: &str = "insert into weft.log_segment (first_position, last_position, first_recorded_at, last_recorded_at, \
             previous_hash, last_hash, raw_bytes, body_hash, body, sealed_at) \
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, clock_timestamp())";
        let first = self.position.next();
        let not_held = |source| ArchiveError::Segment { first, source };
        let segment = Segment::seal(events.iter().copied(), self.hash, last_hash);
        let segment = segment.map_err(|_| not_held(Some(SegmentError::Compression)))?;
        let read_back = segment.open().map_err(|error| not_held(Some(error)))?;
        if !read_back.events().eq(events.iter().copied()) {
            return Err(not_held(None));
        }
        let (began, ended) = segment.recorded_at;
        let (began, ended) = (began.to_database(), ended.to_database());
        let (first, last) = (segment.first.0.cast_signed(), segment.last.0.cast_signed());
        let (previous, end) = (segment.previous_hash.0.as_slice(), segment.last_hash.0.as_slice());
        let raw_bytes =
            i32::try_from(segment.raw_bytes).map_err(|_| not_held(Some(SegmentError::Compression)))?;
        let (body_hash, body) = (segment.body_hash.0.as_slice(), &segment.body[..]);
        let params: [&(dyn ToSql + Sync); 9] =
            [&first, &last, &began, &ended, &previous, &end, &raw_bytes, &body_hash, &body];
        let inserted = self.session.client.execute(SQL, &params).await;
        inserted.map_err(StoreError::while_doing("seal events"))?;
        self.position = segment.last;
        self.hash = segment.last_hash;
        self.segments += 1;
        self.bytes += segment.body.len() as u64;
        Ok(())
    }
}

/// How many of these make the next segment; one at least.
fn segment_length(events: &[EventView<'_>]) -> usize {
    let mut bytes = 0;
    let fits = events.iter().take(SEGMENT_EVENTS).take_while(|event| {
        let fits = bytes < SEGMENT_BYTES_MAX;
        bytes +=
            event.scope.len() + event.actor.len() + event.reason.map_or(0, str::len) + event.payload.len();
        fits
    });
    fits.count().max(1)
}

/// Takes a sealed range's table away, once what is needed of it is known elsewhere.
async fn take_away(session: &Session, range: &Range) -> Result<(), ArchiveError> {
    const MARK_SQL: &str = "select coalesce(max(position), 0) from weft.scope_head_mark";
    let client = &session.client;
    let doing = StoreError::while_doing("take sealed rows away");
    client.batch_execute(LOCK_WAIT_SQL).await.map_err(&doing)?;
    while client.query_one(MARK_SQL, &[]).await.map_err(&doing)?.get::<_, i64>(0) < range.last.0.cast_signed()
    {
        client.execute("select weft.close_partition()", &[]).await.map_err(&doing)?;
    }
    // Its name is made of a number, by the function that made it.
    let table = format!("weft.\"{}\"", range.table.replace('"', "\"\""));
    let sql = format!(
        "{NOBODY_WALKS_SQL}; alter table weft.event detach partition {table}; drop table {table}; commit"
    );
    for _ in 0..ATTEMPTS_MAX {
        match client.batch_execute(&sql).await {
            Ok(()) => return Ok(()),
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                client.batch_execute("rollback").await.map_err(&doing)?;
                sleep(ATTEMPT_PAUSE).await;
            }
            Err(error) => return Err(doing(error).into()),
        }
    }
    Err(ArchiveError::InUse { table: range.table.clone() })
}
