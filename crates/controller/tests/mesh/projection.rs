//! One writer, rows that equal the fold, and what people see of them.

use crate::support::{
    LIMIT, TestMesh, allow_from, declare, deny_all, discovery, health, register, wait_until,
};
use weft_client::command;
use weft_eventlog::Reader;
use weft_projector::{Difference, FoldFrom, Role, Store, fold_to, verify_rows};
use weft_proto::v1 as pb;
use weft_proto::v1::mesh_client::MeshClient;

/// A mesh with a bit of everything in its log.
async fn busy() -> TestMesh {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api", "default/web", "default/db"]).await;
    mesh.apply(vec![allow_from("default/api", "default/web"), deny_all("default/db")]).await;
    let mut api = MeshClient::new(mesh.sidecar("default/api/one"));
    api.report_health(health("default/api/one", 1)).await.unwrap();
    let leave = pb::DeregisterInstanceRequest {
        meta: Some(command("test")),
        expected: None,
        instance: "default/db/one".into(),
    };
    mesh.admin().deregister_instance(leave).await.unwrap();
    mesh.projected().await;
    mesh
}

/// Verifies with the rights of `weft_reader`, as `weft verify` does.
async fn verify(mesh: &TestMesh) -> Vec<Difference> {
    let url = mesh.database.url();
    let separator = if url.contains('?') { '&' } else { '?' };
    let url = format!("{url}{separator}options=-c%20role%3Dweft_reader");
    let (reader, store) = (Reader::new(url.parse().unwrap()), Store::new(&url).unwrap());
    let report = verify_rows(&reader, &store, |_| ()).await.unwrap();
    store.close().await;
    report.differences
}

#[tokio::test]
async fn the_rows_equal_the_fold_and_tampering_shows() {
    let mesh = busy().await;
    assert_eq!(verify(&mesh).await, []);

    let tampering = "update weft.proxy_routing_state set body = '\\x00' where shard_key = 'inbound/default/db'; \
         delete from weft.projected_policy where scope = 'security/default/db'; \
         update weft.projected_instance set health = 'healthy' where instance = 'default/web/one'; \
         insert into weft.sidecar_class values ('default/db/ghost', 'x', 1, now())";
    mesh.database.connect().await.batch_execute(tampering).await.unwrap();
    let found = verify(&mesh).await;
    let content = |table, key: &str| Difference::Content { table, key: key.into() };
    let expected = [
        content("weft.proxy_routing_state", "inbound/default/db"),
        Difference::Surplus { table: "weft.sidecar_class", key: "default/db/ghost".into() },
        content("weft.projected_instance", "default/web/one"),
        Difference::Missing { table: "weft.projected_policy", key: "security/default/db".into() },
        Difference::Hash { table: "weft.proxy_routing_state", key: "inbound/default/db".into() },
    ];
    assert_eq!(found, expected);

    // A controller that begins to lead brings the rows back to what the log says.
    let next = mesh.another("c2").await;
    let database = mesh.database.connect().await;
    database
        .batch_execute("update weft.lease set expires_at = '-infinity', holder_id = gen_random_uuid()")
        .await
        .unwrap();
    wait_until("somebody to lead anew and correct the rows", LIMIT, async || verify(&mesh).await.is_empty())
        .await;
    next.stop().await;
    mesh.controller.stop().await;
}

#[tokio::test]
async fn the_fold_to_any_position_is_the_same_as_the_view_was() {
    let mesh = busy().await;
    let head = mesh.reader().head().await.unwrap().position;
    let folded = fold_to(&mesh.reader(), head, FoldFrom::FirstEvent, |_| ()).await.unwrap();
    mesh.controller.view().read(|projection| assert_eq!(*projection, folded));
    assert_eq!(folded.recompute(), folded);
    mesh.controller.stop().await;
}

