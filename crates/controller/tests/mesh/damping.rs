//! An endpoint that flaps, two controllers that hear of it, and a real log.

use crate::support::{LIMIT, TestMesh, declare, register, wait_until};
use std::time::Duration;
use weft_client::CallError;
use weft_identity::spiffe::Subject;
use weft_projector::{Decoder, verify_rows};
use weft_proto::v1 as pb;
use weft_proto::v1::mesh_client::MeshClient;
use weft_routing::{Projection, ShardKey};

const FLAPPER: &str = "default/api/i0";

fn report(instance: &str, health: pb::Health, revision: u64) -> pb::ReportHealthRequest {
    pb::ReportHealthRequest { health: health.into(), ..crate::support::health(instance, revision) }
}

/// Types of the flapper's health events after a position, and how often sidecars got other endpoints since.
async fn since(mesh: &TestMesh, position: u64) -> (Vec<String>, usize) {
    let events = mesh.reader().read(weft_model::Position(0), 10_000).await.unwrap();
    let (mut projection, mut decoder) = (Projection::default(), Decoder::default());
    let key = ShardKey::Endpoints("default/api".parse().unwrap());
    let (mut types, mut changes) = (Vec::new(), 0);
    for event in &events {
        let before = projection.shards().get(&key).map(|shard| shard.hash);
        projection.apply([&decoder.decode(&event.view()).unwrap()]).unwrap();
        if event.position.0 > position {
            changes += usize::from(projection.shards().get(&key).map(|shard| shard.hash) != before);
            if event.scope == format!("health/{FLAPPER}") {
                types.push(event.event_type.clone());
            }
        }
    }
    (types, changes)
}

#[tokio::test]
async fn a_flapping_endpoint_is_held_counted_and_let_go_once() {
    let mesh = TestMesh::start().await;
    let second = mesh.another("c2").await;
    let names: Vec<_> = (0..4).map(|number| format!("default/api/i{number}")).collect();
    let registered = names.iter().map(|name| register(name, 9000));
    mesh.apply([declare("default/api", 80)].into_iter().chain(registered).collect()).await;
    for name in &names {
        let mut sidecar = MeshClient::new(mesh.sidecar(name));
        sidecar.report_health(report(name, pb::Health::Healthy, 1)).await.unwrap();
    }
    let begun = mesh.reader().head().await.unwrap().position;

    // Once a second for a minute, from the tenth second on to the other controller.
    let subject = Subject::Instance(FLAPPER.parse().unwrap());
    let mut here = MeshClient::new(mesh.sidecar(FLAPPER));
    let mut there = MeshClient::new(mesh.channel_at(&second, &subject));
    for second_number in 0..60 {
        let health = if second_number % 2 == 0 { pb::Health::Unhealthy } else { pb::Health::Healthy };
        let sidecar = if second_number < 10 { &mut here } else { &mut there };
        let answer = sidecar.report_health(report(FLAPPER, health, 10 + second_number)).await.unwrap();
        assert!(!answer.into_inner().repeated);
        mesh.advance(Duration::from_secs(1));
        let reached = mesh.reader().head().await.unwrap().position;
        assert!(second.view().wait_folded(reached, LIMIT).await);
    }
    // Late ones are refused, whether the newest was recorded or only counted.
    let stale = there.report_health(report(FLAPPER, pb::Health::Unhealthy, 20)).await.unwrap_err();
    assert!(matches!(CallError::from(stale), CallError::Rejected { current_revision: 69, .. }));

    // What is counted is recorded: the last report too, which says that it is up. It stays down for everybody.
    mesh.advance(Duration::from_secs(11));
    let health = || {
        mesh.controller.view().read(|mesh| {
            let (state, id) = (mesh.state(), FLAPPER.parse().unwrap());
            let revision = state.health(&id).and_then(|entry| Some(entry.state.as_ref()?.revision));
            (revision, state.health_reported(&id).as_str(), state.health_seen(&id).as_str())
        })
    };
    let counted = (Some(69), "healthy", "unhealthy");
    wait_until("the last report to be recorded", LIMIT, async || health() == counted).await;
    let (types, changes) = since(&mesh, begun.0).await;
    assert_eq!(types[..7], ["HealthReported"; 7]);
    assert!(types[7..].iter().all(|event| event == "FlapsSummarized"), "{types:?}");
    assert!(types.len() <= 17, "{types:?}");
    assert_eq!(changes, 7);

    // People see it, and why.
    mesh.projected().await;
    let database = mesh.database.connect().await;
    let sql = "select state, reported, published, hidden_transitions from status.flapping where endpoint = $1 \
               and penalty > 3000 and held_by is not null and release_estimate > suppressed_since";
    let row = database.query_one(sql, &[&FLAPPER]).await.unwrap();
    assert_eq!((row.get(0), row.get(1), row.get(2)), ("held", "healthy", "unhealthy"));
    assert!((30..=53).contains(&row.get::<_, i64>(3)), "{row:?}");
    let question = pb::WhyRequest {
        source: "default/api".into(),
        destination: "default/api".into(),
        port: 80,
        at: None,
    };
    let why = mesh.admin().why(question).await.unwrap().into_inner();
    let step = why.steps.iter().find(|step| step.question == "does i0 flap?").unwrap();
    assert_eq!((step.scope.as_str(), step.position), ("health/default/api/i0", begun.0 + 7));
    let status = mesh.admin().status(pb::StatusRequest { at: None }).await.unwrap().into_inner();
    assert_eq!(status.flapping[0].held_by, begun.0 + 7);

    // Both controllers see that it is time; one event says so.
    mesh.advance(Duration::from_secs(300));
    let released = (Some(69), "healthy", "healthy");
    wait_until("it to be let go", LIMIT, async || health() == released).await;
    mesh.apply(vec![declare("default/other", 80)]).await;
    let (types, changes) = since(&mesh, begun.0).await;
    assert_eq!(types.iter().filter(|event| *event == "DampingReleased").count(), 1, "{types:?}");
    assert_eq!(changes, 8);

    mesh.projected().await;
    let store = mesh.store();
    let report = verify_rows(&mesh.reader(), &store, |_| ()).await.unwrap();
    assert_eq!(report.differences, []);
    store.close().await;
    second.stop().await;
    mesh.controller.stop().await;
}

#[tokio::test]
async fn what_a_controller_counted_is_recorded_when_it_ends() {
    let mesh = TestMesh::start().await;
    let names: Vec<_> = (0..4).map(|number| format!("default/api/i{number}")).collect();
    let registered = names.iter().map(|name| register(name, 9000));
    mesh.apply([declare("default/api", 80)].into_iter().chain(registered).collect()).await;
    for name in &names {
        let mut sidecar = MeshClient::new(mesh.sidecar(name));
        sidecar.report_health(report(name, pb::Health::Healthy, 1)).await.unwrap();
    }
    let mut sidecar = MeshClient::new(mesh.sidecar(FLAPPER));
    for revision in 10..18 {
        let health = if revision % 2 == 0 { pb::Health::Unhealthy } else { pb::Health::Healthy };
        sidecar.report_health(report(FLAPPER, health, revision)).await.unwrap();
    }
    let recorded = async |mesh: &TestMesh| {
        let events = mesh.reader().read(weft_model::Position(0), 1_000).await.unwrap();
        events.iter().filter(|event| event.event_type == "FlapsSummarized").count()
    };
    assert_eq!(recorded(&mesh).await, 0);
    let mesh = mesh.succeed("c1", async |_| ()).await;
    assert_eq!(recorded(&mesh).await, 1);
    mesh.controller.stop().await;
}
