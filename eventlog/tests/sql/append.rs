//! What one appender promises its callers.

use std::collections::BTreeMap;
use weft_eventlog::{AppendError, AppendRequest, Appended, LogConfig, OpenError, SettingsError};
use weft_model::version::{Position, Version};
use weft_testkit::TestDatabase;

use crate::support::{
    Any, Empty, LOCK, assert_gapless, config, event, exact, migrated, one, open, part, positions, read_all,
    request,
};

#[tokio::test]
async fn an_accepted_request_says_where_its_events_are() {
    let database = migrated().await;
    let log = open(&database).await;
    let appender = log.appender();
    assert_eq!(positions(&appender.append(one("other")).await.unwrap()), (1, 1));
    let appended = appender.append(request(vec![part("a", Empty, 2), part("b", Empty, 1)])).await.unwrap();
    assert_eq!(positions(&appended), (2, 4));
    assert_eq!(appended.versions, BTreeMap::from([("a".into(), Version(2)), ("b".into(), Version(1))]));
    assert!(!appended.repeated);
    let head = log.reader().head().await.unwrap();
    assert_eq!((head.epoch, head.position), (appended.epoch, Position(4)));
    assert_eq!(head.recorded_at, Some(appended.recorded_at));
}

#[tokio::test]
async fn a_conflict_names_the_scope_and_fails_nobody_else() {
    let database = migrated().await;
    let log = open(&database).await;
    let appender = log.appender();
    appender.append(request(vec![part("s", Empty, 3)])).await.unwrap();
    let (before, stale, after) = tokio::join!(
        appender.append(one("x")),
        appender.append(request(vec![part("s", exact(2), 1)])),
        appender.append(one("y")),
    );
    assert_eq!((positions(&before.unwrap()), positions(&after.unwrap())), ((4, 4), (5, 5)));
    match stale.unwrap_err() {
        AppendError::Conflict { scope, expected, current } => {
            assert_eq!((scope.as_str(), expected, current), ("s", exact(2), Version(3)));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn several_scopes_are_appended_all_or_not_at_all() {
    let database = migrated().await;
    let log = open(&database).await;
    let appender = log.appender();
    appender.append(one("b")).await.unwrap();
    let refused = appender.append(request(vec![part("a", Empty, 2), part("b", Empty, 2)])).await;
    assert!(matches!(refused, Err(AppendError::Conflict { scope, .. }) if scope == "b"));
    assert_eq!(log.reader().head().await.unwrap().position, Position(1));
    // An expectation without events guards the rest.
    let guarded = request(vec![part("a", Empty, 1), part("b", exact(2), 0)]);
    assert!(matches!(appender.append(guarded).await, Err(AppendError::Conflict { .. })));
    let guarded = request(vec![part("a", Empty, 1), part("b", exact(1), 0)]);
    assert_eq!(positions(&appender.append(guarded).await.unwrap()), (2, 2));
    let only_guard = appender.append(request(vec![part("a", exact(1), 0)])).await.unwrap();
    assert_eq!((only_guard.positions, only_guard.versions), (None, BTreeMap::new()));
    assert_gapless(&read_all(&log.reader()).await);
}

#[tokio::test]
async fn a_repeat_returns_the_first_outcome_even_after_the_log_went_on() {
    let database = migrated().await;
    let log = open(&database).await;
    let command = request(vec![part("a", Empty, 2), part("b", Any, 1)]);
    let first = log.appender().append(command.clone()).await.unwrap();
    log.appender().append(one("a")).await.unwrap();
    let repeated = Appended { repeated: true, ..first.clone() };
    assert_eq!(log.appender().append(command.clone()).await.unwrap(), repeated);
    log.shutdown().await;

    // Another process knows it too.
    let log = open(&database).await;
    assert_eq!(log.appender().append(command.clone()).await.unwrap(), repeated);
    let outcome = log.reader().outcome(command.command_id).await.unwrap().unwrap();
    assert_eq!(outcome.appended, first);
    assert_eq!(log.reader().outcome(uuid::Uuid::now_v7()).await.unwrap(), None);
    assert_eq!(log.reader().head().await.unwrap().position, Position(4));
}

#[tokio::test]
async fn a_command_id_stands_for_one_content() {
    let database = migrated().await;
    let log = open(&database).await;
    let command = one("a");
    log.appender().append(command.clone()).await.unwrap();
    let mut other = one("b");
    other.command_id = command.command_id;
    assert!(matches!(log.appender().append(other).await, Err(AppendError::CommandIdReused)));

    // The author's fingerprint decides, not the events that were derived this time.
    let mut decided = one("c");
    decided.fingerprint = Some([7; 32]);
    let first = log.appender().append(decided.clone()).await.unwrap();
    decided.scopes = vec![part("c", exact(99), 0)];
    assert_eq!(log.appender().append(decided).await.unwrap(), Appended { repeated: true, ..first });
}

/// However the batch that it is in is written.
#[tokio::test]
async fn a_used_id_is_known_even_to_a_request_that_changes_nothing() {
    let database = migrated().await;
    let log = open(&database).await;
    let first = one("s");
    log.appender().append(first.clone()).await.unwrap();
    let guard = AppendRequest { scopes: vec![part("s", Any, 0)], ..first };
    for _ in 0..12 {
        let error = log.appender().append(guard.clone()).await.unwrap_err();
        assert!(matches!(error, AppendError::CommandIdReused), "{error:?}");
        // Alone for a while, the appender sends ahead of the lock.
        log.appender().append(one("other")).await.unwrap();
    }
    log.shutdown().await;
}

#[tokio::test]
async fn a_refused_request_may_be_repeated_and_is_decided_anew() {
    let database = migrated().await;
    let log = open(&database).await;
    let early = request(vec![part("s", exact(1), 1)]);
    assert!(matches!(log.appender().append(early.clone()).await, Err(AppendError::Conflict { .. })));
    log.appender().append(one("s")).await.unwrap();
    assert_eq!(positions(&log.appender().append(early).await.unwrap()), (2, 2));
}

#[tokio::test]
async fn payloads_and_texts_are_kept_byte_for_byte() {
    let database = migrated().await;
    let log = open(&database).await;
    let payloads = [
        " {  \"a\" : 1 ,\n\t\"a\" : 2 } ",
        "{\"z\":1,\"a\":[1.50, 1e2, -0, 12345678901234567890]}",
        "\"\\u00e9 é \u{1F9F5} \\ud83e\\uddf5 \\/ \"",
        "null",
        "[]",
    ];
    let mut command = one("s/größe->✓");
    command.scopes[0].events = payloads.iter().map(|payload| event(payload)).collect();
    command.reason = Some("  'quoted' \\ \"reason\"\n{},NULL ".into());
    log.appender().append(command.clone()).await.unwrap();
    let events = read_all(&log.reader()).await;
    let read: Vec<&str> = events.iter().map(|event| event.payload.as_str()).collect();
    assert_eq!(read, payloads);
    assert_eq!(events[0].scope, command.scopes[0].scope);
    assert_eq!(events[0].reason, command.reason);
    weft_eventlog::verify(&log.reader(), |_| ()).await.unwrap();
}

#[tokio::test]
async fn a_cause_is_recorded_and_must_exist() {
    let database = migrated().await;
    let log = open(&database).await;
    let mut caused = one("s");
    caused.cause = Some(Position(1));
    assert!(matches!(log.appender().append(caused.clone()).await, Err(AppendError::Malformed(_))));
    log.appender().append(one("s")).await.unwrap();
    log.appender().append(caused).await.unwrap();
    assert_eq!(read_all(&log.reader()).await[1].cause, Some(Position(1)));
}

#[tokio::test]
async fn a_closed_log_answers_what_was_queued_and_refuses_the_rest() {
    let database = migrated().await;
    let log = open(&database).await;
    let appender = log.appender();
    let queued: tokio::task::JoinSet<_> = (0..50)
        .map(|n| {
            let appender = appender.clone();
            async move { appender.append(one(&format!("s/{n}"))).await }
        })
        .collect();
    let (answers, ()) = tokio::join!(queued.join_all(), log.shutdown());
    for answer in answers {
        assert!(matches!(answer, Ok(_) | Err(AppendError::Closed)), "{answer:?}");
    }
    assert!(matches!(appender.append(one("late")).await, Err(AppendError::Closed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_at_once_and_loses_nothing_that_it_took() {
    let database = migrated().await;
    let log = open(&database).await;
    let blocker = database.connect().await;
    blocker.batch_execute(LOCK).await.unwrap();
    let mut waiting: tokio::task::JoinSet<_> = (0..7_000)
        .map(|n| {
            let appender = log.appender();
            async move { appender.append(one(&format!("s/{}", n % 10))).await }
        })
        .collect();
    // While the lock is held nobody can be accepted, so the first answer is a refusal.
    let refused = waiting.join_next().await.unwrap().unwrap();
    assert!(matches!(refused, Err(AppendError::Overloaded { retry_after_ms: 5..=1_000 })), "{refused:?}");
    blocker.batch_execute("rollback").await.unwrap();
    let accepted = waiting.join_all().await.iter().filter(|answer| answer.is_ok()).count();
    let events = read_all(&log.reader()).await;
    assert_eq!(events.len(), accepted);
    assert_gapless(&events);
}

#[tokio::test]
async fn a_server_that_may_lose_events_is_refused_unless_asked_for() {
    let database = migrated().await;
    let client = database.connect().await;
    let off = format!("alter database {} set synchronous_commit = off", database.name());
    client.batch_execute(&off).await.unwrap();
    let mut settings = LogConfig::new(config(&database));
    match weft_eventlog::EventLog::open(settings.clone()).await.unwrap_err() {
        OpenError::Unfit(SettingsError::Unsafe { setting, .. }) => assert_eq!(setting, "synchronous_commit"),
        other => panic!("{other:?}"),
    }
    settings.allow_unsafe_settings = true;
    let log = weft_eventlog::EventLog::open(settings).await.unwrap();
    log.appender().append(one("s")).await.unwrap();
}

#[tokio::test]
async fn a_database_without_a_log_says_so() {
    let database = TestDatabase::create().await;
    let error = weft_eventlog::EventLog::open(LogConfig::new(config(&database))).await.unwrap_err();
    assert!(matches!(error, OpenError::NotMigrated), "{error:?}");
}
