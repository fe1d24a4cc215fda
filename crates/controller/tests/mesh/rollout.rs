//! Policies that canaries try first: who gets them, what is heard of it, and how that ends.

use crate::support::{
    LIMIT, TestMesh, allow_from, apply_request, declare, deny_all, discovery, register, wait_until,
};
use std::time::Duration;
use tokio::time::Instant;
use tonic::Code;
use tonic::transport::Channel;
use weft_client::{CallError, command};
use weft_identity::spiffe::Subject;
use weft_projector::verify_rows;
use weft_proto::v1 as pb;
use weft_proto::v1::change::Change as Wire;

const SCOPE: &str = "default/db";

/// A service with so many instances, and one that connects to it.
async fn mesh_of(instances: usize) -> TestMesh {
    let mesh = TestMesh::start().await;
    let names = (0..instances).map(|number| format!("{SCOPE}/i{number}"));
    let registered = names.map(|name| register(&name, 9000));
    let declared = [declare(SCOPE, 80), declare("default/web", 80)];
    mesh.apply(declared.into_iter().chain(registered).collect()).await;
    mesh.apply(vec![register("default/web/one", 9000)]).await;
    mesh
}

fn rollout(changes: Vec<Wire>, share_ppm: u32) -> pb::ApplyRequest {
    let canary = pb::Canary { share_ppm, watch_ms: 5_000, tolerance_ppm: 10_000 };
    pb::ApplyRequest { canary: Some(canary), ..apply_request(changes) }
}

async fn look(mesh: &TestMesh) -> pb::GetRolloutResponse {
    mesh.admin().get_rollout(pb::GetRolloutRequest {}).await.unwrap().into_inner()
}

async fn ended(mesh: &TestMesh, state: &str) -> pb::GetRolloutResponse {
    wait_until(state, LIMIT, async || look(mesh).await.state == state).await;
    look(mesh).await
}

/// Runs the newest snapshot, and says so.
async fn applies(channel: Channel, evidence: Option<pb::Evidence>) -> pb::SnapshotHeader {
    let mut discovery = discovery(channel);
    let header = discovery.pull(pb::PullRequest::default()).await.unwrap().into_inner().header.unwrap();
    let ack = pb::AckRequest { applied: Some(header.clone()), evidence, ..pb::AckRequest::default() };
    discovery.ack(ack).await.unwrap();
    header
}

/// The manifest that an instance is to run; canaries have another one than the rest.
async fn wanted(mesh: &TestMesh, instance: &str) -> Vec<u8> {
    let pulled = discovery(mesh.sidecar(instance)).pull(pb::PullRequest::default()).await.unwrap();
    pulled.into_inner().header.unwrap().manifest_hash.to_vec()
}

