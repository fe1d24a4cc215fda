//! A log that lost its end, and controllers that know nothing of it: sidecars tell, writes stop, an operator decides.

use crate::support::{LIMIT, TestMesh, apply_request, declare, discovery, wait_until};
use bytes::Bytes;
use prost::Message;
use tonic::Code;
use tonic::transport::Channel;
use weft_client::command;
use weft_controller::Controller;
use weft_eventlog::{AppendRequest, ConnectConfig, EventLog, LogConfig, NewEvent, ScopeAppend};
use weft_identity::ca::CertificateAuthority;
use weft_identity::spiffe::{Role, Subject};
use weft_model::Timestamp;
use weft_proto::v1 as pb;
use weft_proto::v1::discovery_client::DiscoveryClient;
use weft_proto::v1::mesh_client::MeshClient;
use weft_testkit::TestDatabase;

const API: &str = "default/api/one";

/// Events after a position are lost, with all that was written with them; the checkpoint too, as a whole database is.
async fn lose(database: &TestDatabase, after: u64, checkpoint: bool) {
    let client = database.connect().await;
    let mut script = String::new();
    for (table, column) in
        [("event", "position"), ("log_batch", "last_position"), ("command_outcome", "last_position")]
    {
        let there =
            client.query_one("select to_regclass($1)::text", &[&format!("weft.{table}")]).await.unwrap();
        if there.get::<_, Option<String>>(0).is_some() {
            script += &format!(
                "alter table weft.{table} disable trigger append_only; delete from weft.{table} where {column} > {after}; \
                 alter table weft.{table} enable always trigger append_only;"
            );
        }
    }
    if checkpoint {
        script += &format!(
            "update weft.projection set position = {after}, epoch = (select epoch from weft.event where position = {after}), \
             hash = (select hash from weft.event where position = {after});"
        );
    }
    client.batch_execute(&script).await.unwrap();
}

fn sidecar(mesh: &TestMesh, controller: &Controller) -> DiscoveryClient<Channel> {
    discovery(mesh.channel_at(controller, &Subject::Instance(API.parse().unwrap())))
}

/// What the sidecar is told once `position` is published.
async fn told(client: &mut DiscoveryClient<Channel>, position: u64) -> pb::Notice {
    let mut notices = client.subscribe(pb::SubscribeRequest::default()).await.unwrap().into_inner();
    let next = async {
        loop {
            let notice = notices.message().await.unwrap().unwrap();
            if notice.head.is_some_and(|head| head.position >= position) {
                return notice;
            }
        }
    };
    tokio::time::timeout(LIMIT, next).await.unwrap()
}

/// A mesh whose controller told a sidecar of the whole log, then ended, and whose database then lost what came after `kept`
/// events. The controller that comes next is another one and remembers nothing.
async fn rewound(checkpoint: bool) -> (TestMesh, u64, pb::Notice) {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api", "default/web"]).await;
    mesh.projected().await;
    let kept = mesh.reader().head().await.unwrap().position.0;
    for port in 1..4 {
        mesh.apply(vec![declare("default/lost", port)]).await;
    }
    mesh.projected().await;
    let notice = told(&mut sidecar(&mesh, &mesh.controller), kept + 3).await;
    let mesh = mesh.succeed("c9", async |database| lose(database, kept, checkpoint).await).await;
    (mesh, kept, notice)
}

async fn subscribe(
    client: &mut DiscoveryClient<Channel>,
    notice: &pb::Notice,
) -> Result<tonic::Streaming<pb::Notice>, tonic::Status> {
    let request = pb::SubscribeRequest { have: None, witness: notice.witness.clone() };
    client.subscribe(request).await.map(tonic::Response::into_inner)
}

async fn status(admin: &mut MeshClient<Channel>) -> pb::StatusResponse {
    admin.status(pb::StatusRequest::default()).await.unwrap().into_inner()
}

fn adopt(upto: u64) -> pb::AdoptHistoryRequest {
    pb::AdoptHistoryRequest { meta: Some(command("the backup is all there is")), rewind_upto: upto }
}

