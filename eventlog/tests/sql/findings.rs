//! What somebody has seen of a log that then lost its end: the finding, the stop of every append, and the recorded way on.

use tokio_postgres::error::SqlState;
use weft_eventlog::{
    Adopt, AdoptError, AppendError, EPOCHS_UNSEEN_MAX, EventHash, EventLog, Point, Reader, Reported, Seen,
    adopt, report_rewind, verify,
};
use weft_model::version::{ConfigVersion, Epoch, Position};
use weft_testkit::TestDatabase;

use crate::support::{config, migrated, one, open, tamper};

/// A log of so many events, and each of them as somebody saw it.
async fn seen(database: &TestDatabase, count: usize) -> Vec<Point> {
    let log = open(database).await;
    for _ in 0..count {
        log.appender().append(one("s")).await.unwrap();
    }
    let events = log.reader().read(Position::ZERO, 1_000).await.unwrap();
    log.shutdown().await;
    let point = |event: weft_eventlog::RecordedEvent| Point {
        epoch: event.epoch,
        position: event.position,
        hash: event.hash,
    };
    events.into_iter().map(point).collect()
}

/// The events after a position are lost, with all that was written with them.
async fn lose(database: &TestDatabase, after: u64) {
    let lose = format!(
        "delete from weft.event where position > {after}; delete from weft.log_batch where last_position > {after}"
    );
    tamper(database, &lose).await;
}

/// What an adoption opens if that is the last epoch that anybody saw.
fn adopted_after(epoch: u64) -> Epoch {
    Epoch(epoch + EPOCHS_UNSEEN_MAX)
}

fn reader(database: &TestDatabase) -> Reader {
    Reader::new(config(database))
}

fn decision(rewind_upto: u64) -> Adopt {
    Adopt {
        rewind_upto,
        actor: "spiffe://test/operator/ann".into(),
        reason: "the backup is all there is".into(),
    }
}

async fn refused(log: &EventLog) -> (u64, u64) {
    match log.appender().append(one("s")).await.unwrap_err() {
        AppendError::Rewound { seen, found } => (seen.0, found.0),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_is_in_the_log_is_no_finding() {
    let database = migrated().await;
    let points = seen(&database, 3).await;
    let reader = reader(&database);
    for point in &points {
        assert_eq!(reader.check_seen(point).await.unwrap(), Seen::Stands);
        assert_eq!(report_rewind(&reader, point, "controller a").await.unwrap(), Reported::Stands);
    }
    assert_eq!(reader.standing_rewinds().await.unwrap(), []);
    assert!(matches!(adopt(&reader, &decision(1)).await, Err(AdoptError::Nothing)));
}

#[tokio::test]
async fn a_finding_is_recorded_once_and_stops_every_open_log() {
    let database = migrated().await;
    let points = seen(&database, 5).await;
    lose(&database, 3).await;
    // Neither of these processes has seen what was lost, and one of them sends ahead.
    let (here, there) = (open(&database).await, open(&database).await);
    for _ in 0..20 {
        here.appender().append(one("t")).await.unwrap();
    }
    there.appender().append(one("s")).await.unwrap();
    let reader = reader(&database);
    assert_eq!(reader.check_seen(&points[4]).await.unwrap(), Seen::Lost { found: Position(24) });
    let report = async || report_rewind(&reader, &points[4], "sidecar default/api/one").await.unwrap();
    assert_eq!(report().await, Reported::Recorded);
    assert_eq!(report().await, Reported::Known);
    let less = report_rewind(&reader, &points[3], "sidecar default/api/one").await.unwrap();
    assert_eq!(less, Reported::Known, "the same witness said more before");

    for _ in 0..2 {
        assert_eq!(refused(&here).await, (5, 24));
        assert_eq!(refused(&there).await, (5, 24));
    }
    let standing = reader.standing_rewinds().await.unwrap();
    assert_eq!(standing.len(), 1);
    assert_eq!((standing[0].seen, standing[0].witness.as_str()), (points[4], "sidecar default/api/one"));
    assert_eq!(standing[0].found, ConfigVersion::new(Epoch(1), Position(24)));
    assert!(standing[0].found_hash.is_some_and(|hash| hash != points[4].hash));
    // One that is opened later does not know better.
    assert_eq!(refused(&open(&database).await).await, (5, 24));
    assert_eq!(reader.head().await.unwrap().position, Position(24));
}

#[tokio::test]
async fn an_appender_that_does_not_look_is_refused_by_the_database() {
    let database = migrated().await;
    let points = seen(&database, 2).await;
    lose(&database, 1).await;
    report_rewind(&reader(&database), &points[1], "projector").await.unwrap();
    let client = database.connect().await;
    let blind =
        "insert into weft.log_batch select 2, 2, 1, now(), sha256('x'), sha256('x'), '\\x0000000000000000'";
    for replica in ["origin", "replica"] {
        client.batch_execute(&format!("set session_replication_role = {replica}")).await.unwrap();
        let error = client.batch_execute(blind).await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::from_code("WF002")));
        assert!(error.as_db_error().unwrap().message().contains("LOG_REWOUND"), "{error:?}");
    }
    for table in ["log_rewind", "log_adoption"] {
        for change in ["delete from", "truncate"] {
            let error = client.batch_execute(&format!("{change} weft.{table}")).await.unwrap_err();
            assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{change} {table}");
        }
    }
}

