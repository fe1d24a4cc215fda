//! Every way to falsify the log that we can think of, and where `verify` finds it.

use weft_eventlog::{Contradiction, Defect, EventHash, Reader, VerifyError, verify};
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
async fn what_was_written_down_beside_the_events_must_be_what_they_say() {
    use Contradiction::{Commands, Hash, Mark, Missing, Order, Time};
    for (change, expected) in [
        ("delete from weft.log_batch where last_position = 4", Order),
        ("delete from weft.log_batch where last_position = 1", Missing),
        ("update weft.log_batch set epoch = 2 where last_position = 4", Time),
        (
            "update weft.log_batch set recorded_at = recorded_at - interval '1 second' where last_position = 4",
            Time,
        ),
        (
            "update weft.log_batch set first_position = 3, marks = marks || marks where last_position = 4",
            Order,
        ),
        (
            "update weft.log_batch set marks = sha256('x') where false; update weft.log_batch \
          set marks = substring(sha256('x') from 1 for 8) where last_position = 4",
            Mark,
        ),
        ("update weft.log_batch set hash = sha256('x') where last_position = 4", Hash),
        ("update weft.log_batch set commands_hash = sha256('x') where last_position = 4", Commands),
        ("update weft.event set fingerprint = sha256('x') where position = 4", Mark),
        ("update weft.event set command_events = 2 where position = 4", Mark),
        ("update weft.event set command_events = null, fingerprint = null where position = 4", Mark),
        // The same bytes at other places.
        (
            "update weft.event set fingerprint = substring(fingerprint from 9) || substring(fingerprint from 1 for 8) \
          where position = 4",
            Mark,
        ),
    ] {
        let at = if expected == Missing { 1 } else { 4 };
        assert_eq!(damage(change).await, (at, Defect::Witness(expected)), "{change}");
    }
}

#[tokio::test]
async fn an_event_that_nobody_appended_is_found_at_the_end_too() {
    let database = sound().await;
    let reader = Reader::new(config(&database));
    let last = reader.read(Position(9), 1).await.unwrap().remove(0);
    let mut added = last.clone();
    (added.position, added.version) = (Position(11), last.version.next());
    let sql = format!(
        "insert into weft.event select 11, epoch, {}, recorded_at, cause, command_id, fingerprint, command_events, schema, \
         '\\x{}', scope, type, actor, reason, payload from weft.event where position = 10",
        added.version,
        added.expected_hash(last.hash)
    );
    tamper(&database, &sql).await;
    let error = verify(&reader, |_| ()).await.unwrap_err();
    let VerifyError::Damaged { position, defect } = error else { panic!("{error:?}") };
    assert_eq!((position, defect), (Position(11), Defect::Witness(Contradiction::Missing)));
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
         insert into weft.event select 11, 2, 6, recorded_at, cause, '{id}', null, null, schema, '\\x{next}', \
         scope, type, actor, reason, payload from weft.event where position = 10; \
         insert into weft.log_batch select 11, 11, 2, recorded_at, '\\x{next}', sha256('weft-commands/1\n'), \
         substring('\\x{next}'::bytea from 1 for 8) from weft.log_batch where last_position = 10; commit",
        last.hash,
        next = next.hash,
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