#[tokio::test]
async fn a_sidecar_tells_a_controller_without_memory_and_an_operator_goes_on() {
    let (mesh, kept, notice) = rewound(true).await;
    let controller = &mesh.controller;
    let mut admin = mesh.admin_at(controller);
    let mut api = sidecar(&mesh, controller);
    assert!(status(&mut admin).await.rewinds.is_empty(), "nobody has told yet");

    for _ in 0..2 {
        let refused = subscribe(&mut api, &notice).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
        assert!(refused.message().contains("LOG_REWOUND"), "{refused:?}");
    }
    let refused = admin.apply(apply_request(vec![declare("default/new", 80)])).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(
        refused.message().contains("LOG_REWOUND") && refused.message().contains("adopt-history"),
        "{refused:?}"
    );
    let rewinds = status(&mut admin).await.rewinds;
    assert_eq!(rewinds.len(), 1);
    assert_eq!(rewinds[0].witness, format!("sidecar {API}"));
    assert_eq!(rewinds[0].seen.unwrap().position, kept + 3);
    assert_eq!(rewinds[0].found.unwrap().position, kept);

    // Another controller refuses too, reads go on, and who is not ahead is served.
    let other = mesh.another("c8").await;
    let refused = mesh.admin_at(&other).apply(apply_request(vec![declare("default/new", 80)])).await;
    assert!(refused.unwrap_err().message().contains("LOG_REWOUND"));
    admin.get(pb::GetRequest { name: "default/api".into(), ..Default::default() }).await.unwrap();
    subscribe(&mut api, &pb::Notice::default()).await.unwrap();

    let mut operator =
        MeshClient::new(mesh.channel_at(
            controller,
            &Subject::Operator { role: Role::Operator, name: "tess".parse().unwrap() },
        ));
    assert_eq!(operator.adopt_history(adopt(1)).await.unwrap_err().code(), Code::PermissionDenied);
    let mut without = adopt(1);
    without.meta = Some(command(""));
    assert_eq!(admin.adopt_history(without).await.unwrap_err().code(), Code::InvalidArgument);
    let adopted = admin.adopt_history(adopt(rewinds[0].id)).await.unwrap().into_inner();
    assert_eq!((adopted.fork_position, adopted.rewind_upto), (kept, rewinds[0].id));
    assert_eq!(adopted.version.unwrap(), pb::ConfigVersion { epoch: adopted.epoch, position: kept + 1 });
    // Its answer was lost: the same again. Somebody else's comes too late.
    assert_eq!(admin.adopt_history(adopt(rewinds[0].id)).await.unwrap().into_inner(), adopted);
    let mut late = adopt(rewinds[0].id);
    late.meta = Some(command("another reason"));
    let late = mesh.admin_at(&other).adopt_history(late).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition);
    assert!(late.message().contains("the backup is all there is"), "{late:?}");

    // Everybody goes on, and the sidecar's snapshot is one of the new epoch, newer than all that was lost.
    admin.apply(apply_request(vec![declare("default/new", 80)])).await.unwrap();
    mesh.admin_at(&other).apply(apply_request(vec![declare("default/newer", 80)])).await.unwrap();
    assert!(status(&mut admin).await.rewinds.is_empty());
    let lost = notice.wanted.unwrap().version.unwrap();
    let mut notices =
        subscribe(&mut api, &pb::Notice { witness: notice.witness, ..Default::default() }).await.unwrap();
    let newer = async {
        loop {
            let wanted = notices.message().await.unwrap().unwrap().wanted.unwrap().version.unwrap();
            if (wanted.epoch, wanted.position) > (lost.epoch, lost.position) {
                return wanted;
            }
        }
    };
    assert_eq!(tokio::time::timeout(LIMIT, newer).await.unwrap().epoch, adopted.epoch);
    other.stop().await;
    mesh.controller.stop().await;
}

