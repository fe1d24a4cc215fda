//! Lease and fence on a real server.

#![expect(clippy::unwrap_used, reason = "a helper of tests fails the test that called it")]

use std::time::Duration;
use uuid::Uuid;
use weft_eventlog::migrate;
use weft_model::{ConfigVersion, Epoch, Position};
use weft_projector::rows::RowChanges;
use weft_projector::{Commit, Store};
use weft_testkit::TestDatabase;

const TTL: Duration = Duration::from_secs(3_600);

async fn stores() -> (TestDatabase, Store, Store) {
    let database = TestDatabase::create().await;
    migrate(&database.url().parse().unwrap()).await.unwrap();
    let (a, b) = (Store::new(database.url()).unwrap(), Store::new(database.url()).unwrap());
    (database, a, b)
}

fn at(position: u64) -> ConfigVersion {
    ConfigVersion::new(Epoch(1), Position(position))
}

async fn commit(store: &Store, term: i64, old: u64, new: u64) -> Commit {
    store.commit(term, Position(old), at(new), &RowChanges::default()).await.unwrap()
}

/// Lets the lease run out without waiting for it.
async fn expire(database: &TestDatabase) {
    let sql = "update weft.lease set expires_at = clock_timestamp() - interval '1 second'";
    database.connect().await.batch_execute(sql).await.unwrap();
}

#[tokio::test]
async fn a_lease_is_held_by_one_and_taken_when_it_ends() {
    let (database, a, b) = stores().await;
    let (id_a, id_b) = (Uuid::new_v4(), Uuid::new_v4());
    let lease = a.acquire("a", id_a, TTL).await.unwrap().unwrap();
    assert_eq!((lease.term, lease.checkpoint), (1, ConfigVersion::default()));
    assert_eq!(b.acquire("b", id_b, TTL).await.unwrap(), None);
    assert!(a.renew(id_a, 1, TTL).await.unwrap());
    assert!(!b.renew(id_b, 1, TTL).await.unwrap());

    expire(&database).await;
    assert_eq!(b.acquire("b", id_b, TTL).await.unwrap().unwrap().term, 2);
    assert!(!a.renew(id_a, 1, TTL).await.unwrap(), "the old holder learns that it lost");
    a.release(id_a, 1).await.unwrap();
    assert_eq!(b.leader().await.unwrap().holder, "b", "what a former holder gives back is not the new one's");
    b.release(id_b, 2).await.unwrap();
    assert_eq!(a.acquire("a", id_a, TTL).await.unwrap().unwrap().term, 3);
    // A holder that is not sure what it wrote takes its own lease anew.
    assert_eq!(a.acquire("a", id_a, TTL).await.unwrap().unwrap().term, 4);
}

#[tokio::test]
async fn of_many_that_want_a_free_lease_one_gets_it() {
    let (_database, a, b) = stores().await;
    let mut wanting = tokio::task::JoinSet::new();
    for n in 0..32 {
        let store = if n % 2 == 0 { a.clone() } else { b.clone() };
        wanting.spawn(async move { store.acquire("x", Uuid::new_v4(), TTL).await.unwrap() });
    }
    let won = wanting.join_all().await.into_iter().flatten().count();
    assert_eq!(won, 1);
}

#[tokio::test]
async fn a_leader_that_wakes_after_its_term_writes_nothing() {
    let (database, a, b) = stores().await;
    let (id_a, id_b) = (Uuid::new_v4(), Uuid::new_v4());
    let old = a.acquire("a", id_a, TTL).await.unwrap().unwrap().term;
    assert_eq!(commit(&a, old, 0, 5).await, Commit::Done);
    expire(&database).await;
    let lease = b.acquire("b", id_b, TTL).await.unwrap().unwrap();
    assert_eq!(lease.checkpoint, at(5));

    assert_eq!(commit(&a, old, 5, 6).await, Commit::Fenced);
    assert_eq!(b.checkpoint().await.unwrap(), at(5));
    assert_eq!(commit(&b, lease.term, 5, 7).await, Commit::Done);
    assert_eq!(commit(&a, old, 7, 8).await, Commit::Fenced);
    // Nor does the present leader, if the checkpoint is not where it thinks.
    assert_eq!(commit(&b, lease.term, 5, 9).await, Commit::Fenced);
    assert_eq!(b.checkpoint().await.unwrap(), at(7));
}

#[tokio::test]
async fn of_two_that_write_from_one_checkpoint_one_does() {
    let (_database, a, b) = stores().await;
    let term = a.acquire("a", Uuid::new_v4(), TTL).await.unwrap().unwrap().term;
    for round in 0..20 {
        let (one, two) = tokio::join!(commit(&a, term, round, round + 1), commit(&b, term, round, round + 1));
        assert!((one == Commit::Done) != (two == Commit::Done), "{one:?} {two:?}");
    }
}
