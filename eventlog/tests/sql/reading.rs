//! Pages, streams, points in time, and following.

use futures_util::TryStreamExt;
use std::time::Duration;
use tokio::time::timeout;
use weft_eventlog::{PAGE_BYTES_MAX, Reader, UnixMicros};
use weft_model::version::{Epoch, Position};

use crate::support::{Any, assert_gapless, config, event, migrated, one, open, part, read_all, request};

/// Far longer than any event takes to arrive.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn an_empty_log_reads_as_empty() {
    let database = migrated().await;
    let reader = Reader::new(config(&database));
    let head = reader.head().await.unwrap();
    assert_eq!((head.epoch, head.position, head.recorded_at), (Epoch(0), Position(0), None));
    assert_eq!(reader.read(Position(0), 10).await.unwrap(), []);
    assert_eq!(reader.position_at(UnixMicros(i64::from(u32::MAX) * 1_000_000)).await.unwrap(), Position(0));
    let pages: Vec<_> = reader.stream(Position(0), Position(9)).try_collect().await.unwrap();
    assert_eq!(pages, Vec::<Vec<_>>::new());
}

#[tokio::test]
async fn pages_follow_each_other() {
    let database = migrated().await;
    let log = open(&database).await;
    log.appender().append(request(vec![part("a", Any, 7), part("b", Any, 5)])).await.unwrap();
    log.appender().append(request(vec![part("a", Any, 3)])).await.unwrap();
    let reader = log.reader();
    let numbers =
        |events: &[weft_eventlog::RecordedEvent]| events.iter().map(|e| e.position.0).collect::<Vec<_>>();
    assert_eq!(numbers(&reader.read(Position(3), 4).await.unwrap()), [4, 5, 6, 7]);
    assert_eq!(numbers(&reader.read(Position(14), 4).await.unwrap()), [15]);
    let pages: Vec<_> = reader.stream(Position(2), Position(13)).try_collect().await.unwrap();
    assert_eq!(numbers(&pages.concat()), (3..=13).collect::<Vec<_>>());
}

#[tokio::test]
async fn large_events_come_in_pages_of_bounded_size() {
    let database = migrated().await;
    let log = open(&database).await;
    let large = format!("\"{}\"", "x".repeat(250_000));
    for _ in 0..8 {
        let mut command = one("s");
        command.scopes[0].events = vec![event(&large); 12];
        log.appender().append(command).await.unwrap();
    }
    let pages: Vec<_> = log.reader().stream(Position(0), Position(96)).try_collect().await.unwrap();
    assert!(pages.len() > 1);
    for page in &pages {
        assert!(page.len() * large.len() <= PAGE_BYTES_MAX + large.len() + 4_096);
    }
    assert_gapless(&pages.concat());
    assert_eq!(read_all(&log.reader()).await.len(), 96);
}

#[tokio::test]
async fn a_point_in_time_is_the_last_position_up_to_it() {
    let database = migrated().await;
    let log = open(&database).await;
    for n in 1..=20 {
        log.appender().append(request(vec![part("s", Any, n)])).await.unwrap();
    }
    let events = read_all(&log.reader()).await;
    for event in &events {
        let last =
            events.iter().filter(|other| other.recorded_at <= event.recorded_at).map(|e| e.position).max();
        let at = log.reader().position_at(event.recorded_at).await.unwrap();
        assert_eq!(Some(at), last);
    }
    let before = UnixMicros(events[0].recorded_at.0 - 1);
    assert_eq!(log.reader().position_at(before).await.unwrap(), Position(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn tails_here_and_elsewhere_deliver_everything_once_and_in_order() {
    let database = migrated().await;
    let log = open(&database).await;
    log.appender().append(request(vec![part("s", Any, 10)])).await.unwrap();
    let elsewhere = Reader::new(config(&database));
    let mut tails =
        [log.reader().tail(Position(4)), log.reader().tail(Position(10)), elsewhere.tail(Position(0))];
    for n in 0..50 {
        log.appender().append(one(&format!("s/{}", n % 3))).await.unwrap();
    }
    for (tail, after) in tails.iter_mut().zip([4, 10, 0]) {
        let mut seen = Vec::new();
        while tail.position() < Position(60) {
            let page = timeout(PATIENCE, tail.next()).await.unwrap().unwrap();
            assert!(!page.is_empty());
            seen.extend(page.into_iter().map(|event| event.position.0));
        }
        assert_eq!(seen, (after + 1..=60).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn giving_up_on_a_tail_loses_nothing() {
    let database = migrated().await;
    let log = open(&database).await;
    let mut tail = log.reader().tail(Position(0));
    for position in 1..=20 {
        // Dropped wherever it happens to be.
        let _ = timeout(Duration::from_micros(position * 50), tail.next()).await;
        log.appender().append(one("s")).await.unwrap();
    }
    let mut seen = tail.position();
    while seen < Position(20) {
        let page = timeout(PATIENCE, tail.next()).await.unwrap().unwrap();
        assert_eq!(page[0].position, seen.next());
        seen = page.last().unwrap().position;
    }
}

#[tokio::test]
async fn hints_of_strangers_are_not_believed() {
    let database = migrated().await;
    let log = open(&database).await;
    let mut tail = Reader::new(config(&database)).tail(Position(0));
    let stranger = database.connect().await;
    for payload in ["18446744073709551615", "", "x", "-1"] {
        stranger.execute("select pg_notify('weft_log', $1)", &[&payload]).await.unwrap();
    }
    log.appender().append(one("s")).await.unwrap();
    assert_eq!(timeout(PATIENCE, tail.next()).await.unwrap().unwrap().len(), 1);
}
