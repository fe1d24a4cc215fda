//! What a process does that has read events which the database then lost, as a failover to a standby does.

use std::time::Duration;
use tokio::time::timeout;
use weft_eventlog::{AppendError, Reader, StoreError, Tail};
use weft_model::version::Position;
use weft_testkit::TestDatabase;

use crate::support::{config, migrated, one, open, tamper};

/// Far longer than it takes to notice.
const PATIENCE: Duration = Duration::from_secs(20);

async fn append(database: &TestDatabase, count: usize) {
    let log = open(database).await;
    for _ in 0..count {
        log.appender().append(one("s")).await.unwrap();
    }
    log.shutdown().await;
}

/// The last events are lost, with what was written down beside them.
async fn lose(database: &TestDatabase, after: u64) {
    let lose = format!(
        "delete from weft.event where position > {after}; \
         delete from weft.log_batch where last_position > {after}"
    );
    tamper(database, &lose).await;
}

async fn read_to(tail: &mut Tail, position: u64) {
    while tail.position() < Position(position) {
        timeout(PATIENCE, tail.next()).await.unwrap().unwrap();
    }
}

async fn rewound(tail: &mut Tail) -> (u64, u64) {
    match timeout(PATIENCE, tail.next()).await.unwrap() {
        Err(StoreError::Rewound { seen, found }) => (seen.0, found.0),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn events_in_the_place_of_lost_ones_are_not_delivered_as_if_nothing_had_happened() {
    let database = migrated().await;
    append(&database, 5).await;
    let mut tail = Reader::new(config(&database)).tail(Position::ZERO);
    read_to(&mut tail, 5).await;
    lose(&database, 3).await;
    append(&database, 3).await;
    for _ in 0..2 {
        assert_eq!(rewound(&mut tail).await, (5, 6));
    }
    assert_eq!(tail.position(), Position(5), "the tail stays where it was");
}

#[tokio::test]
async fn a_log_that_became_shorter_is_noticed_while_nothing_is_appended() {
    let database = migrated().await;
    append(&database, 5).await;
    for left in [3, 0] {
        let mut tail = Reader::new(config(&database)).tail(Position(left + 1));
        read_to(&mut tail, left + 2).await;
        let seen = tail.position().0;
        lose(&database, left).await;
        assert_eq!(rewound(&mut tail).await, (seen, left));
    }
}

#[tokio::test]
async fn other_events_up_to_the_same_position_are_noticed_while_nothing_follows() {
    let database = migrated().await;
    append(&database, 5).await;
    let mut tail = Reader::new(config(&database)).tail(Position::ZERO);
    read_to(&mut tail, 5).await;
    lose(&database, 3).await;
    append(&database, 2).await;
    assert_eq!(rewound(&mut tail).await, (5, 5));
}

#[tokio::test]
async fn a_tail_learns_what_it_begins_after_and_a_log_without_it_is_no_beginning() {
    let database = migrated().await;
    append(&database, 5).await;
    let reader = Reader::new(config(&database));
    let mut tail = reader.tail(Position(5));
    assert!(timeout(Duration::from_millis(300), tail.next()).await.is_err(), "there is nothing yet");
    lose(&database, 3).await;
    append(&database, 3).await;
    assert_eq!(rewound(&mut tail).await, (5, 6));
    assert_eq!(rewound(&mut reader.tail(Position(9))).await, (9, 6));
}

#[tokio::test]
async fn an_event_that_was_changed_is_damage_and_not_a_rewind() {
    let database = migrated().await;
    append(&database, 5).await;
    let reader = Reader::new(config(&database));
    for (change, position) in [
        ("update weft.event set actor = 'mallory' where position = 5", 5),
        ("update weft.event set actor = 'mallory' where position = 3", 3),
        ("delete from weft.event where position = 1", 2),
    ] {
        tamper(&database, change).await;
        let mut tail = reader.tail(Position::ZERO);
        let found = timeout(PATIENCE, tail.next()).await.unwrap();
        assert!(
            matches!(found, Err(StoreError::Broken { position: at }) if at == Position(position)),
            "{change}: {found:?}"
        );
    }
}

/// The process of this log appended nothing; it has only read.
#[tokio::test]
async fn a_process_does_not_append_to_a_log_that_lost_what_it_has_read() {
    for come_after in [0, 4] {
        let database = migrated().await;
        let here = open(&database).await;
        append(&database, 5).await;
        let mut tail = here.reader().tail(Position::ZERO);
        read_to(&mut tail, 5).await;
        lose(&database, 3).await;
        append(&database, come_after).await;
        let found = Position(3 + come_after as u64);
        if come_after > 0 {
            assert_eq!(rewound(&mut tail).await, (5, found.0));
            // Another tail, which knows nothing of what was lost, does not make it good.
            read_to(&mut here.reader().tail(Position::ZERO), found.0).await;
        }
        for _ in 0..2 {
            match here.appender().append(one("s")).await.unwrap_err() {
                AppendError::Rewound { seen, found: end } => assert_eq!((seen, end), (Position(5), found)),
                other => panic!("{other:?}"),
            }
        }
    }
}
