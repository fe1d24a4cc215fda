//! Lost answers, lost connections and lost events.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_postgres::config::Host;
use weft_eventlog::{AppendError, ConnectConfig, EventLog, LogConfig, Reader};
use weft_model::version::Position;
use weft_testkit::TestDatabase;

use crate::support::{
    append_surely, assert_gapless, config, kill_backends, migrated, one, open, positions, read_all, tamper,
};

/// The commit reaches the server, its answer never reaches the client.
const LOSE_ANSWER: u8 = 1;
/// The commit itself is lost.
const LOSE_COMMIT: u8 = 2;

/// Passes connections on to a server, until told to cut one at its next commit.
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
            let order = if commit.is_some() { cut.swap(0, Ordering::SeqCst) } else { 0 };
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
                    assert!(matches!(error, weft_eventlog::StoreError::Statement { .. }), "{error:?}");
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
            AppendError::Rewound { seen, found } => assert_eq!((seen, found), (Position(3), Position(0))),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(log.reader().head().await.unwrap().position, Position(2));
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
