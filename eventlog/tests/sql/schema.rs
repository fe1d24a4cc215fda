//! What the migrations promise to people who use SQL, and to those who try to change history.

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use std::pin::pin;
use tokio_postgres::error::SqlState;
use weft_eventlog::{AppendRequest, Appended, verify};
use weft_testkit::TestDatabase;

use crate::support::{Any, config, migrated, one, open, part, read_all, request};

#[tokio::test]
async fn migrating_twice_and_at_once_is_harmless() {
    let databases = [TestDatabase::create().await, TestDatabase::create().await];
    let runs = databases.iter().flat_map(|database| (0..4).map(|_| config(database)));
    let runs: tokio::task::JoinSet<_> =
        runs.map(|config| async move { weft_eventlog::migrate(&config).await }).collect();
    for result in runs.join_all().await {
        result.unwrap();
    }
    open(&databases[0]).await.shutdown().await;
}

#[tokio::test]
async fn applied_migrations_are_found_again_whatever_the_search_path() {
    let database = TestDatabase::create().await;
    for path in ["public", "weft, public", "nowhere"] {
        let alter = format!("alter database {} set search_path = {path}", database.name());
        database.connect().await.batch_execute(&alter).await.unwrap();
        weft_eventlog::migrate(&config(&database)).await.unwrap();
    }
}

/// Not a test of its own: what the next test runs with other variables set. The last argument says where.
#[tokio::test]
#[ignore = "run by another test"]
async fn migrate_where_told() {
    if let Some(url) = std::env::args().next_back().filter(|last| last.starts_with("postgres")) {
        weft_eventlog::migrate(&url.parse().unwrap()).await.unwrap();
    }
}

#[tokio::test]
async fn the_variables_of_whoever_starts_us_do_not_say_where_or_how_to_migrate() {
    let database = TestDatabase::create().await;
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "schema::migrate_where_told", "--ignored", "--", database.url()])
        .env("PGHOST", "192.0.2.1")
        .env("PGPORT", "1")
        .env("PGDATABASE", "template1")
        .env("PGUSER", "nobody")
        .env("PGPASSWORD", "wrong")
        .env("PGSSLMODE", "verify-full")
        .env("PGOPTIONS", "-c default_transaction_read_only=on -c search_path=nowhere -c statement_timeout=1")
        .status();
    assert!(status.unwrap().success());
    open(&database).await.shutdown().await;
}

#[tokio::test]
async fn an_unknown_migration_means_a_newer_weft() {
    let database = migrated().await;
    let client = database.connect().await;
    let row = "insert into public._sqlx_migrations values (999999, 'later', now(), true, ''::bytea, 0)";
    client.execute(row, &[]).await.unwrap();
    let error = weft_eventlog::migrate(&config(&database)).await.unwrap_err();
    assert!(matches!(error, weft_eventlog::MigrateError::Newer { version: 999_999 }), "{error:?}");
}

/// The same log in the tables of an earlier Weft, made by that one's own migrations.
#[tokio::test]
async fn a_log_of_an_earlier_schema_is_what_it_was_after_the_upgrade() {
    const EVENTS: &str = "position, epoch, version, recorded_at, cause, command_id, schema, hash, scope, type, actor, reason, payload";
    const COMMANDS: &str = "select command_id, epoch, position, position + command_events - 1, recorded_at, fingerprint \
                            from weft.event where fingerprint is not null";
    let now = migrated().await;
    let log = open(&now).await;
    let requests: Vec<AppendRequest> =
        (1..=5).map(|n| request(vec![part("a", Any, n), part(&format!("b/{n}"), Any, n % 2)])).collect();
    let mut answers = Vec::new();
    for request in &requests {
        answers.push(log.appender().append(request.clone()).await.unwrap());
    }
    let events = read_all(&log.reader()).await;
    log.shutdown().await;

    let earlier = TestDatabase::create().await;
    let pool = sqlx::PgPool::connect(earlier.url()).await.unwrap();
    sqlx::migrate!("../migrations").run_to(3, &pool).await.unwrap();
    pool.close().await;
    let (from, to) = (now.connect().await, earlier.connect().await);
    for (source, table) in [
        ("weft.log_epoch".to_owned(), "weft.log_epoch".to_owned()),
        (format!("(select {EVENTS} from weft.event order by position)"), format!("weft.event ({EVENTS})")),
        (format!("({COMMANDS})"), "weft.command_outcome".to_owned()),
    ] {
        let rows = from.copy_out(&format!("copy {source} to stdout")).await.unwrap();
        let mut sink = pin!(to.copy_in::<_, Bytes>(&format!("copy {table} from stdin")).await.unwrap());
        let mut rows = pin!(rows);
        while let Some(row) = rows.next().await {
            sink.send(row.unwrap()).await.unwrap();
        }
        sink.finish().await.unwrap();
    }

    weft_eventlog::migrate(&config(&earlier)).await.unwrap();
    let log = open(&earlier).await;
    assert_eq!(read_all(&log.reader()).await, events);
    verify(&log.reader(), |_| ()).await.unwrap();
    for (request, answer) in requests.iter().zip(answers) {
        let again = log.appender().append(request.clone()).await.unwrap();
        assert_eq!(again, Appended { repeated: true, ..answer });
    }
    log.appender().append(one("a")).await.unwrap();
    verify(&log.reader(), |_| ()).await.unwrap();
    log.shutdown().await;
}

