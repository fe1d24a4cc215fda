//! Join tokens and leaves.

use crate::support::{Joiner, TestMesh, declare, spoiled};
use std::time::Duration;
use tokio::task::JoinSet;
use weft_client::{CallError, command};
use weft_identity::spiffe::Subject;
use weft_proto::v1 as pb;
use weft_proto::v1::identity_client::IdentityClient;

fn refusal(result: Result<weft_identity::credential::Credential, CallError>) -> String {
    match result {
        Err(error @ (CallError::Rejected { .. } | CallError::Invalid { .. })) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn of_many_joins_with_one_token_one_gets_a_leaf() {
    let mesh = TestMesh::start().await;
    mesh.apply(vec![declare("default/api", 80)]).await;
    let token = mesh.token("default/api").await;
    let mut joins = JoinSet::new();
    for n in 0..64 {
        let (joiner, channel) = (Joiner::new(&token, &format!("default/api/api-{n}")), mesh.stranger());
        joins.spawn(async move { joiner.join(channel).await });
    }
    let mut leaves = 0;
    while let Some(result) = joins.join_next().await {
        match result.unwrap() {
            Ok(_) => leaves += 1,
            Err(CallError::Rejected { message, .. }) => {
                assert!(message.contains("already used"), "{message}");
            }
            // Sixty-four competitors for one scope: who lost every attempt is told to come back.
            Err(CallError::Overloaded(_)) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(leaves, 1);
    let issued = mesh.reader().read(weft_model::Position::ZERO, 1_000).await.unwrap();
    assert_eq!(issued.iter().filter(|event| event.event_type == "LeafIssued").count(), 1);
    mesh.controller.stop().await;
}

#[tokio::test]
async fn tokens_are_good_once_in_time_and_for_whom_they_were_made() {
    let mesh = TestMesh::start().await;
    mesh.apply(vec![declare("default/api", 80), declare("default/db", 5432)]).await;
    let token = mesh.token("default/api").await;

    let elsewhere = Joiner::new(&token, "default/db/db-1").join(mesh.stranger()).await;
    assert!(refusal(elsewhere).contains("not for default/db/db-1"));
    let guessed = Joiner::new(&spoiled(&token), "default/api/api-1").join(mesh.stranger()).await;
    assert!(refusal(guessed).contains("not known"));
    let nonsense = Joiner::new("weft1.x", "default/api/api-1").join(mesh.stranger()).await;
    assert!(refusal(nonsense).contains("weft token create"));

    let leaf = Joiner::new(&token, "default/api/api-1").join(mesh.stranger()).await.unwrap();
    assert_eq!(leaf.spiffe_id().to_string(), "spiffe://weft.test/ns/default/svc/api/inst/api-1");
    let again = Joiner::new(&token, "default/api/api-1").join(mesh.stranger()).await;
    assert!(refusal(again).contains("already used by default/api/api-1"));

    let late = mesh.token("default/api").await;
    mesh.advance(Duration::from_secs(61));
    let expired = Joiner::new(&late, "default/api/api-2").join(mesh.stranger()).await;
    assert!(refusal(expired).contains("expired"));
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_join_whose_answer_was_lost_is_answered_again_for_the_same_key_only() {
    let mesh = TestMesh::start().await;
    mesh.apply(vec![declare("default/api", 80)]).await;
    let token = mesh.token("default/api").await;
    let joiner = Joiner::new(&token, "default/api/api-1");
    let first = joiner.join(mesh.stranger()).await.unwrap();
    let second = joiner.join(mesh.stranger()).await.unwrap();
    assert_eq!(first.identity().public_key_sha256, second.identity().public_key_sha256);
    assert_ne!(first.identity().serial, second.identity().serial);

    let mut thief = Joiner::new(&token, "default/api/api-1");
    thief.request.meta = joiner.request.meta.clone();
    assert!(refusal(thief.join(mesh.stranger()).await).contains("command_id"));

    let events = mesh.reader().read(weft_model::Position::ZERO, 1_000).await.unwrap();
    let count = |name: &str| events.iter().filter(|event| event.event_type == name).count();
    assert_eq!((count("JoinTokenRedeemed"), count("LeafIssued")), (1, 2));
    mesh.controller.stop().await;
}

#[tokio::test]
async fn a_leaf_is_renewed_for_its_holder_and_recorded() {
    let mesh = TestMesh::start().await;
    let instance = "default/api/api-1";
    let key = weft_identity::key::LeafKey::generate().unwrap();
    let request = pb::RenewRequest {
        meta: Some(command("test")),
        csr: key.csr_der().unwrap().into(),
        ..Default::default()
    };
    let answer = IdentityClient::new(mesh.sidecar(instance)).renew(request).await.unwrap().into_inner();
    let roots = answer.roots.iter().map(|root| root.to_vec().into()).collect();
    let renewed =
        weft_identity::credential::Credential::new(answer.chain[0].to_vec().into(), key, roots).unwrap();
    assert_eq!(renewed.spiffe_id().subject, Subject::Instance(instance.parse().unwrap()));
    assert_eq!(renewed.expires_at().0, answer.not_after_ms);
    let events = mesh.reader().read(weft_model::Position::ZERO, 1_000).await.unwrap();
    let last = events.last().unwrap();
    assert_eq!((last.event_type.as_str(), last.scope.as_str()), ("LeafIssued", "identity/default/api/api-1"));
    assert!(last.payload.contains(&renewed.identity().serial));
    mesh.controller.stop().await;
}

#[tokio::test]
async fn who_slept_through_the_end_of_its_leaf_renews_it_with_its_key_for_some_days() {
    let mesh = TestMesh::start().await;
    mesh.apply(vec![declare("default/api", 80)]).await;
    let token = mesh.token("default/api").await;
    let slept = Joiner::new(&token, "default/api/api-1").join(mesh.stranger()).await.unwrap();
    let renew = async |csr: Vec<u8>, ended_leaf: Vec<u8>| {
        let request =
            pb::RenewRequest { meta: Some(command("test")), csr: csr.into(), ended_leaf: ended_leaf.into() };
        IdentityClient::new(mesh.stranger()).renew(request).await.map_err(CallError::from)
    };
    let (csr, leaf) = (slept.key().csr_der().unwrap(), slept.leaf().to_vec());

    mesh.advance(Duration::from_secs(2 * 60 * 60));
    let answer = renew(csr.clone(), leaf.clone()).await.unwrap().into_inner();
    let fresh = weft_identity::credential::Credential::new(
        answer.chain[0].to_vec().into(),
        slept.key().clone(),
        slept.roots().to_vec(),
    );
    assert_eq!(fresh.unwrap().spiffe_id(), slept.spiffe_id());

    let other = weft_identity::key::LeafKey::generate().unwrap().csr_der().unwrap();
    let refused = async |csr, leaf| renew(csr, leaf).await.unwrap_err().to_string();
    assert!(refused(other, leaf.clone()).await.contains("not for the certificate's key"));
    assert!(refused(csr.clone(), vec![0; 64]).await.contains("not a leaf of the mesh"));
    let elsewhere = mesh.credential(&Subject::Instance("default/api/never-joined".parse().unwrap()));
    let unknown = refused(elsewhere.key().csr_der().unwrap(), elsewhere.leaf().to_vec()).await;
    assert!(unknown.contains("join with a token"), "{unknown}");

    mesh.advance(Duration::from_secs(4 * 24 * 60 * 60));
    assert!(refused(csr, leaf).await.contains("join again with a new token"));
    mesh.controller.stop().await;
}