#[tokio::test]
async fn an_adopted_log_goes_on_above_every_epoch_that_was_seen() {
    let database = migrated().await;
    let points = seen(&database, 5).await;
    lose(&database, 3).await;
    let log = open(&database).await;
    // The server that was lost had opened an epoch of its own.
    let ahead = Point { epoch: Epoch(7), position: Position(9), hash: EventHash([9; 32]) };
    let reader = reader(&database);
    report_rewind(&reader, &points[4], "sidecar default/api/one").await.unwrap();
    report_rewind(&reader, &ahead, "controller b").await.unwrap();
    assert_eq!(refused(&log).await, (5, 3));

    let more = adopt(&reader, &decision(1)).await;
    assert!(matches!(more, Err(AdoptError::More { seen }) if seen == ahead.version()), "{more:?}");
    assert_eq!(refused(&log).await, (5, 3));
    let adoption = adopt(&reader, &decision(2)).await.unwrap();
    assert_eq!(
        (adoption.epoch, adoption.fork_position, adoption.rewind_upto),
        (adopted_after(7), Position(3), 2)
    );
    assert_eq!(reader.newest_adoption().await.unwrap(), Some(adoption.clone()));
    assert_eq!(reader.standing_rewinds().await.unwrap(), []);

    assert_eq!(log.appender().append(one("s")).await.unwrap().epoch, adopted_after(7));
    assert_eq!(open(&database).await.appender().append(one("s")).await.unwrap().epoch, adopted_after(7));
    verify(&reader, |_| ()).await.unwrap();
    // Whoever saw the lost events is forgiven, also where others stand by now.
    for point in [&points[3], &points[4], &ahead] {
        assert_eq!(reader.check_seen(point).await.unwrap(), Seen::GivenUp);
        assert_eq!(
            report_rewind(&reader, point, "sidecar default/api/two").await.unwrap(),
            Reported::GivenUp
        );
    }
    assert_eq!(reader.check_seen(&points[2]).await.unwrap(), Seen::Stands);
}

#[tokio::test]
async fn what_is_lost_after_an_adoption_is_a_finding_again() {
    let database = migrated().await;
    let points = seen(&database, 3).await;
    lose(&database, 1).await;
    let reader = reader(&database);
    report_rewind(&reader, &points[2], "controller a").await.unwrap();
    adopt(&reader, &decision(1)).await.unwrap();
    let log = open(&database).await;
    log.appender().append(one("s")).await.unwrap();
    let event = reader.read(Position(1), 1).await.unwrap().remove(0);
    let newer = Point { epoch: event.epoch, position: event.position, hash: event.hash };
    log.shutdown().await;
    lose(&database, 1).await;
    assert_eq!(reader.check_seen(&points[2]).await.unwrap(), Seen::GivenUp);
    assert_eq!(reader.check_seen(&newer).await.unwrap(), Seen::Lost { found: Position(1) });
    assert_eq!(report_rewind(&reader, &newer, "controller a").await.unwrap(), Reported::Recorded);
    let adoption = adopt(&reader, &decision(2)).await.unwrap();
    assert_eq!((adoption.epoch, adoption.rewind_upto), (adopted_after(event.epoch.0), 2));
}