#[tokio::test]
async fn an_append_that_was_prepared_at_another_time_is_refused() {
    let database = migrated().await;
    open(&database).await.shutdown().await;
    let client = database.connect().await;
    for (late, refused) in [("0 s", false), ("1 s", false), ("5 s", true), ("-5 s", true), ("1 day", true)] {
        let sql = format!(
            "select weft.expect_ground(0, '', 0, '', 1, '{{}}', 0, clock_timestamp() - interval '{late}', false)"
        );
        let result = client.batch_execute(&sql).await;
        let code = result.err().and_then(|error| error.code().map(|code| code.code().to_owned()));
        assert_eq!(code.as_deref(), refused.then_some("WF001"), "{late}");
    }
    // As a controller of the version before asks.
    for (tail, accepted) in [(0, true), (1, false)] {
        let sql = format!("select weft.expect_ground({tail}, '', 0, '', 1, '{{}}', 0)");
        assert_eq!(client.batch_execute(&sql).await.is_ok(), accepted, "{tail}");
    }
}

#[tokio::test]
async fn nobody_changes_history_not_even_a_superuser() {
    let database = migrated().await;
    let log = open(&database).await;
    log.appender().append(one("s")).await.unwrap();
    let client = database.connect().await;
    for replica in ["origin", "replica"] {
        client.batch_execute(&format!("set session_replication_role = {replica}")).await.unwrap();
        for statement in [
            "update weft.event set payload = '{}'",
            "delete from weft.event",
            "truncate weft.event",
            "update weft.log_epoch set epoch = 9",
            "delete from weft.log_epoch",
            "truncate weft.log_epoch",
            "update weft.event_1 set payload = '{}'",
            "delete from weft.event_1",
            "truncate weft.event_1",
            "update weft.log_batch set epoch = 9",
            "delete from weft.log_batch",
            "truncate weft.log_batch",
            "delete from weft.log_segment",
            "truncate weft.log_partition",
        ] {
            let error = client.batch_execute(statement).await.unwrap_err();
            assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{statement}");
            assert!(error.as_db_error().unwrap().message().contains("append-only"), "{statement}");
        }
    }
    assert_eq!(log.reader().head().await.unwrap().position.0, 1);
}

#[tokio::test]
async fn the_reader_role_reads_and_does_nothing_else() {
    let database = migrated().await;
    let log = open(&database).await;
    log.appender().append(one("s")).await.unwrap();
    let client = database.connect().await;
    client.batch_execute("set role weft_reader").await.unwrap();
    for table in ["audit.events", "weft.event", "weft.log_epoch", "weft.log_batch"] {
        let count: i64 =
            client.query_one(&format!("select count(*) from {table}"), &[]).await.unwrap().get(0);
        assert_eq!(count, 1, "{table}");
    }
    let position: i64 = client.query_one("select audit.position_at(now())", &[]).await.unwrap().get(0);
    assert_eq!(position, 1);
    for statement in [
        "insert into weft.event select * from weft.event",
        "delete from weft.event",
        "insert into weft.log_batch select * from weft.log_batch",
        "select weft.make_partitions()",
        "create table weft.mine (id int)",
        // Nor does it hold up those who write.
        "begin; lock table weft.log_lock in access share mode",
        "rollback; begin; lock table weft.log_lock in exclusive mode",
        "rollback; begin; lock table weft.event in row share mode",
    ] {
        let error = client.batch_execute(statement).await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{statement}");
    }
}

#[tokio::test]
async fn a_backup_under_way_does_not_hold_up_writers() {
    let database = migrated().await;
    let log = open(&database).await;
    let client = database.connect().await;
    // What pg_dump holds until it ends.
    let read_all = "begin; lock table weft.event, weft.log_epoch, weft.log_lock in access share mode";
    client.batch_execute(read_all).await.unwrap();
    log.appender().append(one("s")).await.unwrap();
}

