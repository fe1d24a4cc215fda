//! Databases with an event log in them, and short ways to say what to append.

use uuid::Uuid;
use weft_eventlog::{
    AppendError, AppendRequest, Appended, Appender, ConnectConfig, EventLog, LogConfig, NewEvent, Reader,
    RecordedEvent, ScopeAppend, StoreError, migrate,
};
use weft_model::version::{ExpectedVersion, Position, Version};
use weft_testkit::TestDatabase;

pub(crate) use weft_model::version::ExpectedVersion::{Any, Empty};

/// Takes the log's lock, for tests that hold it.
pub(crate) const LOCK: &str = "begin; lock table weft.log_lock in exclusive mode";

pub(crate) fn config(database: &TestDatabase) -> ConnectConfig {
    database.url().parse().unwrap()
}

/// A database with an empty event log.
pub(crate) async fn migrated() -> TestDatabase {
    let database = TestDatabase::create().await;
    migrate(&config(&database)).await.unwrap();
    database
}

pub(crate) async fn open(database: &TestDatabase) -> EventLog {
    EventLog::open(LogConfig::new(config(database))).await.unwrap()
}

pub(crate) fn exact(version: u64) -> ExpectedVersion {
    ExpectedVersion::Exact(Version(version))
}

pub(crate) fn event(payload: &str) -> NewEvent {
    NewEvent { event_type: "Happened".into(), schema: 1, payload: payload.into() }
}

pub(crate) fn part(scope: &str, expected: ExpectedVersion, events: usize) -> ScopeAppend {
    let events = (0..events).map(|n| event(&format!("{{\"n\": {n}}}"))).collect();
    ScopeAppend { scope: scope.into(), expected, events }
}

pub(crate) fn request(scopes: Vec<ScopeAppend>) -> AppendRequest {
    AppendRequest {
        command_id: Uuid::now_v7(),
        fingerprint: None,
        actor: "spiffe://test/operator".into(),
        reason: None,
        cause: None,
        scopes,
    }
}

/// One event in one scope, whatever its version.
pub(crate) fn one(scope: &str) -> AppendRequest {
    request(vec![part(scope, Any, 1)])
}

/// Positions `first..=last` of an accepted request.
pub(crate) fn positions(appended: &Appended) -> (u64, u64) {
    let range = appended.positions.clone().unwrap();
    (range.start().0, range.end().0)
}

/// Appends, and repeats with the same command id for as long as the store fails, as a caller should.
pub(crate) async fn append_surely(appender: &Appender, request: &AppendRequest) -> Appended {
    loop {
        match appender.append(request.clone()).await {
            Ok(appended) => return appended,
            Err(AppendError::Store(_) | AppendError::Overloaded { .. }) => tokio::task::yield_now().await,
            Err(other) => panic!("{other:?}"),
        }
    }
}

pub(crate) async fn read_all(reader: &Reader) -> Vec<RecordedEvent> {
    let mut events: Vec<RecordedEvent> = Vec::new();
    loop {
        let after = events.last().map_or(Position::ZERO, |event| event.position);
        match surely(|| reader.read(after, 1_000)).await {
            page if page.is_empty() => return events,
            page => events.extend(page),
        }
    }
}

/// Repeats a read for as long as the store fails.
pub(crate) async fn surely<T, F: Future<Output = Result<T, StoreError>>>(mut read: impl FnMut() -> F) -> T {
    loop {
        match read().await {
            Ok(value) => return value,
            Err(error) => assert!(error_is_connection(&error), "{error:?}"),
        }
    }
}

fn error_is_connection(error: &StoreError) -> bool {
    matches!(error, StoreError::Connect(_) | StoreError::Statement { .. })
}

/// Asserts that positions and each scope's versions count 1, 2, 3 without a gap.
pub(crate) fn assert_gapless(events: &[RecordedEvent]) {
    let mut versions = std::collections::BTreeMap::new();
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event.position.0, i as u64 + 1);
        let version = versions.entry(event.scope.clone()).or_insert(0);
        *version += 1;
        assert_eq!(event.version.0, *version, "{}", event.scope);
    }
}

/// Ends every connection of the event log to a database.
pub(crate) async fn kill_backends(client: &tokio_postgres::Client) -> u64 {
    const SQL: &str = "select pg_terminate_backend(pid) from pg_stat_activity \
                       where datname = current_database() and application_name = 'weft-eventlog'";
    client.execute(SQL, &[]).await.unwrap()
}

/// Runs statements with the append-only triggers off: what an intruder who owns the database would do.
pub(crate) async fn tamper(database: &TestDatabase, sql: &str) {
    let client = database.connect().await;
    let switch = |how: &str| {
        let tables = ["event", "log_epoch", "log_batch", "log_segment"];
        tables.map(|table| format!("alter table weft.{table} {how} trigger append_only")).join(";")
    };
    let script = format!("{}; {sql}; {}", switch("disable"), switch("enable always"));
    client.batch_execute(&script).await.unwrap();
}
