//! Compare-and-swap, repeats, batches, and questions about the past.

use crate::support::{LIMIT, TestMesh, apply_request, declare, deny_all, health, register, wait_until};
use futures_util::TryStreamExt;
use tonic::Code;
use weft_client::{CallError, command};
use weft_identity::spiffe::{Role, Subject};
use weft_proto::v1 as pb;
use weft_proto::v1::change::Change as Wire;
use weft_proto::v1::mesh_client::MeshClient;

fn expecting(version: u64, change: Wire) -> pb::ApplyRequest {
    let mut request = apply_request(vec![change]);
    request.changes[0].expected =
        Some(pb::Expected { expected: Some(pb::expected::Expected::Version(version)) });
    request
}

#[tokio::test]
async fn of_concurrent_writers_with_one_expected_version_one_wins() {
    let mesh = TestMesh::start().await;
    mesh.apply(vec![declare("default/db", 5432)]).await;
    let second = mesh.another("c2").await;
    let mut attempts = tokio::task::JoinSet::new();
    for n in 0..16 {
        let mut client = if n % 2 == 0 { mesh.admin() } else { mesh.admin_at(&second) };
        attempts.spawn(async move { client.apply(expecting(1, declare("default/db", 6000 + n))).await });
    }
    let (mut won, mut lost) = (0, 0);
    while let Some(result) = attempts.join_next().await {
        match result.unwrap() {
            Ok(_) => won += 1,
            Err(status) => {
                assert_eq!(status.code(), Code::Aborted, "{status:?}");
                let error = CallError::from(status);
                assert!(
                    matches!(&error, CallError::Conflict { change: Some(0), current: 2, scope, .. } if scope == "service/default/db"),
                    "{error:?}"
                );
                lost += 1;
            }
        }
    }
    assert_eq!((won, lost), (1, 15));
    second.stop().await;
    mesh.controller.stop().await;
}

