//! A log of many ranges: made ahead, closed, sealed; and read, appended to and verified all the same.

use futures_util::TryStreamExt;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use uuid::Uuid;
use weft_eventlog::{
    AppendError, Appended, ArchiveConfig, ArchiveError, Defect, EventLog, Reader, RecordedEvent,
    SegmentError, UnixMicros, VerifyError, archive, lay_out, verify,
};
use weft_model::version::{Position, Version};
use weft_testkit::{TestDatabase, wait_until};

use crate::support::{
    Any, Empty, assert_gapless, config, exact, migrated, one, open, part, read_all, request, tamper,
};

/// Far longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(30);

/// A log whose ranges hold a hundred events.
async fn small_ranges() -> TestDatabase {
    let database = migrated().await;
    lay_out(&config(&database), 100).await.unwrap();
    database
}

/// Appends until the log has so many events, in three scopes, eight events a command.
async fn fill(log: &EventLog, events: u64) {
    let mut head = log.reader().head().await.unwrap().position.0;
    while head < events {
        let count = usize::try_from((events - head).min(8)).unwrap();
        let scope = format!("s/{}", head % 3);
        let appended = log.appender().append(request(vec![part(&scope, Any, count)])).await.unwrap();
        head = appended.positions.unwrap().end().0;
    }
}

fn everything(database: &TestDatabase) -> ArchiveConfig {
    ArchiveConfig { connect: config(database), older_than: Duration::ZERO, forget_outcomes: true }
}

async fn count(database: &TestDatabase, sql: &str) -> i64 {
    database.connect().await.query_one(sql, &[]).await.unwrap().get(0)
}

/// Waits until the ranges up to there are closed.
async fn closed(database: &TestDatabase, position: i64) {
    let mark = "select coalesce(max(position), 0) from weft.scope_head_mark";
    wait_until("ranges to be closed", LIMIT, async || count(database, mark).await >= position).await;
}

async fn replayed(reader: &Reader, after: u64, to: u64) -> Vec<u64> {
    let pages: Vec<_> = reader.replay(Position(after), Position(to)).try_collect().await.unwrap();
    pages.iter().flat_map(|page| page.events().map(|event| event.position.0)).collect()
}

/// What any reader sees of the log, whichever way it reads.
async fn assert_reads_as(database: &TestDatabase, expected: &[RecordedEvent]) {
    let reader = Reader::new(config(database));
    let head = expected.last().unwrap();
    assert_eq!(read_all(&reader).await, expected);
    let streamed: Vec<_> = reader.stream(Position(37), Position(211)).try_collect().await.unwrap();
    assert_eq!(streamed.concat(), expected[37..211]);
    let pages: Vec<_> = reader.replay(Position::ZERO, head.position).try_collect().await.unwrap();
    assert!(pages.iter().flat_map(weft_eventlog::Page::events).eq(expected.iter().map(RecordedEvent::view)));
    assert_eq!(replayed(&reader, 37, 211).await, (38..=211).collect::<Vec<_>>());
    for event in expected.iter().step_by(29) {
        let at = reader.position_at(event.recorded_at).await.unwrap();
        assert!(
            at >= event.position
                && expected[usize::try_from(at.0).unwrap() - 1].recorded_at == event.recorded_at
        );
        let before = reader.position_at(UnixMicros(event.recorded_at.0 - 1)).await.unwrap();
        assert!(before < event.position);
    }
    let mut tail = reader.tail(Position(150));
    let mut followed = Vec::new();
    while tail.position() < head.position {
        followed.extend(tail.next().await.unwrap());
    }
    assert_eq!(followed, expected[150..]);
    let report = verify(&reader, |_| ()).await.unwrap();
    assert_eq!((report.events, report.head.hash), (expected.len() as u64, head.hash));
}

#[tokio::test]
async fn ranges_are_made_ahead_and_closed_behind() {
    let database = small_ranges().await;
    let log = open(&database).await;
    fill(&log, 350).await;
    assert_gapless(&read_all(&log.reader()).await);
    // The task that looks after them works beside the appends.
    closed(&database, 300).await;
    wait_until("ranges to be made ahead", LIMIT, async || {
        count(&database, "select max(last_position) from weft.log_partition").await >= 500
    })
    .await;
    let stale = count(
        &database,
        "select count(*) from weft.scope_head as head where head.version is distinct from \
         (select max(version) from weft.event where event.scope = head.scope and event.position <= 300)",
    )
    .await;
    assert_eq!(stale, 0);
    log.shutdown().await;
    // What nobody remembers is looked up where it is kept.
    let log = open(&database).await;
    let quiet = "s/quiet";
    log.appender().append(request(vec![part(quiet, Any, 5)])).await.unwrap();
    fill(&log, 600).await;
    closed(&database, 500).await;
    log.shutdown().await;
    let log = open(&database).await;
    let stale = log.appender().append(request(vec![part(quiet, exact(4), 1)])).await;
    assert!(matches!(stale, Err(AppendError::Conflict { current: Version(5), .. })), "{stale:?}");
    log.appender().append(request(vec![part(quiet, exact(5), 1)])).await.unwrap();
    verify(&log.reader(), |_| ()).await.unwrap();
}