#[tokio::test]
async fn every_column_that_people_see_says_what_it_means() {
    let database = migrated().await;
    let sql = "select n.nspname || '.' || c.relname || '.' || a.attname from pg_attribute a \
               join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace \
               where (n.nspname, c.relname) in (('weft', 'event'), ('weft', 'log_epoch'), \
               ('weft', 'event_1'), ('weft', 'log_batch'), ('weft', 'log_partition'), ('weft', 'log_segment'), \
               ('weft', 'log_layout'), ('weft', 'scope_head'), ('weft', 'scope_head_mark'), ('weft', 'log_rewind'), ('weft', 'log_adoption'), \
               ('status', 'rewind'), ('audit', 'events'), \
               ('audit', 'sealed')) and a.attnum > 0 \
               and not a.attisdropped and col_description(c.oid, a.attnum) is null";
    let silent: Vec<String> =
        database.connect().await.query(sql, &[]).await.unwrap().iter().map(|r| r.get(0)).collect();
    assert_eq!(silent, Vec::<String>::new());
}

#[tokio::test]
async fn the_audit_view_shows_who_did_what_and_why() {
    let database = migrated().await;
    let log = open(&database).await;
    let mut request = one("mesh");
    request.reason = Some("because".into());
    log.appender().append(request.clone()).await.unwrap();
    let event = log.reader().read(weft_model::version::Position(0), 1).await.unwrap().remove(0);
    let sql = "select scope, actor, reason, payload->>'n', hash, command_id, (extract(epoch from recorded_at) * 1e6)::bigint \
               from audit.events where position = 1";
    let row = database.connect().await.query_one(sql, &[]).await.unwrap();
    let texts: Vec<String> = (0..5).map(|column| row.get(column)).collect();
    assert_eq!(texts, ["mesh", &request.actor, "because", "0", &event.hash.to_string()]);
    assert_eq!(row.get::<_, uuid::Uuid>(5), request.command_id);
    assert_eq!(row.get::<_, i64>(6), event.recorded_at.0);
}

#[tokio::test]
async fn a_login_that_owns_nothing_can_open_append_and_read_but_change_nothing() {
    let database = migrated().await;
    let admin = database.connect().await;
    let login = format!("plain_{}", uuid::Uuid::now_v7().simple());
    let grants = format!(
        "create role {login} login password 'plain'; grant weft_appender, weft_reader to {login}; \
         grant connect on database {} to {login}",
        database.name()
    );
    admin.batch_execute(&grants).await.unwrap();
    let mut plain = config(&database);
    plain.user(&login).password("plain");
    // Nothing is left to migrate, so no right to do so is needed, nor the lock of somebody who does.
    admin.batch_execute("begin; lock table public._sqlx_migrations in exclusive mode").await.unwrap();
    weft_eventlog::migrate(&plain).await.unwrap();
    admin.batch_execute("rollback").await.unwrap();
    let log = weft_eventlog::EventLog::open(weft_eventlog::LogConfig::new(plain.clone())).await.unwrap();
    log.appender().append(one("s")).await.unwrap();
    assert_eq!(log.reader().head().await.unwrap().position.0, 1);
    log.shutdown().await;

    admin.batch_execute(&format!("drop owned by {login}; drop role {login}")).await.unwrap();
}

#[tokio::test]
async fn no_duty_includes_changing_what_was_recorded() {
    let database = migrated().await;
    let client = database.connect().await;
    for role in ["weft_appender", "weft_projector", "weft_reader"] {
        client.batch_execute(&format!("set role {role}")).await.unwrap();
        for statement in [
            "update weft.event set payload = '{}'",
            "delete from weft.event_1",
            "truncate weft.log_batch",
            "update weft.log_epoch set epoch = 7",
            "delete from weft.scope_head",
            "insert into weft.log_segment select * from weft.log_segment",
            "alter table weft.event disable trigger append_only",
            "drop table weft.event_1",
        ] {
            let error = client.batch_execute(statement).await.unwrap_err();
            assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{role}: {statement}");
        }
    }
}

#[tokio::test]
async fn a_login_without_the_duty_is_told_what_to_grant() {
    let database = migrated().await;
    let admin = database.connect().await;
    let login = format!("stranger_{}", uuid::Uuid::now_v7().simple());
    admin.batch_execute(&format!("create role {login} login password 'x'")).await.unwrap();
    let mut stranger = config(&database);
    stranger.user(&login).password("x");
    let error = weft_eventlog::EventLog::open(weft_eventlog::LogConfig::new(stranger)).await.unwrap_err();
    let told = weft_model::Chain(&error).to_string();
    assert!(told.contains("grant weft_appender to"), "{told}");
    admin.batch_execute(&format!("drop role {login}")).await.unwrap();
}