#[tokio::test]
async fn writers_without_an_expectation_all_get_through() {
    let mesh = TestMesh::start().await;
    let second = mesh.another("c2").await;
    let mut attempts = tokio::task::JoinSet::new();
    for n in 0..6 {
        let client = if n % 2 == 0 { mesh.admin() } else { mesh.admin_at(&second) };
        let request = apply_request(vec![declare("default/db", 6000 + n)]);
        // As every client does: who lost to the others too often is told to come back.
        let call = move || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.apply(request).await }
        };
        attempts.spawn(weft_client::retry(call));
    }
    while let Some(result) = attempts.join_next().await {
        result.unwrap().unwrap();
    }
    // The last one may have gone through the other controller.
    wait_until("every declaration to be there", LIMIT, async || {
        let request = pb::GetRequest { name: "default/db".into(), ..Default::default() };
        mesh.admin().get(request).await.unwrap().into_inner().resources[0].version == 6
    })
    .await;
    second.stop().await;
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_repeated_command_gets_its_first_outcome_and_another_one_under_its_id_an_error() {
    let mesh = TestMesh::start().await;
    let mut admin = mesh.admin();
    let mut first = expecting(0, declare("default/db", 5432));
    first.changes[0].expected = Some(pb::Expected { expected: Some(pb::expected::Expected::Empty(true)) });
    let outcome = admin.apply(first.clone()).await.unwrap().into_inner();
    assert!(!outcome.repeated && outcome.outcomes[0].changed);
    // The scope has moved on, by the command itself and by another one.
    mesh.apply(vec![declare("default/db", 6000)]).await;
    let repeat = admin.apply(first.clone()).await.unwrap().into_inner();
    assert!(repeat.repeated);
    assert_eq!((&repeat.version, &repeat.outcomes), (&outcome.version, &outcome.outcomes));

    let mut other = apply_request(vec![declare("default/db", 7000)]);
    other.meta = first.meta;
    let status = admin.apply(other).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().contains("command_id"), "{status:?}");
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_batch_is_all_or_nothing_and_names_the_change_at_fault() {
    let mesh = TestMesh::start().await;
    let mut admin = mesh.admin();
    let batch = vec![declare("default/api", 80), register("default/nobody/one", 9000)];
    let status = admin.apply(apply_request(batch)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(matches!(CallError::from(status), CallError::Rejected { change: Some(1), .. }));

    let mut dry = apply_request(vec![declare("default/api", 80), deny_all("default/api")]);
    dry.dry_run = true;
    let planned = admin.apply(dry).await.unwrap().into_inner();
    assert!(planned.outcomes.iter().all(|outcome| outcome.changed));
    let got =
        admin.get(pb::GetRequest { kind: pb::Kind::Service.into(), ..Default::default() }).await.unwrap();
    assert!(
        got.into_inner().resources.is_empty(),
        "neither the refused batch nor the rehearsal left anything"
    );

    let malformed = vec![declare("default/api", 80), declare("Default/API", 80)];
    let status = admin.apply(apply_request(malformed)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(matches!(CallError::from(status), CallError::Invalid { change: Some(1), .. }));
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_refusal_is_final_however_busy_the_log_is() {
    let mesh = TestMesh::start().await;
    let busy = mesh.another("c2").await;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..8 {
        let mut client = mesh.admin_at(&busy);
        writers.spawn(async move {
            for port in 1.. {
                let declared = declare(&format!("default/w{writer}"), port);
                client.apply(apply_request(vec![declared])).await.unwrap();
            }
        });
    }
    for _ in 0..30 {
        let refused = apply_request(vec![register("default/nobody/one", 9000)]);
        let status = mesh.admin().apply(refused).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    }
    writers.shutdown().await;
    busy.stop().await;
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_rehearsal_knows_what_was_done_at_another_controller() {
    let mesh = TestMesh::start().await;
    let second = mesh.another("c2").await;
    for port in 1..20 {
        let mut request = apply_request(vec![declare("default/db", port)]);
        mesh.admin_at(&second).apply(request.clone()).await.unwrap();
        request.dry_run = true;
        let planned = mesh.admin().apply(request).await.unwrap().into_inner();
        assert!(!planned.outcomes[0].changed);
    }
    second.stop().await;
    mesh.controller.stop().await;
}

#[tokio::test]
async fn only_newer_observations_count() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api"]).await;
    let mut sidecar = MeshClient::new(mesh.sidecar("default/api/one"));
    sidecar.report_health(health("default/api/one", 5)).await.unwrap();
    // The same again under a new command id: a repeat whose answer was lost.
    let again = sidecar.report_health(health("default/api/one", 5)).await.unwrap().into_inner();
    assert!(!again.outcomes[0].changed);
    let status = sidecar.report_health(health("default/api/one", 4)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(matches!(CallError::from(status), CallError::Rejected { current_revision: 5, .. }));
    mesh.controller.stop().await;
}

#[tokio::test]
async fn the_past_is_still_there() {
    let mesh = TestMesh::start().await;
    let mut admin = mesh.admin();
    mesh.declare(&["default/api", "default/web"]).await;
    let mut sidecar = MeshClient::new(mesh.sidecar("default/api/one"));
    sidecar.report_health(health("default/api/one", 1)).await.unwrap();
    let before = mesh.apply(vec![crate::support::allow_from("default/api", "default/web")]).await;
    mesh.apply(vec![deny_all("default/api")]).await;

    let ask = |position: Option<u64>| pb::WhyRequest {
        source: "web".into(),
        destination: "default/api".into(),
        port: 80,
        at: position.map(|position| pb::At { at: Some(pb::at::At::Position(position)) }),
    };
    let now = admin.why(ask(None)).await.unwrap().into_inner();
    assert!(!now.permitted && now.reason == "policy_denied", "{now:?}");
    let then = before.version.unwrap().position;
    let past = admin.why(ask(Some(then))).await.unwrap().into_inner();
    assert!(past.permitted, "{past:?}");
    assert_eq!(past.as_of.unwrap().position, then);
    assert_eq!(admin.why(ask(Some(9_999))).await.unwrap_err().code(), Code::NotFound);
    mesh.controller.stop().await;
}

#[tokio::test]
async fn the_log_is_read_filtered_from_its_end_and_followed() {
    let mesh = TestMesh::start().await;
    let mut admin = mesh.admin();
    mesh.declare(&["default/api", "default/web"]).await;

    let read = async |request: pb::ReadLogRequest| {
        let stream = mesh.admin().read_log(request).await.unwrap().into_inner();
        let batches: Vec<pb::LogBatch> = stream.try_collect().await.unwrap();
        batches.into_iter().flat_map(|batch| batch.events).collect::<Vec<_>>()
    };
    let all = read(pb::ReadLogRequest::default()).await;
    assert_eq!(all.iter().map(|event| event.position).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    let services = read(pb::ReadLogRequest { scope_prefix: "service/".into(), ..Default::default() }).await;
    assert_eq!(services.len(), 2);
    let last = read(pb::ReadLogRequest { limit: 2, last: true, ..Default::default() }).await;
    assert_eq!(last, all[3..]);
    let none = read(pb::ReadLogRequest { actor: "nobody".into(), ..Default::default() }).await;
    assert!(none.is_empty());

    let follow = pb::ReadLogRequest { after: 5, follow: true, ..Default::default() };
    let mut stream = admin.read_log(follow).await.unwrap().into_inner();
    mesh.apply(vec![deny_all("default/api")]).await;
    let batch = stream.message().await.unwrap().unwrap();
    assert_eq!(batch.events[0].scope, "security/default/api");
    // A shutdown ends streams instead of waiting for them.
    mesh.controller.stop().await;
    assert!(!matches!(stream.message().await, Ok(Some(_))));
}

#[tokio::test]
async fn who_follows_the_log_does_so_no_longer_than_its_leaf_is_good() {
    let mesh = TestMesh::start().await;
    let subject = Subject::Operator { role: Role::Viewer, name: "tess".parse().unwrap() };
    let short = std::time::Duration::from_secs(3);
    let credential = mesh.authority().issue_credential(&subject, weft_controller::clock::now(), short);
    let mut viewer = MeshClient::new(mesh.channel(credential.unwrap()));
    let follow = pb::ReadLogRequest { follow: true, ..Default::default() };
    let mut stream = viewer.read_log(follow).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let end = tokio::time::timeout(LIMIT, stream.message()).await.unwrap();
    assert_eq!(end.unwrap_err().code(), Code::Unauthenticated);
    mesh.controller.stop().await;
}

#[tokio::test]
async fn an_event_that_nobody_understands_stops_writing_and_leaves_reading() {
    let mesh = TestMesh::start().await;
    mesh.apply(vec![declare("default/db", 5432)]).await;
    let config = weft_eventlog::LogConfig {
        connect: mesh.database.url().parse().unwrap(),
        allow_unsafe_settings: true,
    };
    let foreign = weft_eventlog::EventLog::open(config).await.unwrap();
    let event =
        weft_eventlog::NewEvent { event_type: "FromTheFuture".into(), schema: 1, payload: "{}".into() };
    let scope = weft_eventlog::ScopeAppend {
        scope: "mesh".into(),
        expected: weft_model::ExpectedVersion::Any,
        events: vec![event],
    };
    let request = weft_eventlog::AppendRequest {
        command_id: uuid::Uuid::now_v7(),
        fingerprint: None,
        actor: "test".into(),
        reason: None,
        cause: None,
        scopes: vec![scope],
    };
    foreign.appender().append(request).await.unwrap();
    wait_until("the fold to stop", LIMIT, async || mesh.controller.view().fault().is_some()).await;

    let mut admin = mesh.admin();
    let status = admin.apply(apply_request(vec![declare("default/api", 80)])).await.unwrap_err();
    assert_eq!(status.code(), Code::DataLoss, "{status:?}");
    assert!(status.message().contains("position 3"), "{status:?}");
    let got = admin.get(pb::GetRequest { name: "default/db".into(), ..Default::default() }).await.unwrap();
    assert_eq!(got.into_inner().resources.len(), 1);
    foreign.shutdown().await;
    mesh.controller.stop().await;
}

#[tokio::test]
async fn requests_without_an_id_are_refused() {
    let mesh = TestMesh::start().await;
    let mut request = apply_request(vec![declare("default/db", 5432)]);
    for id in ["", "x", "6f9619ff-8b86-d011-b42d-00c04fc964ff"] {
        request.meta = Some(pb::CommandMeta { command_id: id.into(), ..command("test") });
        let status = mesh.admin().apply(request.clone()).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    }
    mesh.controller.stop().await;
}
