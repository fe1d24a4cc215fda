//! Every way to falsify the log that we can think of, and where `verify` finds it.

use weft_eventlog::{Defect, EventHash, Reader, VerifyError, verify};
use weft_model::version::{Epoch, Position, Version};
use weft_testkit::TestDatabase;

use crate::support::{Any, config, migrated, open, part, request, tamper};

/// Ten events: odd positions in scope `a`, even ones in scope `b`.
async fn sound() -> TestDatabase {
    let database = migrated().await;
    let log = open(&database).await;
    for n in 0..10 {
        log.appender().append(request(vec![part(["a", "b"][n % 2], Any, 1)])).await.unwrap();
    }
    log.shutdown().await;
    database
}

async fn damage(sql: &str) -> (u64, Defect) {
    let database = sound().await;
    tamper(&database, sql).await;
    match verify(&Reader::new(config(&database)), |_| ()).await {
        Err(VerifyError::Damaged { position, defect }) => (position.0, defect),
        other => panic!("{sql}: {other:?}"),
    }
}

#[tokio::test]
async fn a_sound_log_is_sound_and_tells_its_progress() {
    let database = sound().await;
    let mut checked = Vec::new();
    let report = verify(&Reader::new(config(&database)), |progress| checked.push(progress)).await.unwrap();
    assert_eq!((report.events, report.scopes, report.epochs), (10, 2, 1));
    assert_eq!(report.head.position, Position(10));
    let last = checked.last().unwrap();
    assert_eq!((last.checked, last.of), (Position(10), Position(10)));
}

#[tokio::test]
async fn every_changed_column_is_found_where_it_was_changed() {
    for change in [
        "payload = '{\"n\":0}'",
        "payload = (payload::text || ' ')::json",
        "epoch = 2",
        "scope = 'c'",
        "version = 99",
        "type = 'Other'",
        "schema = 2",
        "actor = 'mallory'",
        "reason = ''",
        "cause = 1",
        "command_id = gen_random_uuid()",
        "recorded_at = recorded_at + interval '1 microsecond'",
        "hash = sha256('forged')",
    ] {
        let (position, defect) = damage(&format!("update weft.event set {change} where position = 4")).await;
        assert!(position == 4 && matches!(defect, Defect::Hash { .. }), "{change}: {position} {defect:?}");
    }
}

#[tokio::test]
async fn removed_swapped_and_cut_off_events_are_found() {
    let removed = damage("delete from weft.event where position = 6").await;
    assert_eq!(removed, (6, Defect::Missing { next: Position(7) }));
    let first = damage("delete from weft.event where position = 1").await;
    assert_eq!(first, (1, Defect::Missing { next: Position(2) }));
    let cut = damage("delete from weft.event where position > 8").await;
    assert_eq!(cut, (9, Defect::CutOff { end: Position(8), acknowledged: Position(10) }));
    let (position, defect) = damage(
        "update weft.event set position = 1000 where position = 3; \
         update weft.event set position = 3 where position = 5; \
         update weft.event set position = 5 where position = 1000",
    )
    .await;
    assert!(position == 3 && matches!(defect, Defect::Hash { .. }), "{position} {defect:?}");
}

#[tokio::test]
async fn what_commands_were_told_must_be_what_the_events_say() {
    for change in [
        "delete from weft.command_outcome where last_position = 4",
        "update weft.command_outcome set command_id = gen_random_uuid() where last_position = 4",
        "update weft.command_outcome set epoch = 2 where last_position = 4",
        "update weft.command_outcome set recorded_at = recorded_at - interval '1 second' where last_position = 4",
        "update weft.command_outcome set first_position = 3 where last_position = 4",
        "insert into weft.command_outcome select gen_random_uuid(), epoch, 4, 11, recorded_at, fingerprint \
         from weft.command_outcome where last_position = 4; \
         delete from weft.command_outcome where last_position = 4",
    ] {
        let (position, defect) = damage(change).await;
        assert!(position == 4 && matches!(defect, Defect::Outcome { .. }), "{change}: {position} {defect:?}");
    }
}

