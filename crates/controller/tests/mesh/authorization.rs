//! Who is refused what.

use crate::support::{TestMesh, address, apply_request, declare, discovery, health, registration};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::HandshakeKind;
use tonic::Code;
use tonic::transport::Channel;
use weft_client::{ALPN, Relay, command};
use weft_identity::spiffe::{Role, Subject};
use weft_identity::tls::{ExpectedPeer, TlsIdentity};
use weft_proto::v1 as pb;
use weft_proto::v1::identity_client::IdentityClient;
use weft_proto::v1::mesh_client::MeshClient;

/// The codes that every call of the API gives this client, for things of `default/api/two`.
async fn codes(channel: Channel) -> Vec<(&'static str, Code)> {
    fn code<T>(result: Result<T, tonic::Status>) -> Code {
        result.map_or_else(|status| status.code(), |_| Code::Ok)
    }
    let two = "default/api/two".to_owned();
    let mut mesh = MeshClient::new(channel.clone());
    let mut sidecar = discovery(channel.clone());
    let mut identity = IdentityClient::new(channel);
    let meta = || Some(command("test"));
    let register = pb::RegisterInstanceRequest {
        meta: meta(),
        expected: None,
        registration: Some(registration(&two, 9001)),
    };
    let drain = pb::DrainInstanceRequest { meta: meta(), expected: None, instance: two.clone() };
    let leave = pb::DeregisterInstanceRequest { meta: meta(), expected: None, instance: two.clone() };
    let token = pb::CreateJoinTokenRequest {
        meta: meta(),
        service: "default/api".into(),
        instance: String::new(),
        ttl_seconds: 60,
    };
    let why = pb::WhyRequest { source: "api".into(), destination: "api".into(), port: 80, at: None };
    vec![
        ("apply", code(mesh.apply(apply_request(vec![declare("default/new", 80)])).await)),
        ("register", code(mesh.register_instance(register).await)),
        ("report_health", code(mesh.report_health(health(&two, 1)).await)),
        ("drain", code(mesh.drain_instance(drain).await)),
        ("deregister", code(mesh.deregister_instance(leave).await)),
        ("create_token", code(mesh.create_join_token(token).await)),
        ("get", code(mesh.get(pb::GetRequest::default()).await)),
        ("status", code(mesh.status(pb::StatusRequest::default()).await)),
        ("why", code(mesh.why(why).await)),
        ("read_log", code(mesh.read_log(pb::ReadLogRequest::default()).await)),
        ("subscribe", code(sidecar.subscribe(pb::SubscribeRequest::default()).await)),
        ("pull", code(sidecar.pull(pb::PullRequest::default()).await)),
        ("ack", code(sidecar.ack(pb::AckRequest::default()).await)),
        (
            "renew",
            code(
                identity
                    .renew(pb::RenewRequest { meta: meta(), csr: vec![0].into(), ..Default::default() })
                    .await,
            ),
        ),
    ]
}