/// The restored server wrote before anybody noticed: what epoch it opened and where tells how much is common.
#[tokio::test]
async fn the_fork_is_where_the_next_epoch_began() {
    let database = migrated().await;
    let points = seen(&database, 6).await;
    lose(&database, 2).await;
    let restart = "insert into weft.log_epoch select 2, system_identifier, timeline, postmaster_start, event_table, 2, \
                   (select hash from weft.event where position = 2), now() from weft.log_epoch";
    tamper(&database, restart).await;
    let log = open(&database).await;
    for _ in 0..3 {
        assert_eq!(log.appender().append(one("s")).await.unwrap().epoch, Epoch(2));
    }
    let reader = reader(&database);
    report_rewind(&reader, &points[5], "sidecar default/api/one").await.unwrap();
    let adoption = adopt(&reader, &decision(1)).await.unwrap();
    assert_eq!((adoption.epoch, adoption.fork_position), (adopted_after(2), Position(2)));
    for point in &points[2..] {
        assert_eq!(reader.check_seen(point).await.unwrap(), Seen::GivenUp);
    }
}

#[tokio::test]
async fn of_two_who_adopt_at_once_one_wins_and_the_other_learns_who() {
    let database = migrated().await;
    let points = seen(&database, 4).await;
    lose(&database, 2).await;
    let reader = reader(&database);
    report_rewind(&reader, &points[3], "controller a").await.unwrap();
    let decisions = ["ann", "bob"].map(|name| Adopt { actor: name.into(), ..decision(1) });
    let (a, b) = tokio::join!(adopt(&reader, &decisions[0]), adopt(&reader, &decisions[1]));
    let (won, lost) = if a.is_ok() { (a, b) } else { (b, a) };
    let won = won.unwrap();
    match lost.unwrap_err() {
        AdoptError::Settled { adoption } => assert_eq!(*adoption, won),
        other => panic!("{other:?}"),
    }
    assert_eq!(database.connect().await.query("select from weft.log_adoption", &[]).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_fleet_that_saw_the_same_is_a_few_findings() {
    let database = migrated().await;
    let points = seen(&database, 3).await;
    lose(&database, 1).await;
    let reader = reader(&database);
    for n in 0..40 {
        // Different ones, as sidecars that were told at different times.
        let hash = EventHash([n; 32]);
        let point = Point { hash, ..points[2] };
        report_rewind(&reader, &point, &format!("sidecar default/api/i{n}")).await.unwrap();
    }
    assert_eq!(reader.standing_rewinds().await.unwrap().len(), 16);
    let further = Point { position: Position(4), ..points[2] };
    assert_eq!(report_rewind(&reader, &further, "sidecar default/api/i0").await.unwrap(), Reported::Recorded);
}

#[tokio::test]
async fn people_see_what_stands_and_what_was_decided() {
    let database = migrated().await;
    let points = seen(&database, 3).await;
    lose(&database, 1).await;
    let reader = reader(&database);
    report_rewind(&reader, &points[2], "sidecar default/api/one").await.unwrap();
    let client = database.connect().await;
    client.batch_execute("set role weft_reader").await.unwrap();
    let sql = "select stands::text || ' ' || seen || ' ' || found || ' ' || witness || ' ' || coalesce(adopted_as::text, '-') \
               from status.rewind";
    let row: String = client.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(row, "true 1.3 1.1 sidecar default/api/one -");
    adopt(&reader, &decision(1)).await.unwrap();
    let row: String = client.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(row, format!("false 1.3 1.1 sidecar default/api/one {}", adopted_after(1)));
    let forged = "insert into weft.log_adoption (rewind_upto, epoch, fork_position, actor, reason, adopted_at) \
                  values (9, 9, 0, 'mallory', '', now())";
    assert!(client.batch_execute(forged).await.is_err());
}

#[tokio::test]
async fn a_process_tells_what_it_has_seen_and_the_log_lost() {
    let database = migrated().await;
    let log = open(&database).await;
    for _ in 0..3 {
        log.appender().append(one("s")).await.unwrap();
    }
    let events = log.reader().read(Position::ZERO, 10).await.unwrap();
    let mut lost = log.lost();
    assert_eq!(*lost.borrow(), None);
    lose(&database, 2).await;
    assert_eq!(refused(&log).await, (3, 2));
    let told = lost.wait_for(Option::is_some).await.unwrap().unwrap();
    assert_eq!((told.epoch, told.position, told.hash), (Epoch(1), Position(3), events[2].hash));

    // After the decision it still knows what it knew: it has to be started anew.
    report_rewind(&log.reader(), &told, "controller a").await.unwrap();
    adopt(&log.reader(), &decision(1)).await.unwrap();
    assert_eq!(refused(&log).await, (3, 2));
    log.shutdown().await;
    let anew = open(&database).await;
    assert_eq!(anew.appender().append(one("s")).await.unwrap().epoch, adopted_after(1));
    anew.shutdown().await;
}
