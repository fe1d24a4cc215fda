//! Lost answers, lost connections and lost events.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::config::Host;
use weft_eventlog::{AppendError, ConnectConfig, EventLog, LogConfig, Reader, StoreError};
use weft_model::version::Position;
use weft_testkit::TestDatabase;

use crate::support::{
    Any, append_surely, assert_gapless, config, kill_backends, migrated, one, open, part, positions,
    read_all, request, tamper,
};

/// The commit reaches the server, its answer never reaches the client.
const LOSE_ANSWER: u8 = 1;
/// The commit itself is lost.
const LOSE_COMMIT: u8 = 2;
/// From the commit on the server is silent, and nothing is closed: what a host that died looks like.
const SILENT_COMMIT: u8 = 3;
/// The same from any statement that is not a commit.
const SILENT: u8 = 4;

/// Longer than anything here is waited for.
const PATIENCE: Duration = Duration::from_secs(25);

/// Passes connections on to a server, until told to cut or silence the one that next commits, or asks anything.
struct Cutter {
    config: ConnectConfig,
    cut: Arc<AtomicU8>,
    _tasks: JoinSet<()>,
}

impl Cutter {
    async fn before(database: &TestDatabase) -> Self {
        let server = config(database);
        let [Host::Tcp(host)] = server.get_hosts() else { panic!("the server listens on TCP") };
        let target = (host.clone(), server.get_ports()[0]);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut config = ConnectConfig::new();
        config.host("127.0.0.1").port(listener.local_addr().unwrap().port());
        config.user(server.get_user().unwrap()).dbname(server.get_dbname().unwrap());
        if let Some(password) = server.get_password() {
            config.password(password);
        }
        let cut = Arc::new(AtomicU8::new(0));
        let mut tasks = JoinSet::new();
        let order = Arc::clone(&cut);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let server = TcpStream::connect(target.clone()).await.unwrap();
                connections.spawn(pass(client, server, Arc::clone(&order)));
            }
        });
        Self { config, cut, _tasks: tasks }
    }
}

async fn pass(client: TcpStream, server: TcpStream, cut: Arc<AtomicU8>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let requests = async {
        let mut chunk = vec![0; 64 * 1024];
        while let Ok(n @ 1..) = from_client.read(&mut chunk).await {
            let commit = chunk[..n].windows(8).position(|bytes| bytes == b"\x0bcommit\0");
            let mine = |order: u8| order != 0 && (order == SILENT) == commit.is_none();
            let taken =
                cut.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |order| mine(order).then_some(0));
            let order = taken.unwrap_or(0);
            if matches!(order, SILENT | SILENT_COMMIT) {
                return std::future::pending().await;
            }
            // The message starts with its type and a length of four bytes, of which the last is in the pattern.
            let n = if order == LOSE_COMMIT { commit.unwrap_or(n) - 4 } else { n };
            if to_server.write_all(&chunk[..n]).await.is_err() || order != 0 {
                break;
            }
        }
        // The server works off what it was sent, then sees the end.
        let _ = to_server.shutdown().await;
    };
    let answers = async {
        let _ = tokio::io::copy(&mut from_server, &mut to_client).await;
    };
    tokio::select! {
        () = requests => {}
        () = answers => {}
    }
}

#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_neither_lost_nor_doubled() {
    for order in [LOSE_ANSWER, LOSE_COMMIT] {
        let database = migrated().await;
        let cutter = Cutter::before(&database).await;
        let log = EventLog::open(LogConfig::new(cutter.config.clone())).await.unwrap();
        log.appender().append(one("s")).await.unwrap();
        cutter.cut.store(order, Ordering::SeqCst);
        let cut = one("s");
        let appended = log.appender().append(cut.clone()).await.unwrap();
        assert_eq!(cutter.cut.load(Ordering::SeqCst), 0, "the connection was cut");
        assert_eq!(positions(&appended), (2, 2));
        assert!(!appended.repeated, "its author asked once");
        assert!(log.appender().append(cut).await.unwrap().repeated);
        assert_eq!(positions(&log.appender().append(one("s")).await.unwrap()), (3, 3));
        assert_eq!(read_all(&Reader::new(config(&database))).await.len(), 3);
    }
}