/// Where a command may be is told by the order of ids, and one may have been made long before it was recorded, or after
/// others that were recorded later.
#[tokio::test]
async fn a_repeat_is_found_in_whichever_range_its_command_was_recorded() {
    let database = small_ranges().await;
    let log = open(&database).await;
    let mut early = request(vec![part("s/kept", Any, 1)]);
    let late = request(vec![part("s/kept", Any, 1)]);
    early.command_id = made_before(late.command_id, 60_000);
    let mut asked = Vec::new();
    for n in 0..6 {
        let mut made_early = request(vec![part("s/kept", Any, 1)]);
        made_early.command_id = made_before(early.command_id, n);
        let now = request(vec![part("s/kept", Any, 2)]);
        for request in [made_early, now] {
            asked.push((log.appender().append(request.clone()).await.unwrap(), request));
        }
        fill(&log, 90 * (n + 1)).await;
    }
    for request in [late, early] {
        asked.push((log.appender().append(request.clone()).await.unwrap(), request));
    }
    closed(&database, 500).await;
    log.shutdown().await;
    let log = open(&database).await;
    // Under the lock at first, ahead of it once this appender has been alone for a while.
    for _ in 0..3 {
        for (first, request) in &asked {
            let again = log.appender().append(request.clone()).await.unwrap();
            assert_eq!(again, Appended { repeated: true, ..first.clone() });
            log.appender().append(one("s/other")).await.unwrap();
        }
    }
    log.shutdown().await;
}

/// An id made so many milliseconds before another one.
fn made_before(id: Uuid, millis: u64) -> Uuid {
    let (seconds, nanos) = id.get_timestamp().unwrap().to_unix();
    let made = seconds * 1_000 + u64::from(nanos) / 1_000_000 - millis;
    let mut bytes = [0; 10];
    bytes.copy_from_slice(&Uuid::now_v7().as_bytes()[6..]);
    uuid::Builder::from_unix_timestamp_millis(made, &bytes).into_uuid()
}