/// A writer that holds the table up makes the verification stop halfway through its beginning, if there is such a place.
#[tokio::test]
async fn an_epoch_that_opens_while_the_verification_begins_is_no_damage() {
    let database = sound().await;
    let reader = Reader::new(config(&database));
    let last = reader.read(Position(9), 1).await.unwrap().remove(0);
    let mut next = weft_eventlog::RecordedEvent {
        position: Position(11),
        epoch: Epoch(2),
        version: Version(6),
        command_id: uuid::Uuid::now_v7(),
        ..last.clone()
    };
    next.hash = next.expected_hash(last.hash);
    let going_on = format!(
        "insert into weft.log_epoch select 2, system_identifier, timeline, now(), event_table, 10, '\\x{}', now() \
         from weft.log_epoch; \
         insert into weft.event select 11, 2, 6, recorded_at, cause, '{id}', schema, '\\x{}', \
         scope, type, actor, reason, payload from weft.event where position = 10; \
         insert into weft.command_outcome select '{id}', 2, 11, 11, recorded_at, fingerprint \
         from weft.command_outcome where last_position = 10; commit",
        last.hash,
        next.hash,
        id = next.command_id
    );
    let (admin, watcher) = (database.connect().await, database.connect().await);
    admin.batch_execute("begin; lock table weft.event in access exclusive mode").await.unwrap();
    let writing = async {
        let waits =
            "select exists (select from pg_locks where relation = 'weft.event'::regclass and not granted)";
        while !watcher.query_one(waits, &[]).await.unwrap().get::<_, bool>(0) {}
        admin.batch_execute(&going_on).await.unwrap();
    };
    let (report, ()) = tokio::join!(verify(&reader, |_| ()), writing);
    let report = report.unwrap();
    assert_eq!((report.events, report.epochs, report.head.epoch), (11, 2, Epoch(2)));
}

#[tokio::test]
async fn a_forged_chain_still_has_to_count() {
    let database = sound().await;
    let reader = Reader::new(config(&database));
    let events = reader.read(Position(0), 10).await.unwrap();
    // The last event again, under hashes that fit: one version too far, too early, and in an epoch that never was.
    let previous = events[8].hash;
    let forge = |change: fn(&mut weft_eventlog::RecordedEvent)| {
        let mut forged = events[9].clone();
        change(&mut forged);
        let hash = forged.expected_hash(previous);
        (forged, hash)
    };
    let cases = [
        forge(|event| event.version = Version(7)),
        forge(|event| event.recorded_at.0 -= 3_600_000_000),
        forge(|event| event.epoch = Epoch(2)),
    ];
    let mut defects = Vec::new();
    for (forged, hash) in cases {
        let sql = format!(
            "update weft.event set version = {}, epoch = {}, hash = '\\x{hash}', \
             recorded_at = to_timestamp(0) + {} * interval '1 microsecond' where position = 10",
            forged.version, forged.epoch, forged.recorded_at.0
        );
        tamper(&database, &sql).await;
        match verify(&reader, |_| ()).await.unwrap_err() {
            VerifyError::Damaged { position, defect } => defects.push((position.0, defect)),
            VerifyError::Store(error) => panic!("{error:?}"),
        }
    }
    let version = Defect::Version { scope: "b".into(), expected: Version(5), recorded: Version(7) };
    assert_eq!(defects[0], (10, version));
    assert!(matches!(defects[1], (10, Defect::Time { .. })), "{:?}", defects[1]);
    assert_eq!(defects[2], (10, Defect::Epoch { recorded: Epoch(2) }));
}

#[tokio::test]
async fn what_an_epoch_found_when_it_was_opened_must_still_be_there() {
    let forged = EventHash([1; 32]);
    let rewritten = damage(&format!(
        "insert into weft.log_epoch select 2, system_identifier, timeline, now(), event_table, 4, '\\x{forged}', now() \
         from weft.log_epoch"
    ))
    .await;
    assert_eq!(rewritten, (4, Defect::Rewritten { epoch: Epoch(2), found: forged }));
}
