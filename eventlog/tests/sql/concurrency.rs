//! Many writers in several processes' worth of logs: one order, no gap, one winner, every reader sees it all.

use std::collections::BTreeMap;
use tokio::task::JoinSet;
use weft_eventlog::{AppendError, EVENTS_PER_REQUEST_MAX, verify};
use weft_model::version::{Position, Version};

use crate::support::{
    Any, append_surely, assert_gapless, exact, kill_backends, migrated, one, open, part, read_all, request,
    surely,
};

const LOGS: usize = 3;
const WRITERS: usize = 8;
const APPENDS: usize = 40;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_writers_make_one_gapless_chain_and_a_poller_sees_each_event_once() {
    let database = migrated().await;
    let mut logs = Vec::new();
    for _ in 0..LOGS {
        logs.push(open(&database).await);
    }
    // Requests have one event or three in two scopes.
    let total = LOGS * WRITERS * APPENDS * 2;
    let mut writers = JoinSet::new();
    for writer in 0..LOGS * WRITERS {
        let appender = logs[writer % LOGS].appender();
        writers.spawn(async move {
            for n in 0..APPENDS {
                let scope = format!("s/{}", (writer + n) % 5);
                let wide = vec![part(&scope, Any, 2), part(&format!("w/{writer}"), exact_of(n), 1)];
                let wanted = if n % 2 == 0 { request(wide) } else { one(&scope) };
                appender.append(wanted).await.unwrap();
            }
        });
    }
    let reader = logs[0].reader();
    let poller = async {
        let mut cursor = Position::ZERO;
        let mut seen = Vec::new();
        while seen.len() < total {
            let page = reader.read(cursor, 100).await.unwrap();
            cursor = page.last().map_or(cursor, |event| event.position);
            seen.extend(page);
        }
        seen
    };
    let (seen, _) = tokio::join!(poller, writers.join_all());
    assert_eq!(seen.len(), total);
    assert_gapless(&seen);
    let report = verify(&reader, |_| ()).await.unwrap();
    assert_eq!(report.events, total as u64);
    assert_eq!(report.epochs, 1);
}

/// The version of a writer's own scope before its `n`-th request, of which every other one appends to it.
fn exact_of(n: usize) -> weft_model::version::ExpectedVersion {
    weft_model::version::ExpectedVersion::exactly(Version(n as u64 / 2))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_that_expect_the_same_version_exactly_one_wins() {
    let database = migrated().await;
    let logs = [open(&database).await, open(&database).await, open(&database).await];
    logs[0].appender().append(one("s")).await.unwrap();
    for round in 1..=15 {
        let rivals: JoinSet<_> = (0..24)
            .map(|n| {
                let appender = logs[n % logs.len()].appender();
                async move { appender.append(request(vec![part("s", exact(round), 1)])).await }
            })
            .collect();
        let mut winners = 0;
        for answer in rivals.join_all().await {
            match answer {
                Ok(appended) => {
                    assert_eq!(appended.versions["s"], Version(round + 1));
                    winners += 1;
                }
                Err(AppendError::Conflict { current, .. }) => assert_eq!(current, Version(round + 1)),
                Err(other) => panic!("{other:?}"),
            }
        }
        assert_eq!(winners, 1, "round {round}");
    }
    assert_gapless(&read_all(&logs[0].reader()).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn killed_connections_lose_and_double_nothing() {
    let database = migrated().await;
    let logs = [open(&database).await, open(&database).await];
    let mut writers: JoinSet<_> = (0..16)
        .map(|writer| {
            let appender = logs[writer % logs.len()].appender();
            async move {
                let mut done = Vec::new();
                for n in 0..60 {
                    let command = one(&format!("s/{}", (writer + n) % 7));
                    append_surely(&appender, &command).await;
                    done.push(command.command_id);
                }
                done
            }
        })
        .collect();
    let assassin = database.connect().await;
    let mut killed = 0;
    let mut commands = Vec::new();
    while !writers.is_empty() {
        // Kills only while there is progress in between, or nobody would ever get anything done.
        let before = surely(|| async { logs[0].reader().head().await }).await.position;
        killed += kill_backends(&assassin).await;
        weft_testkit::wait_until(
            "an append after the kill",
            std::time::Duration::from_secs(30),
            async || {
                while let Some(done) = writers.try_join_next() {
                    commands.extend(done.unwrap());
                }
                let head = surely(|| async { logs[0].reader().head().await }).await;
                head.position.0 >= before.0 + 40 || writers.is_empty()
            },
        )
        .await;
    }
    assert!(killed > 0);
    let events = read_all(&logs[0].reader()).await;
    assert_gapless(&events);
    let mut counted: BTreeMap<_, usize> = BTreeMap::new();
    for event in &events {
        *counted.entry(event.command_id).or_default() += 1;
    }
    assert!(counted.values().all(|count| *count == 1));
    commands.sort();
    assert_eq!(counted.into_keys().collect::<Vec<_>>(), commands);
    verify(&logs[0].reader(), |_| ()).await.unwrap();
}

#[tokio::test]
async fn a_writer_that_was_left_far_behind_still_knows_every_scope() {
    let database = migrated().await;
    let (idle, busy) = (open(&database).await, open(&database).await);
    idle.appender().append(request(vec![part("a", Any, 1), part("b", Any, 2)])).await.unwrap();
    // A little behind, then more than a writer cares to catch up with.
    busy.appender().append(request(vec![part("a", exact(1), 3)])).await.unwrap();
    idle.appender().append(request(vec![part("a", exact(4), 1), part("b", exact(2), 0)])).await.unwrap();
    busy.appender().append(request(vec![part("a", exact(5), EVENTS_PER_REQUEST_MAX)])).await.unwrap();
    busy.appender().append(request(vec![part("c", Any, 5)])).await.unwrap();
    let last = 5 + EVENTS_PER_REQUEST_MAX as u64;
    let parts = vec![part("a", exact(last), 1), part("b", exact(2), 1), part("c", exact(5), 1)];
    idle.appender().append(request(parts)).await.unwrap();
    assert_gapless(&read_all(&idle.reader()).await);
    verify(&idle.reader(), |_| ()).await.unwrap();
}
