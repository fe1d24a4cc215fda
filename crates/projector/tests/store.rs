//! Lease and fence on a real server.

#![expect(clippy::unwrap_used, reason = "a helper of tests fails the test that called it")]

use std::time::Duration;
use uuid::Uuid;
use weft_eventlog::{EventHash, migrate};
use weft_model::membership::Upstreams;
use weft_model::mesh::MeshDefaults;
use weft_model::{ConfigVersion, Epoch, Position};
use weft_projector::rows::RowChanges;
use weft_projector::{Ack, ClassAck, Commit, Lease, LeaseSession, PropagationRow, Serving, Store};
use weft_routing::{ClassId, Hash, InterestClass};
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
    store.commit(term, Position(old), (at(new), None), &RowChanges::default()).await.unwrap()
}

/// Somebody who wants the lease.
struct Wanting {
    store: Store,
    session: LeaseSession,
    id: Uuid,
}

impl Wanting {
    async fn new(store: &Store) -> Self {
        Self { store: store.clone(), session: store.lease_session().await.unwrap(), id: Uuid::new_v4() }
    }

    async fn is_free(&mut self) -> bool {
        self.session.is_free(self.id).await.unwrap()
    }

    async fn acquire(&mut self) -> Option<Lease> {
        self.session.acquire("somebody", self.id, TTL).await.unwrap()
    }

    async fn renew(&mut self, term: i64) -> bool {
        self.session.renew(self.id, term, TTL).await.unwrap()
    }
}

/// Lets the lease run out without waiting for it.
async fn expire(database: &TestDatabase) {
    let sql = "update weft.lease set expires_at = clock_timestamp() - interval '1 second'";
    database.connect().await.batch_execute(sql).await.unwrap();
}

#[tokio::test]
async fn a_lease_is_held_by_one_and_taken_when_it_ends() {
    let (database, a, b) = stores().await;
    let (mut a, mut b) = (Wanting::new(&a).await, Wanting::new(&b).await);
    assert!(b.is_free().await);
    let lease = a.acquire().await.unwrap();
    assert_eq!((lease.term, lease.checkpoint), (1, ConfigVersion::default()));
    assert!(!b.is_free().await);
    assert_eq!(b.acquire().await, None);
    assert!(a.renew(1).await);
    assert!(!b.renew(1).await);

    expire(&database).await;
    assert!(b.is_free().await);
    assert_eq!(b.acquire().await.unwrap().term, 2);
    assert!(!a.renew(1).await, "the old holder learns that it lost");
    a.session.release(a.id, 1).await.unwrap();
    assert!(!a.is_free().await, "what a former holder gives back is not the new one's");
    b.session.release(b.id, 2).await.unwrap();
    assert!(a.is_free().await);
    assert_eq!(a.acquire().await.unwrap().term, 3);
    // A holder that is not sure what it wrote takes its own lease anew.
    assert!(a.is_free().await);
    assert_eq!(a.acquire().await.unwrap().term, 4);
}