#[tokio::test]
async fn one_of_two_controllers_projects_and_the_other_takes_over() {
    let mesh = busy().await;
    let second = mesh.another("c2").await;
    // On a busy machine a lease may have ended and been taken again meanwhile.
    let term = |role: &Role| match role {
        Role::Leader { term } => Some(*term),
        Role::Follower => None,
    };
    let mut role = mesh.controller.view().role();
    let first = role.wait_for(|role| term(role).is_some());
    let first = term(&tokio::time::timeout(LIMIT, first).await.unwrap().unwrap());
    assert_eq!(*second.view().role().borrow(), Role::Follower);

    // The follower publishes what the leader commits, and takes commands itself.
    let outcome =
        mesh.admin_at(&second).apply(crate::support::apply_request(vec![declare("default/new", 80)])).await;
    let position = outcome.unwrap().into_inner().version.unwrap().position;
    let mut published = second.view().publications();
    let reached = published.wait_for(|version| version.position.0 >= position);
    tokio::time::timeout(LIMIT, reached).await.unwrap().unwrap();
    assert_eq!(*second.view().role().borrow(), Role::Follower);

    let TestMesh { database, controller, .. } = mesh;
    controller.stop().await;
    let mut role = second.view().role();
    let later = role.wait_for(|role| term(role) > first);
    let later = term(&tokio::time::timeout(LIMIT, later).await.unwrap().unwrap());
    let row =
        database.connect().await.query_one("select holder, term, lag from status.leader", &[]).await.unwrap();
    assert_eq!(row.get::<_, String>(0), "c2");
    assert!(Some(row.get::<_, i64>(1)) >= later, "{row:?} after {later:?}");
    second.stop().await;
    drop(database);
}

