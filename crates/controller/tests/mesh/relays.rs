//! Several sidecars on one connection.

use crate::support::{TestMesh, health, register};
use std::time::Duration;
use tonic::Code;
use weft_client::CallError;
use weft_identity::credential::Credential;
use weft_identity::spiffe::Subject;
use weft_proto::v1 as pb;
use weft_proto::v1::discovery_client::DiscoveryClient;
use weft_proto::v1::mesh_client::MeshClient;

fn credential(mesh: &TestMesh, instance: &str) -> Credential {
    mesh.credential(&Subject::Instance(instance.parse().unwrap()))
}

#[tokio::test]
async fn each_sidecar_on_a_relay_s_connection_speaks_for_itself_alone() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api", "default/web"]).await;
    mesh.apply(vec![register("default/api/two", 9001)]).await;
    mesh.projected().await;
    let relay = mesh.relay("default/web/one").await;
    let one = relay.introduce(&credential(&mesh, "default/api/one")).await.unwrap();
    let two = relay.introduce(&credential(&mesh, "default/api/two")).await.unwrap();

    // Each gets its own notices, its own snapshot and no other, and observes only itself.
    for channel in [&one, &two] {
        let mut discovery = DiscoveryClient::new(channel.clone());
        let mut notices = discovery.subscribe(pb::SubscribeRequest::default()).await.unwrap().into_inner();
        assert!(notices.message().await.unwrap().unwrap().wanted.is_some());
        let pulled = discovery.pull(pb::PullRequest::default()).await.unwrap().into_inner();
        assert!(pulled.shards.iter().any(|shard| shard.key == "inbound/default/api"));
        assert!(!pulled.shards.iter().any(|shard| shard.key == "inbound/default/web"));
    }
    MeshClient::new(two.clone()).report_health(health("default/api/two", 1)).await.unwrap();
    let foreign = MeshClient::new(one).report_health(health("default/api/two", 2)).await.unwrap_err();
    assert_eq!(foreign.code(), Code::PermissionDenied);

    // The relay itself is still who its leaf says.
    let own = MeshClient::new(relay.own());
    own.clone().report_health(health("default/web/one", 1)).await.unwrap();
    let foreign = own.clone().report_health(health("default/api/one", 1)).await.unwrap_err();
    assert_eq!(foreign.code(), Code::PermissionDenied);

    // A number is of its connection.
    let elsewhere = mesh.relay("default/web/one").await;
    elsewhere.introduce(&credential(&mesh, "default/web/one")).await.unwrap();
    let mut stray = tonic::Request::new(health("default/api/two", 3));
    stray.metadata_mut().insert("weft-as", "1".parse().unwrap());
    let nobody = MeshClient::new(elsewhere.own()).report_health(stray).await.unwrap_err();
    assert_eq!(nobody.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn an_introduction_needs_a_leaf_that_is_good_now() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api"]).await;
    let relay = mesh.relay("default/api/one").await;
    let two = credential(&mesh, "default/api/two");
    relay.introduce(&two).await.unwrap();
    mesh.advance(Duration::from_secs(7_200));
    // Neither the one that ended meanwhile, nor the relay, nor anybody else.
    let refused = relay.introduce(&two).await.unwrap_err();
    assert!(matches!(&refused, CallError::Denied(_)), "{refused}");
}

#[tokio::test]
async fn a_sidecar_has_no_more_than_some_streams() {
    let mesh = TestMesh::start().await;
    mesh.declare(&["default/api"]).await;
    let mut discovery = DiscoveryClient::new(mesh.sidecar("default/api/one"));
    let mut streams = Vec::new();
    let refused = loop {
        match discovery.subscribe(pb::SubscribeRequest::default()).await {
            Ok(stream) => streams.push(stream),
            Err(refused) => break refused,
        }
        assert!(streams.len() <= 64, "no bound");
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    // Their end makes room.
    drop(streams);
    crate::support::wait_until("room for a stream", crate::support::LIMIT, async || {
        discovery.subscribe(pb::SubscribeRequest::default()).await.is_ok()
    })
    .await;
}