#[tokio::test]
async fn a_server_that_falls_silent_is_given_up_for_a_new_connection() {
    let database = migrated().await;
    let cutter = Cutter::before(&database).await;
    let log = EventLog::open(LogConfig::new(cutter.config.clone())).await.unwrap();
    // Not through the cutter's log, which would also be heard on its other connections.
    let reader = Reader::new(cutter.config.clone());
    assert_eq!(reader.read(Position::ZERO, 9).await.unwrap(), []);
    cutter.cut.store(SILENT, Ordering::SeqCst);
    assert_eq!(timeout(PATIENCE, reader.read(Position::ZERO, 9)).await.unwrap().unwrap(), []);
    assert_eq!(cutter.cut.swap(SILENT, Ordering::SeqCst), 0, "a connection fell silent");
    let appended = timeout(PATIENCE, log.appender().append(one("s"))).await.unwrap().unwrap();
    assert_eq!((positions(&appended), cutter.cut.load(Ordering::SeqCst)), ((1, 1), 0));
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_a_commit_without_an_answer() {
    let database = migrated().await;
    let cutter = Cutter::before(&database).await;
    let log = EventLog::open(LogConfig::new(cutter.config.clone())).await.unwrap();
    cutter.cut.store(SILENT_COMMIT, Ordering::SeqCst);
    let appender = log.appender();
    let append = async {
        let answer = appender.append(one("s")).await;
        assert!(matches!(answer, Err(AppendError::Store(StoreError::Unanswered))), "{answer:?}");
        assert!(matches!(appender.append(one("s")).await, Err(AppendError::Closed)));
    };
    let shutdown = async {
        while cutter.cut.load(Ordering::SeqCst) != 0 {
            tokio::task::yield_now().await;
        }
        log.shutdown_within(Duration::from_millis(200)).await;
    };
    timeout(PATIENCE, async { tokio::join!(append, shutdown) }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_never_idle_can_be_shut_down() {
    let database = migrated().await;
    let log = open(&database).await;
    // A few of these fill a batch, so there are always some left when one is written.
    let callers: JoinSet<_> = (0..16)
        .map(|n| {
            let appender = log.appender();
            async move {
                let scope = format!("s/{n}");
                let mut answered = 0;
                loop {
                    match appender.append(request(vec![part(&scope, Any, 1_500)])).await {
                        Ok(_) => answered += 1,
                        Err(AppendError::Closed) => return answered,
                        Err(other) => panic!("{other:?}"),
                    }
                }
            }
        })
        .collect();
    let mut committed = log.committed();
    committed.wait_for(|position| position.0 > 24_000).await.unwrap();
    timeout(PATIENCE, log.shutdown_within(PATIENCE * 2)).await.unwrap();
    let answered: u64 = callers.join_all().await.into_iter().sum();
    let head = Reader::new(config(&database)).head().await.unwrap();
    assert_eq!(head.position.0, answered * 1_500, "what was queued was answered");
}

#[tokio::test]
async fn a_tail_survives_the_loss_of_every_connection() {
    let database = migrated().await;
    let here = open(&database).await;
    let there = open(&database).await;
    let mut tail = here.reader().tail(Position::ZERO);
    let assassin = database.connect().await;
    for n in 1..=5 {
        append_surely(&there.appender(), &one("s")).await;
        let page = loop {
            match tail.next().await {
                Ok(page) => break page,
                Err(error) => {
                    assert!(matches!(error, StoreError::Statement { .. }), "{error:?}");
                }
            }
        };
        assert_eq!(page.iter().map(|event| event.position.0).collect::<Vec<_>>(), [n]);
        assert!(kill_backends(&assassin).await > 0);
    }
}

#[tokio::test]
async fn a_log_that_lost_events_takes_no_more() {
    let database = migrated().await;
    let log = open(&database).await;
    for _ in 0..3 {
        log.appender().append(one("s")).await.unwrap();
    }
    tamper(&database, "delete from weft.event where position = 3").await;
    for _ in 0..2 {
        match log.appender().append(one("s")).await.unwrap_err() {
            AppendError::Rewound { seen, found } => assert_eq!((seen, found), (Position(3), Position(2))),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(log.reader().head().await.unwrap().position, Position(2));
}

/// More than a writer follows, so that it looks as if it were only far behind.
#[tokio::test]
async fn a_log_that_lost_events_and_grew_on_takes_no_more() {
    let database = migrated().await;
    let log = open(&database).await;
    for _ in 0..3 {
        log.appender().append(one("s")).await.unwrap();
    }
    let cut = "delete from weft.event where position > 2; delete from weft.log_batch where last_position > 2";
    tamper(&database, cut).await;
    let other = open(&database).await;
    for _ in 0..5 {
        other.appender().append(request(vec![part("other", Any, 1_000)])).await.unwrap();
    }
    other.shutdown().await;
    let error = log.appender().append(one("s")).await.unwrap_err();
    assert!(matches!(error, AppendError::Rewound { seen: Position(3), found: Position(5_002) }), "{error:?}");
}

#[tokio::test]
async fn a_log_that_lost_everything_says_so() {
    let database = migrated().await;
    let log = open(&database).await;
    log.appender().append(one("s")).await.unwrap();
    tamper(&database, "delete from weft.event").await;
    let refused = log.appender().append(one("s")).await.unwrap_err();
    assert!(matches!(refused, AppendError::Rewound { seen: Position(1), found: Position(0) }), "{refused:?}");
}

#[tokio::test]
async fn a_log_whose_past_was_exchanged_takes_no_more() {
    let database = migrated().await;
    let log = open(&database).await;
    log.appender().append(one("s")).await.unwrap();
    tamper(&database, "update weft.event set hash = sha256('x') where position = 1").await;
    let refused = log.appender().append(one("s")).await;
    assert!(matches!(refused, Err(AppendError::Rewound { seen: Position(1), .. })), "{refused:?}");
}

#[tokio::test]
async fn what_the_database_refuses_fails_alone() {
    let database = migrated().await;
    let rule = "alter table weft.event add constraint no_mallory check (actor <> 'mallory')";
    database.connect().await.batch_execute(rule).await.unwrap();
    let log = open(&database).await;
    let appends: JoinSet<_> = (0..40)
        .map(|n| {
            let appender = log.appender();
            let mut command = one(&format!("s/{}", n % 3));
            if n == 17 {
                command.actor = "mallory".into();
            }
            async move { (command.actor == "mallory", appender.append(command).await) }
        })
        .collect();
    for (culprit, answer) in appends.join_all().await {
        match answer {
            Ok(_) => assert!(!culprit),
            Err(AppendError::Store(error)) => assert!(culprit, "{error:?}"),
            Err(other) => panic!("{other:?}"),
        }
    }
    let events = read_all(&log.reader()).await;
    assert_eq!(events.len(), 39);
    assert_gapless(&events);
}

#[tokio::test]
async fn a_writer_without_its_table_says_so_and_recovers() {
    let database = migrated().await;
    let log = open(&database).await;
    let admin = database.connect().await;
    admin.batch_execute("alter table weft.event rename to hidden").await.unwrap();
    assert!(matches!(log.appender().append(one("s")).await, Err(AppendError::Store(_))));
    admin.batch_execute("alter table weft.hidden rename to event").await.unwrap();
    assert_eq!(positions(&log.appender().append(one("s")).await.unwrap()), (1, 1));
}