fn admitted(codes: &[(&'static str, Code)]) -> Vec<&'static str> {
    let refused = [Code::PermissionDenied, Code::Unauthenticated];
    codes.iter().filter(|(_, code)| !refused.contains(code)).map(|(call, _)| *call).collect()
}

#[tokio::test]
async fn everybody_gets_exactly_what_the_table_says() {
    let mesh = TestMesh::start().await;
    mesh.apply(vec![declare("default/api", 80)]).await;

    let stranger = codes(mesh.stranger()).await;
    assert!(stranger.iter().all(|(_, code)| *code == Code::Unauthenticated), "{stranger:?}");

    // An instance with a good leaf, asking for another one's things: refused without exception. What it gets is its
    // own: a stream, a pull (it is not registered), an acknowledgement, a renewal.
    let neighbour = codes(mesh.sidecar("default/api/one")).await;
    assert_eq!(admitted(&neighbour), ["subscribe", "pull", "ack", "renew"], "{neighbour:?}");
    assert!(neighbour.contains(&("pull", Code::NotFound)), "{neighbour:?}");

    let own = codes(mesh.sidecar("default/api/two")).await;
    let expected = ["register", "report_health", "drain", "deregister", "subscribe", "pull", "ack", "renew"];
    assert_eq!(admitted(&own), expected, "{own:?}");

    let viewer = codes(mesh.operator(Role::Viewer)).await;
    assert_eq!(admitted(&viewer), ["get", "status", "why", "read_log"], "{viewer:?}");
    let changing =
        ["apply", "register", "drain", "deregister", "create_token", "get", "status", "why", "read_log"];
    for role in [Role::Operator, Role::Admin] {
        assert_eq!(admitted(&codes(mesh.operator(role)).await), changing, "{role}");
    }
    let controller = mesh.credential(&Subject::Controller("c9".parse().unwrap()));
    let controller = codes(mesh.channel(controller)).await;
    assert_eq!(admitted(&controller), Vec::<&str>::new(), "{controller:?}");
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_leaf_that_ended_under_way_is_refused() {
    let mesh = TestMesh::start().await;
    let channel = mesh.operator(Role::Viewer);
    let mut client = MeshClient::new(channel);
    client.get(pb::GetRequest::default()).await.unwrap();
    mesh.advance(Duration::from_secs(2 * 3600));
    let status = client.get(pb::GetRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
    mesh.controller.stop().await;
}

#[tokio::test]
async fn health_is_open_to_everybody_and_reflection_to_members() {
    let mesh = TestMesh::start().await;
    let health = |channel| async {
        let mut client = tonic_health::pb::health_client::HealthClient::new(channel);
        client.check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap().into_inner().status
    };
    assert_eq!(health(mesh.stranger()).await, 1);
    let reflect = |channel| async {
        use tonic_reflection::pb::v1::ServerReflectionRequest;
        use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
        use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let stream = tokio_stream::once(request);
        let mut answers =
            ServerReflectionClient::new(channel).server_reflection_info(stream).await?.into_inner();
        answers.message().await
    };
    assert_eq!(reflect(mesh.stranger()).await.unwrap_err().code(), Code::Unauthenticated);
    let answer = reflect(mesh.operator(Role::Viewer)).await.unwrap().unwrap();
    assert!(format!("{answer:?}").contains("weft.v1.Mesh"));
    mesh.controller.stop().await;
}

#[tokio::test]
async fn who_resumes_is_who_it_was_and_no_longer_than_its_leaf_is_good() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api", "default/web"]).await;
    let identity = TlsIdentity::new(mesh.credential(&Subject::Instance("default/web/one".parse().unwrap())));
    let client = identity.resuming_client(ExpectedPeer::Controller, ALPN);
    let back = || async {
        let relay = Relay::connect(vec![address(&mesh.controller)], client.clone()).await.unwrap();
        MeshClient::new(relay.own())
    };
    // Answered calls have brought the tickets.
    back().await.report_health(health("default/web/one", 1)).await.unwrap();
    let resumed = async || {
        let tls = TlsConnector::from(Arc::clone(client.attempt().config()));
        let stream = TcpStream::connect(mesh.controller.address()).await.unwrap();
        let stream = tls.connect("127.0.0.1".try_into().unwrap(), stream).await.unwrap();
        stream.get_ref().1.handshake_kind()
    };
    assert_eq!(resumed().await, Some(HandshakeKind::Resumed));

    let mut own = back().await;
    own.report_health(health("default/web/one", 2)).await.unwrap();
    let foreign = own.report_health(health("default/api/one", 1)).await.unwrap_err();
    assert_eq!(foreign.code(), Code::PermissionDenied);

    mesh.advance(Duration::from_secs(3_601));
    let ended = back().await.report_health(health("default/web/one", 3)).await.unwrap_err();
    assert_eq!(ended.code(), Code::Unauthenticated);
}