#[tokio::test]
async fn what_canaries_meet_no_harm_with_is_given_to_everybody() {
    let mesh = mesh_of(3).await;
    let begun = mesh.admin().apply(rollout(vec![allow_from(SCOPE, "default/web")], 340_000)).await.unwrap();
    let begun = begun.into_inner();
    assert_eq!((begun.outcomes.len(), begun.outcomes[0].scope.as_str()), (1, "rollout"));
    mesh.projected().await;
    let running = look(&mesh).await;
    assert_eq!((running.state.as_str(), running.canaries.len()), ("running", 2));
    assert_eq!(running.scopes, [format!("security/{SCOPE}")]);

    // Canaries, and nobody else, are asked what they meet with.
    let all: Vec<_> = (0..3).map(|number| format!("{SCOPE}/i{number}")).collect();
    let canaries: Vec<_> = running.canaries.iter().map(|canary| canary.instance.clone()).collect();
    let other = all.iter().find(|name| !canaries.contains(name)).unwrap();
    for name in &all {
        let request = pb::SubscribeRequest::default();
        let mut notices = discovery(mesh.sidecar(name)).subscribe(request).await.unwrap().into_inner();
        let notice = notices.message().await.unwrap().unwrap();
        let asked = if canaries.contains(name) { running.position } else { 0 };
        assert_eq!(notice.rollout, asked, "{name}");
    }
    assert_eq!(wanted(&mesh, &canaries[0]).await, wanted(&mesh, &canaries[1]).await);
    assert_ne!(wanted(&mesh, &canaries[0]).await, wanted(&mesh, other).await);

    // What it is about does not change meanwhile; a second one does not begin.
    for request in [apply_request(vec![deny_all(SCOPE)]), rollout(vec![deny_all("default/web")], 1)] {
        let refused = mesh.admin().apply(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    }
    // But whatever else is asked for is done, also beside a policy that stays as it is.
    mesh.apply(vec![deny_all("default/web")]).await;

    // Every canary has to run it, and to say how it goes, for as long as they are watched.
    let met =
        |connections, refused| pb::Evidence { rollout: running.position, connections, refused, failed: 0 };
    for canary in &canaries {
        applies(mesh.sidecar(canary), None).await;
    }
    wait_until("both to run it", LIMIT, async || look(&mesh).await.canaries.iter().all(|it| it.applied))
        .await;
    let applied_at = Instant::now();
    applies(mesh.sidecar(&canaries[0]), Some(met(100, 1))).await;
    applies(mesh.sidecar(&canaries[1]), Some(met(50, 0))).await;
    let advanced = ended(&mesh, "advanced").await;
    assert!(applied_at.elapsed() > Duration::from_secs(4), "they were hardly watched");
    assert_eq!(advanced.summary, "everybody has it, after 150 connections of canaries, 1 refused, 0 failed");
    mesh.projected().await;
    for name in &all {
        assert_eq!(wanted(&mesh, name).await, wanted(&mesh, other).await);
    }

    // One append: the policy, and that everybody has it; by the controller.
    let events = mesh.reader().read(weft_model::Position(advanced.position - 2), 10).await.unwrap();
    let told: Vec<_> = events.iter().map(|event| (event.scope.as_str(), event.event_type.as_str())).collect();
    assert_eq!(told, [("security/default/db", "SecurityPolicySet"), ("rollout", "RolloutAdvanced")]);
    assert!(events.iter().all(|event| event.actor.ends_with("/controller/c1")), "{events:?}");
    assert_eq!(events[0].command_id, events[1].command_id);
    let store = mesh.store();
    assert_eq!(verify_rows(&mesh.reader(), &store, |_| ()).await.unwrap().differences, []);
    store.close().await;
    mesh.controller.stop().await;
}

#[tokio::test]
async fn what_goes_wrong_is_taken_back_whoever_hears_of_it() {
    let mesh = mesh_of(4).await;
    let second = mesh.another("c2").await;
    mesh.admin().apply(rollout(vec![deny_all(SCOPE)], 250_000)).await.unwrap();
    mesh.projected().await;
    let running = look(&mesh).await;
    let [canary] = &running.canaries[..] else { panic!("{running:?}") };

    // It says so to the controller that does not lead, which also shows it in SQL.
    let subject = Subject::Instance(canary.instance.parse().unwrap());
    assert!(second.view().wait_folded(weft_model::Position(running.position), LIMIT).await);
    let there = || mesh.channel_at(&second, &subject);
    let before = applies(there(), None).await.version.unwrap();
    // What is said of another rollout is not believed.
    let met = |rollout, refused| pb::Evidence { rollout, connections: 3, refused, failed: 0 };
    applies(there(), Some(met(running.position - 1, 3))).await;
    applies(there(), Some(met(running.position, 0))).await;
    wait_until("the canary's word", LIMIT, async || look(&mesh).await.canaries[0].connections == 3).await;
    assert_eq!(look(&mesh).await.state, "running");
    applies(there(), Some(met(running.position, 1))).await;
    let aborted = ended(&mesh, "aborted").await;
    let why = format!("of 3 connections of {} 1 were refused", canary.instance);
    assert!(aborted.summary.contains(&why), "{aborted:?}");

    // Nothing ever happened to the scope, and the canary goes back to what everybody runs, by a newer version.
    mesh.projected().await;
    let after = applies(mesh.sidecar(&canary.instance), None).await.version.unwrap();
    assert!(after.position > before.position);
    let policies = pb::GetRequest { kind: pb::Kind::SecurityPolicy.into(), ..Default::default() };
    assert!(mesh.admin().get(policies).await.unwrap().into_inner().resources.is_empty());
    second.stop().await;
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_canary_that_refuses_ends_it_and_so_does_an_operator() {
    let mesh = mesh_of(2).await;
    mesh.admin().apply(rollout(vec![deny_all(SCOPE)], 1_000_000)).await.unwrap();
    let refusal = pb::AckRequest { error: "shard trust\nis missing".into(), ..pb::AckRequest::default() };
    discovery(mesh.sidecar("default/db/i1")).ack(refusal).await.unwrap();
    let aborted = ended(&mesh, "aborted").await;
    assert!(
        aborted.summary.ends_with("default/db/i1 could not apply it: shard trustis missing"),
        "{aborted:?}"
    );

    mesh.admin().apply(rollout(vec![deny_all(SCOPE)], 1_000_000)).await.unwrap();
    let end = || pb::EndRolloutRequest { meta: Some(command("it was a mistake")), position: 0 };
    // Another one than was meant is not ended.
    let stale = pb::EndRolloutRequest { position: aborted.position, ..end() };
    assert_eq!(mesh.admin().advance_rollout(stale).await.unwrap_err().code(), Code::FailedPrecondition);
    mesh.admin().abort_rollout(end()).await.unwrap();
    let aborted = look(&mesh).await;
    assert!(aborted.summary.ends_with(": it was a mistake") && aborted.by.ends_with("/admin"), "{aborted:?}");
    assert_eq!(mesh.admin().abort_rollout(end()).await.unwrap_err().code(), Code::FailedPrecondition);

    mesh.admin().apply(rollout(vec![deny_all(SCOPE)], 1_000_000)).await.unwrap();
    mesh.admin().advance_rollout(end()).await.unwrap();
    assert_eq!(look(&mesh).await.state, "advanced");
    mesh.controller.stop().await;
}

#[tokio::test]
async fn what_cannot_be_tried_is_refused_and_nothing_begins() {
    let mesh = mesh_of(1).await;
    let mut stale = rollout(vec![deny_all(SCOPE)], 1_000_000);
    stale.changes[0].expected = Some(pb::Expected { expected: Some(pb::expected::Expected::Version(7)) });
    stale.changes.insert(0, pb::Change { expected: None, change: Some(deny_all("default/web")) });
    let refused = CallError::from(mesh.admin().apply(stale).await.unwrap_err());
    assert!(
        matches!(&refused, CallError::Conflict { change: Some(1), scope, .. } if scope == "security/default/db"),
        "{refused:?}"
    );
    for (request, why) in [
        (rollout(vec![declare("default/new", 80)], 1), "only traffic and security policies"),
        (rollout(vec![deny_all(SCOPE)], 0), "canary.share"),
        (rollout(vec![deny_all("default/gone")], 1), "not declared"),
    ] {
        let refused = mesh.admin().apply(request).await.unwrap_err();
        assert!(refused.message().contains(why), "{refused}");
    }
    let rehearsed = pb::ApplyRequest { dry_run: true, ..rollout(vec![deny_all(SCOPE)], 1) };
    assert!(mesh.admin().apply(rehearsed).await.unwrap().into_inner().outcomes[0].changed);
    assert_eq!(look(&mesh).await, pb::GetRolloutResponse::default());
    mesh.controller.stop().await;
}