#[tokio::test]
async fn a_leader_that_was_overtaken_writes_nothing_and_publishes_nothing() {
    let mesh = busy().await;
    let before = mesh.store().checkpoint().await.unwrap();
    // What a later term leaves behind: the lease is somebody else's, and the checkpoint carries its term.
    let database = mesh.database.connect().await;
    let overtake = "begin; update weft.lease set term = term + 7, holder = 'usurper', holder_id = gen_random_uuid(), \
         expires_at = 'infinity'; update weft.projection set term = term + 7; commit";
    database.batch_execute(overtake).await.unwrap();

    let outcome = mesh.apply(vec![declare("default/new", 80)]).await;
    let view = mesh.controller.view();
    let mut role = view.role();
    tokio::time::timeout(LIMIT, role.wait_for(|role| *role == Role::Follower)).await.unwrap().unwrap();
    assert_eq!(mesh.store().checkpoint().await.unwrap(), before);
    assert_eq!(view.published(weft_projector::Published::version), before);
    // It still folds, and takes commands.
    assert!(view.read(|projection| projection.version().position.0) >= outcome.version.unwrap().position);

    // Once the checkpoint covers it, whoever wrote it, it is published here too.
    database.batch_execute("update weft.lease set expires_at = '-infinity'").await.unwrap();
    let mut published = view.publications();
    tokio::time::timeout(LIMIT, published.wait_for(|version| *version > before)).await.unwrap().unwrap();
    assert_eq!(verify(&mesh).await, []);
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_restart_goes_on_where_it_was() {
    let mesh = busy().await;
    let before = mesh.store().checkpoint().await.unwrap();
    let second = mesh.another("c2").await;
    let TestMesh { database, controller, .. } = mesh;
    controller.stop().await;
    let mut published = second.view().publications();
    tokio::time::timeout(LIMIT, published.wait_for(|version| *version >= before)).await.unwrap().unwrap();
    assert_eq!(*published.borrow(), before, "nothing happened, so nothing is new");
    second.stop().await;
    drop(database);
}

#[tokio::test]
async fn readers_see_the_mesh_in_sql() {
    let mesh = busy().await;
    let mut sidecar = discovery(mesh.sidecar("default/api/one"));
    let pulled = sidecar.pull(pb::PullRequest::default()).await.unwrap().into_inner().header;
    let applied = pulled.clone().unwrap().version.unwrap();
    let _stream =
        sidecar.subscribe(pb::SubscribeRequest { have: pulled, ..Default::default() }).await.unwrap();
    let reader = mesh.database.connect().await;
    reader.batch_execute("set role weft_reader").await.unwrap();
    let wanted = format!("{}.{}", applied.epoch, applied.position);
    wait_until("the sidecar's row", LIMIT, async || {
        let sql = "select applied, lag_seconds::text, connected from status.sidecars where instance = $1";
        let row = reader.query_one(sql, &[&"default/api/one"]).await.unwrap();
        row.get::<_, Option<String>>(0).as_ref() == Some(&wanted)
            && row.get::<_, String>(1) == "0.0"
            && row.get::<_, bool>(2)
    })
    .await;

    let one = async |sql: &str| -> String { reader.query_one(sql, &[]).await.unwrap().get(0) };
    assert_eq!(
        one("select string_agg(service, ' ' order by service) from status.services").await,
        "default/api default/db default/web"
    );
    assert_eq!(
        one("select instances || '/' || eligible from status.services where service = 'default/api'").await,
        "1/1"
    );
    assert_eq!(one("select ports from status.services where service = 'default/api'").await, "main:80");
    assert_eq!(
        one("select string_agg(instance || ' ' || health, ', ' order by instance) from status.endpoints")
            .await,
        "default/api/one healthy, default/web/one unknown"
    );
    assert_eq!(
        one("select summary from status.policies where scope = 'security/default/api'").await,
        "default deny; allow default/web"
    );
    assert_eq!(one("select revision::text from status.health where instance = 'default/api/one'").await, "1");
    let head = mesh.reader().head().await.unwrap().position;
    assert_eq!(
        one("select head || ' ' || projected || ' ' || projection_lag from status.log").await,
        format!("{head} {head} 0")
    );
    assert_eq!(one("select holder || ' ' || alive from status.leader").await, "c1 true");
    assert_eq!(one("select count(*)::text from status.sidecars where not connected and applied is null and lag_seconds > 0").await, "1");
    let undocumented = "select coalesce(string_agg(format('%s.%s', attrelid::regclass, attname), ' '), '') from pg_attribute \
         join pg_class on pg_class.oid = attrelid where relnamespace = 'status'::regnamespace and attnum > 0 \
         and col_description(attrelid, attnum) is null";
    assert_eq!(one(undocumented).await, "");

    // A reader is a reader.
    assert!(reader.batch_execute("delete from weft.proxy_routing_state").await.is_err());
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_status_whose_checkpoint_covers_a_change_shows_who_should_run_it() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api"]).await;
    let mut admin = mesh.admin();
    for n in 1..30 {
        let port = 9_000 + n;
        let applied = mesh.apply(vec![register("default/api/one", port)]).await.version.unwrap().position;
        loop {
            let status = admin.status(pb::StatusRequest::default()).await.unwrap().into_inner();
            if status.leader.unwrap().position >= applied {
                let wanted = status.sidecars[0].wanted.unwrap().position;
                assert!(wanted >= applied, "{wanted} is not {applied}");
                break;
            }
        }
    }
    mesh.controller.stop().await;
}

#[tokio::test]
async fn many_changes_are_projected_in_order() {
    let mesh = TestMesh::start().await;
    for n in 0..40 {
        mesh.apply(vec![
            declare("default/api", 1_000 + n),
            register(&format!("default/api/i{n}"), 9_000 + n),
        ])
        .await;
    }
    mesh.projected().await;
    assert_eq!(verify(&mesh).await, []);
    let history = "select count(*) from weft.manifest_history";
    let kept: i64 = mesh.database.connect().await.query_one(history, &[]).await.unwrap().get(0);
    assert!((1..=64).contains(&kept), "{kept}");
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_name_is_one_process() {
    let mesh = TestMesh::start().await;
    let refused = mesh.try_another("c1").await.unwrap_err();
    assert!(refused.to_string().contains("a controller called c1 runs already"), "{refused}");
    // It is free again when that one ended.
    let mesh = mesh.succeed("c1", async |_| ()).await;
    mesh.controller.stop().await;
}