#[tokio::test]
async fn a_lease_is_free_as_soon_as_its_session_has_ended() {
    let (database, a, b) = stores().await;
    let mut b = Wanting::new(&b).await;
    let client = database.connect().await;
    let ended = async |b: &mut Wanting| {
        weft_testkit::wait_until("the lease", TTL, async || b.is_free().await).await;
    };
    let mut first = Wanting::new(&a).await;
    first.acquire().await.unwrap();
    // As the system does it when the holder is killed.
    drop(first);
    ended(&mut b).await;
    assert_eq!(b.acquire().await.unwrap().term, 2);

    // The holder lives on, renews with another session, and keeps it.
    let mut a = Wanting::new(&a).await;
    b.session.release(b.id, 2).await.unwrap();
    a.acquire().await.unwrap();
    let killed = "select pg_terminate_backend(session_pid) from weft.lease";
    client.execute(killed, &[]).await.unwrap();
    ended(&mut b).await;
    a.session.renew(a.id, 3, TTL).await.unwrap_err();
    a.session = a.store.lease_session().await.unwrap();
    assert!(a.renew(3).await);
    assert!(!b.is_free().await);
    assert_eq!(b.acquire().await, None);

    // Of a version that writes no session nothing can be told.
    client.execute("update weft.lease set term = 4", &[]).await.unwrap();
    drop(a);
    let sessions = "select count(*) from pg_stat_activity where application_name = 'weft-lease' \
                    and datname = current_database()";
    weft_testkit::wait_until("its session to end", TTL, async || {
        client.query_one(sessions, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    assert!(!b.is_free().await);
}

#[tokio::test]
async fn of_many_that_want_a_free_lease_one_gets_it() {
    let (_database, a, b) = stores().await;
    let mut wanting = tokio::task::JoinSet::new();
    for n in 0..16 {
        let mut wants = Wanting::new(if n % 2 == 0 { &a } else { &b }).await;
        wanting.spawn(async move { (wants.acquire().await, wants) });
    }
    // Kept until all have tried: a session that ends gives the lease to the next.
    let tried = wanting.join_all().await;
    assert_eq!(tried.iter().filter(|(won, _)| won.is_some()).count(), 1);
}

#[tokio::test]
async fn a_leader_that_wakes_after_its_term_writes_nothing() {
    let (database, a, b) = stores().await;
    let (mut first, mut second) = (Wanting::new(&a).await, Wanting::new(&b).await);
    let old = first.acquire().await.unwrap().term;
    assert_eq!(commit(&a, old, 0, 5).await, Commit::Done);
    expire(&database).await;
    let lease = second.acquire().await.unwrap();
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
async fn rows_of_an_event_that_the_log_does_not_have_are_not_written() {
    let (_database, store, _) = stores().await;
    let mut wanting = Wanting::new(&store).await;
    let lease = wanting.acquire().await.unwrap();
    let lost = (at(5), Some(EventHash([5; 32])));
    let rows = RowChanges::default();
    assert_eq!(store.commit(lease.term, Position(0), lost, &rows).await.unwrap(), Commit::Fenced);
    assert_eq!(store.checkpoint().await.unwrap().position, Position(0));
}

#[tokio::test]
async fn of_two_that_write_from_one_checkpoint_one_does() {
    let (_database, a, b) = stores().await;
    let term = Wanting::new(&a).await.acquire().await.unwrap().term;
    for round in 0..20 {
        let (one, two) = tokio::join!(commit(&a, term, round, round + 1), commit(&b, term, round, round + 1));
        assert!((one == Commit::Done) != (two == Commit::Done), "{one:?} {two:?}");
    }
}

fn said(instance: &str, connected: bool) -> (weft_model::InstanceId, Ack) {
    (instance.parse().unwrap(), Ack { connected, ..Ack::default() })
}

fn serving(id: Uuid) -> Serving {
    Serving { id, name: "same".into(), sidecars: 1, known_within_ms: 500 }
}

#[tokio::test]
async fn of_two_controllers_with_one_name_each_speaks_for_its_own_sidecars() {
    let (database, a, b) = stores().await;
    let (id_a, id_b) = (Uuid::new_v4(), Uuid::new_v4());
    let client = database.connect().await;
    let row = async || {
        client.query_one("select connected from status.sidecars", &[]).await.unwrap().get::<_, bool>(0)
    };
    client.batch_execute(WANTED).await.unwrap();
    a.put_acks(&serving(id_a), &[said("default/api/one", true)], &[]).await.unwrap();
    // It turned up at the other one, and the first then notices that it left.
    b.put_acks(&serving(id_b), &[said("default/api/one", true)], &[]).await.unwrap();
    a.put_acks(&serving(id_a), &[said("default/api/one", false)], &[]).await.unwrap();
    assert!(row().await);

    client.batch_execute("update weft.controller set seen_at = now() - interval '2 hours'").await.unwrap();
    a.put_acks(&serving(id_a), &[], &[]).await.unwrap();
    assert!(!row().await, "not this one's sidecar any more");
    b.put_acks(&serving(id_b), &[], &[]).await.unwrap();
    assert!(row().await);
}

/// A sidecar that should run 1.7 since ten seconds ago, when its class had run 1.5 for a day.
const WANTED: &str = "insert into weft.projection values ('mesh', 1, 1, 10, now()); \
     insert into weft.class_manifest values ('c', 7, repeat('x', 32)::bytea, now() - interval '10 seconds'); \
     insert into weft.manifest_history values ('c', 5, now() - interval '1 day'), ('c', 7, now() - interval '10 seconds'); \
     insert into weft.sidecar_class values ('default/api/one', 'c', 3, now() - interval '2 days')";

/// That sidecar's class.
fn class_id() -> ClassId {
    InterestClass { service: "default/api".parse().unwrap(), upstreams: Upstreams::All, canary: false }.id()
}

#[tokio::test]
async fn a_class_tells_what_its_sidecars_run_and_who_is_outside_the_bound() {
    let (database, store, _) = stores().await;
    let (client, id) = (database.connect().await, Uuid::new_v4());
    client.batch_execute(WANTED).await.unwrap();
    let ack = |position| Ack {
        connected: true,
        applied: Some((at(position), Hash::of(b""))),
        class: Some(class_id()),
        ..Ack::default()
    };
    let one = "default/api/one".parse().unwrap();
    let class = |position| ClassAck { class: class_id(), applied: at(position), took_ms: Some(3) };
    store.put_acks(&serving(id), &[(one, ack(5))], &[class(4)]).await.unwrap();
    let status = store.sidecars().await.unwrap().remove(0);
    assert_eq!((status.applied, status.connected, status.outside_bound), (Some(at(5)), true, true));
    assert!((10_000..3_600_000).contains(&status.lag_ms), "{}", status.lag_ms);
    assert_eq!(store.sidecars_outside_bound().await.unwrap(), 1);
    // The same, in a mesh that gives itself more time.
    let bound = "insert into weft.projected_policy values \
         ('mesh', 'mesh', 1, 9, 0, '', '{\"propagation_bound_ms\": 3600000}', '')";
    client.batch_execute(bound).await.unwrap();
    assert_eq!(store.sidecars_outside_bound().await.unwrap(), 0);
    client.batch_execute("delete from weft.projected_policy").await.unwrap();

    store.put_acks(&serving(id), &[], &[class(7)]).await.unwrap();
    let status = store.sidecars().await.unwrap().remove(0);
    assert_eq!((status.applied, status.lag_ms, status.outside_bound), (Some(at(7)), 0, false));
    let stale = client.query("select * from status.stale", &[]).await.unwrap();
    assert!(stale.is_empty());
}

#[tokio::test]
async fn the_bound_is_the_models_default_until_somebody_sets_it() {
    let (database, _, _) = stores().await;
    let row =
        database.connect().await.query_one("select bound_ms from weft.propagation_bound", &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), i64::from(MeshDefaults::default().propagation_bound_ms));
}

#[tokio::test]
async fn the_parts_of_several_controllers_make_one_propagation() {
    let (database, a, b) = stores().await;
    let (id_a, id_b) = (Uuid::new_v4(), Uuid::new_v4());
    let ms = Duration::from_millis;
    let published_at = tokio::time::Instant::now();
    let row = |applied: &[(u64, u32)], last: &str| PropagationRow {
        version: at(7),
        folded_at: published_at,
        published_at,
        interested: 200,
        applied: applied.iter().map(|(after, sidecars)| (ms(*after), *sidecars)).collect(),
        last: applied.last().map(|(after, _)| (last.parse().unwrap(), ms(*after))),
    };
    a.put_propagation(id_a, &[row(&[], "default/api/a")]).await.unwrap();
    let empty = a.propagation(5).await.unwrap().remove(0);
    assert_eq!((empty.p50_ms, empty.last_ms, empty.applied, empty.interested), (None, None, 0, 200));

    a.put_propagation(id_a, &[row(&[(2, 60), (9, 39)], "default/api/a")]).await.unwrap();
    b.put_propagation(id_b, &[row(&[(5, 1), (40, 1), (1_500, 1)], "default/api/b")]).await.unwrap();
    let change = a.propagation(5).await.unwrap().remove(0);
    assert_eq!((change.version, change.applied, change.interested), (at(7), 102, 200));
    assert_eq!(change.last_sidecar, "default/api/b");
    // No such event is in the log, so what is known of its append is that each had folded it when it told its sidecars.
    assert_eq!((change.p50_ms, change.p99_ms, change.last_ms), (Some(2.0), Some(40.0), Some(1_500.0)));
    let within = "select within_bound from status.propagation";
    assert_eq!(database.connect().await.query_one(within, &[]).await.unwrap().get::<_, i64>(0), 101);

    let old =
        "update weft.propagation set published_at = now() - interval '25 hours' where controller_id = $1";
    database.connect().await.execute(old, &[&id_a]).await.unwrap();
    a.forget_propagation().await.unwrap();
    assert_eq!(a.propagation(5).await.unwrap().remove(0).applied, 3);
}

#[tokio::test]
async fn who_left_a_day_ago_is_forgotten() {
    let (database, store, _) = stores().await;
    let client = database.connect().await;
    let all = ["default/api/stays", "default/api/left", "default/api/left-just-now"];
    let said = all.map(|instance| said(instance, false));
    store.put_acks(&serving(Uuid::new_v4()), &said, &[]).await.unwrap();
    let age = "insert into weft.sidecar_class values ('default/api/stays', 'x', 1, now()); \
         update weft.sidecar_ack set seen_at = now() - interval '25 hours' \
         where instance <> 'default/api/left-just-now'";
    client.batch_execute(age).await.unwrap();
    store.forget_acks().await.unwrap();
    let left = "select string_agg(instance, ' ' order by instance) from weft.sidecar_ack";
    let left: String = client.query_one(left, &[]).await.unwrap().get(0);
    assert_eq!(left, "default/api/left-just-now default/api/stays");
}

#[tokio::test]
async fn a_new_epoch_counts_as_news_from_its_first_event() {
    let (database, _, _) = stores().await;
    let client = database.connect().await;
    // A sidecar runs what has been wanted for a day, 1.7; ten seconds ago an event of epoch 2 that is not its business
    // made that 2.7.
    let story = "insert into weft.log_epoch select n, 1, 1, now(), 1, (n - 1) * 9, repeat('x', 32)::bytea, \
             now() - interval '1 day' from generate_series(1, 2) as n; \
         insert into weft.log_batch values (10, 10, 2, now() - interval '10 seconds', repeat('x', 32)::bytea, \
             repeat('x', 32)::bytea, '12345678'); \
         insert into weft.projection values ('mesh', 1, 2, 10, now()); \
         insert into weft.class_manifest values ('c', 7, repeat('x', 32)::bytea, now() - interval '1 day'); \
         insert into weft.manifest_history values ('c', 7, now() - interval '1 day'); \
         insert into weft.sidecar_class values ('default/api/one', 'c', 3, now() - interval '2 days'); \
         insert into weft.sidecar_ack (instance, controller, controller_id, connected, epoch, position, seen_at) \
             values ('default/api/one', 'c1', gen_random_uuid(), true, 1, 7, now())";
    client.batch_execute(story).await.unwrap();
    let lag = async || {
        let sql = "select wanted, lag_seconds::float8 from status.sidecars";
        let row = client.query_one(sql, &[]).await.unwrap();
        (row.get::<_, String>(0), row.get::<_, f64>(1))
    };
    let (wanted, seconds) = lag().await;
    assert_eq!(wanted, "2.7");
    assert!((10.0..3_600.0).contains(&seconds), "{seconds}");
    client.batch_execute("update weft.sidecar_ack set epoch = 2").await.unwrap();
    assert_eq!(lag().await, (wanted, 0.0));
}
