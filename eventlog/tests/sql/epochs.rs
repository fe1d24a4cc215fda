//! When a new epoch opens, on real servers.

use weft_eventlog::{AppendError, ConnectConfig, EventLog, LogConfig, StoreError, migrate, verify};
use weft_model::version::{Epoch, Position};
use weft_pgserver::{Binaries, Cluster};

use crate::support::{migrated, one, open, tamper};

#[tokio::test]
async fn a_log_has_an_epoch_before_its_first_event_and_keeps_it_while_the_database_lives() {
    let database = migrated().await;
    let reader = weft_eventlog::Reader::new(crate::support::config(&database));
    assert_eq!(reader.head().await.unwrap().epoch, Epoch::ZERO);
    for _ in 0..2 {
        let log = open(&database).await;
        assert_eq!(reader.head().await.unwrap().epoch, Epoch(1));
        log.shutdown().await;
    }
    assert_eq!(reader.head().await.unwrap().position, Position::ZERO);
}

#[tokio::test]
async fn a_database_that_was_started_anew_is_in_a_new_epoch() {
    let start = |cluster: Cluster| cluster.start(&mut |_| ()).unwrap();
    let cluster = Cluster::open_scratch(Binaries::find().unwrap(), &mut |_| ()).unwrap();
    let server = start(cluster);
    let connect: ConnectConfig = server.url("postgres").parse().unwrap();
    migrate(&connect).await.unwrap();
    let log = EventLog::open(LogConfig::new(connect)).await.unwrap();
    assert_eq!(log.appender().append(one("s")).await.unwrap().epoch, Epoch(1));
    log.shutdown().await;

    let server = start(server.stop().unwrap());
    let log = EventLog::open(LogConfig::new(server.url("postgres").parse().unwrap())).await.unwrap();
    let head = log.reader().head().await.unwrap();
    assert_eq!((head.epoch, head.position), (Epoch(2), Position(1)));
    assert_eq!(log.appender().append(one("s")).await.unwrap().epoch, Epoch(2));
    assert_eq!(verify(&log.reader(), |_| ()).await.unwrap().epochs, 2);
    log.shutdown().await;
    server.stop().unwrap();
}

#[tokio::test]
async fn a_server_that_becomes_unfit_under_an_open_log_gets_nothing_more_until_it_is_fit() {
    let cluster = Cluster::open_scratch(Binaries::find().unwrap(), &mut |_| ()).unwrap();
    let server = cluster.start(&mut |_| ()).unwrap();
    let connect: ConnectConfig = server.url("postgres").parse().unwrap();
    migrate(&connect).await.unwrap();
    let strict = EventLog::open(LogConfig::new(connect.clone())).await.unwrap();
    let lax = LogConfig { allow_unsafe_settings: true, ..LogConfig::new(connect.clone()) };
    let lax = EventLog::open(lax).await.unwrap();
    let (admin, connection) = connect.connect(tokio_postgres::NoTls).await.unwrap();
    let mut driver = tokio::task::JoinSet::new();
    driver.spawn(connection);
    for setting in ["full_page_writes", "synchronous_commit"] {
        for value in ["off", "on"] {
            let command = format!("alter system set {setting} = {value}");
            admin.batch_execute(&command).await.unwrap();
            admin.batch_execute("select pg_reload_conf()").await.unwrap();
            // Each backend takes the new value in its own time.
            loop {
                match strict.appender().append(one("s")).await {
                    Ok(_) if value == "on" => break,
                    Ok(_) => {}
                    Err(AppendError::Store(StoreError::Unfit(why))) => {
                        assert!(why.to_string().contains(setting), "{why}");
                        if value == "off" {
                            break;
                        }
                    }
                    Err(other) => panic!("{other:?}"),
                }
            }
            lax.appender().append(one("s")).await.unwrap();
        }
    }
    strict.shutdown().await;
    lax.shutdown().await;
    server.stop().unwrap();
}

#[tokio::test]
async fn a_log_restored_into_the_same_running_server_is_in_a_new_epoch() {
    let database = migrated().await;
    let log = open(&database).await;
    log.appender().append(one("s")).await.unwrap();
    log.shutdown().await;
    // What a restore does to the table: the same rows in another one.
    let restore = "create table weft.restored (like weft.event including all) partition by range (position); \
                   alter table weft.event detach partition weft.event_1; \
                   alter table weft.event detach partition weft.event_1048577; drop table weft.event cascade; \
                   alter table weft.restored rename to event; grant select, insert on weft.event to weft_appender; \
                   alter table weft.event attach partition weft.event_1 for values from (1) to (1048577); \
                   alter table weft.event attach partition weft.event_1048577 for values from (1048577) to (2097153)";
    database.connect().await.batch_execute(restore).await.unwrap();
    let log = open(&database).await;
    assert_eq!(log.appender().append(one("s")).await.unwrap().epoch, Epoch(2));
}

#[tokio::test]
async fn an_epoch_opened_while_the_log_is_open_is_adopted() {
    let database = migrated().await;
    let log = open(&database).await;
    log.appender().append(one("s")).await.unwrap();
    let later = "insert into weft.log_epoch select epoch + 1, system_identifier, timeline + 1, postmaster_start, \
                 event_table, 1, (select hash from weft.event), now() from weft.log_epoch";
    tamper(&database, later).await;
    assert_eq!(log.appender().append(one("s")).await.unwrap().epoch, Epoch(2));
    verify(&log.reader(), |_| ()).await.unwrap();
}