#[tokio::test]
async fn forged_and_foreign_witnesses_do_nothing() {
    let (mesh, kept, notice) = rewound(true).await;
    let controller = &mesh.controller;
    let mut api = sidecar(&mesh, controller);
    let genuine = pb::LogWitness::decode(&*notice.witness).unwrap();
    let invented = pb::LogPoint { epoch: 1, position: 1_000, hash: vec![7; 32].into() };
    let foreign =
        CertificateAuthority::create(&"weft.test".parse().unwrap(), Timestamp(1_772_366_400_000)).unwrap();
    let invented = invented.encode_to_vec();
    let signed = pb::LogWitness {
        signature: foreign.sign_witness(&invented).unwrap().into(),
        point: invented.clone().into(),
    };
    let borrowed = pb::LogWitness { point: invented.into(), ..genuine.clone() };
    let bare = pb::LogWitness { signature: Bytes::new(), ..genuine };
    let witnesses = [signed, borrowed, bare].map(|witness| Bytes::from(witness.encode_to_vec()));
    for witness in witnesses.into_iter().chain([Bytes::from_static(b"x"), Bytes::from(vec![0; 4_096])]) {
        subscribe(&mut api, &pb::Notice { witness, ..Default::default() }).await.unwrap();
    }
    let mut admin = mesh.admin_at(controller);
    assert!(status(&mut admin).await.rewinds.is_empty());
    let refused = admin.adopt_history(adopt(1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    admin.apply(apply_request(vec![declare("default/new", 80)])).await.unwrap();
    assert!(mesh.reader().head().await.unwrap().position.0 > kept);
    mesh.controller.stop().await;
}

/// Only the events were restored, from a dump; what was projected from the lost ones is still there.
#[tokio::test]
async fn a_checkpoint_of_a_lost_history_is_found_and_brought_back_after_the_decision() {
    let (mesh, kept, _) = rewound(false).await;
    let controller = &mesh.controller;
    let mut admin = mesh.admin_at(controller);
    wait_until("the projector to tell", LIMIT, async || !status(&mut admin).await.rewinds.is_empty()).await;
    let rewinds = status(&mut admin).await.rewinds;
    assert_eq!((rewinds.len(), rewinds[0].witness.as_str()), (1, "projector"));
    let before = mesh.store().checkpoint().await.unwrap();
    assert_eq!(before.position.0, kept + 3, "nobody projects");
    admin.adopt_history(adopt(rewinds[0].id)).await.unwrap();
    admin.apply(apply_request(vec![declare("default/new", 80)])).await.unwrap();
    mesh.projected().await;
    let verified = weft_projector::verify_rows(&mesh.reader(), &mesh.store(), |_| ()).await.unwrap();
    assert_eq!(verified.differences, []);
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_controller_that_starts_on_a_restored_database_remembers_what_it_published() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api"]).await;
    mesh.projected().await;
    let head = mesh.reader().head().await.unwrap().position.0;
    // Nobody else is there to tell.
    let mesh = mesh.succeed("c1", async |database| lose(database, head - 1, true).await).await;
    let mut admin = mesh.admin();
    let rewinds = status(&mut admin).await.rewinds;
    assert_eq!((rewinds.len(), rewinds[0].witness.as_str()), (1, "controller c1"));
    let refused = admin.apply(apply_request(vec![declare("default/new", 80)])).await.unwrap_err();
    assert!(refused.message().contains("LOG_REWOUND"), "{refused:?}");
    admin.adopt_history(adopt(rewinds[0].id)).await.unwrap();
    admin.apply(apply_request(vec![declare("default/new", 80)])).await.unwrap();
    mesh.controller.stop().await;
}

/// A decision leaves a controller that remembers the lost events with nothing that it could go on with.
#[tokio::test]
async fn a_controller_that_has_seen_the_lost_events_tells_and_has_to_be_started_anew() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api"]).await;
    mesh.projected().await;
    let head = mesh.reader().head().await.unwrap().position.0;
    lose(&mesh.database, head - 1, true).await;
    let mut admin = mesh.admin();
    wait_until("the controller to tell", LIMIT, async || !status(&mut admin).await.rewinds.is_empty()).await;
    let rewinds = status(&mut admin).await.rewinds;
    assert_eq!(rewinds[0].witness, "controller c1");
    let refused = admin.apply(apply_request(vec![declare("default/new", 80)])).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    let adopted = admin.adopt_history(adopt(rewinds[0].id)).await.unwrap().into_inner();
    assert_eq!(adopted.version, None, "it cannot append");
    tokio::time::timeout(LIMIT, mesh.controller.outdated()).await.unwrap();

    // Whoever comes next makes the decision an event.
    let next = mesh.another("c2").await;
    wait_until("the decision in the log", LIMIT, async || {
        mesh.reader().head().await.unwrap().position.0 >= head
    })
    .await;
    let event = mesh.reader().read(weft_model::Position(head - 1), 1).await.unwrap().remove(0);
    assert_eq!((event.event_type.as_str(), event.epoch.0), ("HistoryAdopted", adopted.epoch));
    mesh.admin_at(&next).apply(apply_request(vec![declare("default/new", 80)])).await.unwrap();
    next.stop().await;
    mesh.controller.stop().await;
}

/// A finding stops also those who append without the API.
#[tokio::test]
async fn a_stopped_log_takes_nothing_from_any_process() {
    let (mesh, _, notice) = rewound(true).await;
    let controller = &mesh.controller;
    subscribe(&mut sidecar(&mesh, controller), &notice).await.unwrap_err();
    let connect: ConnectConfig = mesh.database.url().parse().unwrap();
    let log =
        EventLog::open(LogConfig { allow_unsafe_settings: true, ..LogConfig::new(connect) }).await.unwrap();
    let event = NewEvent { event_type: "Happened".into(), schema: 1, payload: "{}".into() };
    let expected = weft_model::ExpectedVersion::Any;
    let request = AppendRequest {
        command_id: uuid::Uuid::now_v7(),
        fingerprint: None,
        actor: "test".into(),
        reason: None,
        cause: None,
        scopes: vec![ScopeAppend { scope: "elsewhere".into(), expected, events: vec![event] }],
    };
    assert!(log.appender().append(request).await.unwrap_err().to_string().contains("LOG_REWOUND"));
    log.shutdown().await;
    mesh.controller.stop().await;
}