#[tokio::test]
async fn a_verification_is_not_confused_by_an_archive_beside_it() {
    let database = small_ranges().await;
    let log = open(&database).await;
    fill(&log, 1_000).await;
    let mut archiving = JoinSet::new();
    let config = everything(&database);
    archiving.spawn(async move { archive(&config, |_| ()).await.unwrap() });
    let tables = "select count(*) from pg_inherits where inhparent = 'weft.event'::regclass";
    let archived = loop {
        if let Some(archived) = archiving.try_join_next() {
            break archived.unwrap();
        }
        let before = count(&database, tables).await;
        verify(&log.reader(), |_| ()).await.unwrap();
        // Until the next one is taken away, or all are.
        let _ = timeout(Duration::from_secs(2), async {
            while count(&database, tables).await == before {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    };
    assert_eq!(archived.tables, 9);
    verify(&log.reader(), |_| ()).await.unwrap();
    log.shutdown().await;
}

#[tokio::test]
async fn a_range_that_is_missing_is_made_when_it_is_needed() {
    let database = small_ranges().await;
    let log = open(&database).await;
    // Whoever looks after ranges is away.
    let hold = database.connect().await;
    hold.batch_execute("alter function weft.make_partitions() rename to make_partitions_away").await.unwrap();
    hold.batch_execute(
        "create function weft.make_partitions() returns bigint language sql as 'select 0::bigint'; \
                        grant execute on function weft.make_partitions() to weft_appender",
    )
    .await
    .unwrap();
    fill(&log, 200).await;
    let appender = log.appender();
    let waiting = async { appender.append(request(vec![part("s/0", Any, 8)])).await };
    let coming = async {
        hold.batch_execute(
            "drop function weft.make_partitions(); \
                            alter function weft.make_partitions_away() rename to make_partitions",
        )
        .await
        .unwrap();
    };
    let (appended, ()) = tokio::join!(waiting, coming);
    appended.unwrap();
    assert_gapless(&read_all(&log.reader()).await);
}

#[tokio::test]
async fn what_is_sealed_is_read_as_if_it_were_rows() {
    let database = small_ranges().await;
    let log = open(&database).await;
    fill(&log, 350).await;
    let before = read_all(&log.reader()).await;
    assert_reads_as(&database, &before).await;

    let mut progress = Vec::new();
    let report = archive(&everything(&database), |seen| progress.push(seen)).await.unwrap();
    assert_eq!((report.sealed, report.events, report.segments, report.tables), (Position(300), 300, 3, 3));
    assert_eq!(progress.last().map(|seen| (seen.sealed, seen.of)), Some((Position(300), Position(300))));
    assert_eq!(count(&database, "select count(*) from weft.event").await, 50);
    assert_eq!(count(&database, "select sum(events)::bigint from audit.sealed").await, 300);
    assert_reads_as(&database, &before).await;

    // Who had it open goes on, and who opens it now knows what it knew.
    fill(&log, 360).await;
    let stale = log.appender().append(request(vec![part("s/0", exact(1), 1)])).await;
    assert!(matches!(stale, Err(AppendError::Conflict { .. })), "{stale:?}");
    log.shutdown().await;
    let log = open(&database).await;
    fill(&log, 420).await;
    let events = read_all(&log.reader()).await;
    assert_gapless(&events);
    let again = archive(&everything(&database), |_| ()).await.unwrap();
    assert_eq!((again.sealed, again.events, again.tables), (Position(400), 100, 1));
    assert_reads_as(&database, &events).await;
    assert_eq!(archive(&everything(&database), |_| ()).await.unwrap().events, 0);
}

#[tokio::test]
async fn a_writer_that_slept_while_its_last_event_was_sealed_wakes_up_knowing() {
    let database = small_ranges().await;
    let sleeper = open(&database).await;
    let (busy, scope) = (open(&database).await, "s/slept");
    sleeper.appender().append(request(vec![part(scope, Any, 2)])).await.unwrap();
    let mut tail = sleeper.reader().tail(Position::ZERO);
    tail.next().await.unwrap();
    fill(&busy, 350).await;
    archive(&everything(&database), |_| ()).await.unwrap();
    let appended = sleeper.appender().append(request(vec![part(scope, exact(2), 1)])).await.unwrap();
    assert_eq!(appended.versions[scope], Version(3));
    verify(&busy.reader(), |_| ()).await.unwrap();
}

#[tokio::test]
async fn a_writer_that_knew_the_log_when_it_was_empty_learns_what_was_sealed_since() {
    let database = small_ranges().await;
    let (sleeper, busy) = (open(&database).await, open(&database).await);
    // Now it knows that there is no such scope.
    let early = sleeper.appender().append(request(vec![part("s/0", exact(7), 1)])).await;
    assert!(matches!(early, Err(AppendError::Conflict { current: Version(0), .. })), "{early:?}");
    busy.appender().append(request(vec![part("s/0", Any, 1)])).await.unwrap();
    while busy.reader().head().await.unwrap().position < Position(150) {
        busy.appender().append(one("s/other")).await.unwrap();
    }
    archive(&everything(&database), |_| ()).await.unwrap();
    let stale = sleeper.appender().append(request(vec![part("s/0", Empty, 1)])).await;
    assert!(matches!(stale, Err(AppendError::Conflict { current: Version(1), .. })), "{stale:?}");
    verify(&busy.reader(), |_| ()).await.unwrap();
}

#[tokio::test]
async fn what_may_be_asked_for_again_is_not_sealed() {
    let database = small_ranges().await;
    let log = open(&database).await;
    fill(&log, 250).await;
    let day = Duration::from_secs(24 * 60 * 60);
    let young = ArchiveConfig { older_than: day, forget_outcomes: false, ..everything(&database) };
    assert!(matches!(archive(&young, |_| ()).await, Err(ArchiveError::TooYoung)));
    let old = ArchiveConfig { older_than: 30 * day, forget_outcomes: false, ..everything(&database) };
    assert_eq!(archive(&old, |_| ()).await.unwrap().sealed, Position::ZERO);
    assert_eq!(count(&database, "select count(*) from weft.event").await, 250);
}

#[tokio::test]
async fn damaged_events_are_not_sealed() {
    let database = small_ranges().await;
    let log = open(&database).await;
    fill(&log, 250).await;
    tamper(&database, "update weft.event set payload = '{}' where position = 123").await;
    let refused = archive(&everything(&database), |_| ()).await;
    assert!(matches!(refused, Err(ArchiveError::Damaged { position: Position(123) })), "{refused:?}");
    assert_eq!(count(&database, "select coalesce(max(last_position), 0) from weft.log_segment").await, 100);
}

#[tokio::test]
async fn an_archive_that_died_between_its_two_steps_is_finished_by_the_next() {
    let database = small_ranges().await;
    let log = open(&database).await;
    fill(&log, 250).await;
    let before = read_all(&log.reader()).await;
    // A reader holds the tables: they are sealed and cannot be taken away yet.
    let reading = database.connect().await;
    reading.batch_execute("begin; lock table weft.event in access share mode").await.unwrap();
    let database_config = everything(&database);
    let segments = "select count(*) from weft.log_segment";
    let sealed = wait_until("segments", LIMIT, async || count(&database, segments).await == 2);
    tokio::select! {
        result = archive(&database_config, |_| ()) => panic!("{result:?}"),
        () = sealed => {}
    }
    assert_eq!(count(&database, "select count(*) from weft.event").await, 250);
    assert_reads_as(&database, &before).await;
    // What is left is still read, so it is still verified.
    let change = |to: &str| format!("update weft.event set actor = {to} where position = 42");
    reading.batch_execute("commit").await.unwrap();
    tamper(&database, &change("actor || 'x'")).await;
    let found = verify(&log.reader(), |_| ()).await.unwrap_err();
    assert!(matches!(found, VerifyError::Damaged { position: Position(42), .. }), "{found:?}");
    tamper(&database, &change("rtrim(actor, 'x')")).await;
    verify(&log.reader(), |_| ()).await.unwrap();
    let report = archive(&database_config, |_| ()).await.unwrap();
    assert_eq!((report.sealed, report.events, report.tables), (Position(200), 0, 2));
    assert_reads_as(&database, &before).await;
}

#[tokio::test]
async fn damage_to_what_is_sealed_is_found() {
    let database = small_ranges().await;
    let log = open(&database).await;
    fill(&log, 250).await;
    archive(&everything(&database), |_| ()).await.unwrap();
    let reader = Reader::new(config(&database));
    let damage = async |sql: &str| {
        let keep = "create table kept as select * from weft.log_segment";
        database.connect().await.batch_execute(keep).await.unwrap();
        tamper(&database, sql).await;
        let found = verify(&reader, |_| ()).await.unwrap_err();
        let undo =
            "delete from weft.log_segment; insert into weft.log_segment select * from kept; drop table kept";
        tamper(&database, undo).await;
        verify(&reader, |_| ()).await.unwrap();
        match found {
            VerifyError::Damaged { position, defect } => (position.0, defect),
            VerifyError::Store(error) => panic!("{sql}: {error:?}"),
        }
    };
    let body =
        damage("update weft.log_segment set body = set_byte(body, 20, 7) where first_position = 101").await;
    assert!(matches!(body, (101, Defect::Segment(SegmentError::Body { .. }))), "{body:?}");
    let end = damage("update weft.log_segment set last_hash = sha256('x') where first_position = 101").await;
    assert!(matches!(end, (200, Defect::Hash { .. })), "{end:?}");
    let start =
        damage("update weft.log_segment set previous_hash = sha256('x') where first_position = 101").await;
    assert!(matches!(start, (101, Defect::Hash { .. })), "{start:?}");
    let gone = damage("delete from weft.log_segment where first_position = 1").await;
    assert_eq!(gone, (1, Defect::Missing { next: Position(101) }));
    let last = damage("delete from weft.log_segment where first_position = 101").await;
    assert_eq!(last, (101, Defect::Missing { next: Position(201) }));
}

#[tokio::test]
async fn a_repeat_after_three_days_is_refused_and_not_recorded_twice() {
    let database = migrated().await;
    let log = open(&database).await;
    let mut old = one("s");
    let day = 24 * 60 * 60 * 1_000;
    let made = |ms: u64| uuid::Builder::from_unix_timestamp_millis(ms, &[7; 10]).into_uuid();
    let (seconds, _) = old.command_id.get_timestamp().unwrap().to_unix();
    old.command_id = made(seconds * 1_000 - 3 * day - 1_000);
    let refused = log.appender().append(old.clone()).await;
    assert!(matches!(refused, Err(AppendError::CommandIdExpired)), "{refused:?}");
    old.command_id = made(seconds * 1_000 + day);
    let refused = log.appender().append(old).await;
    assert!(matches!(refused, Err(AppendError::Malformed(_))), "{refused:?}");
    assert_eq!(log.reader().head().await.unwrap().position, Position::ZERO);
}
