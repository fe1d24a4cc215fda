//! Who is believed: only the instance that was chosen, only members of the mesh, only while their leaves last.

use crate::support::app::ping;
use crate::support::controller::{Call, now};
use crate::support::tunnel::{connect, data, end, exchange, open};
use crate::support::{App, Controller, LIMIT, Sidecar};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use weft_testkit::wait_until;

async fn serving() -> (Controller, App, Sidecar) {
    let app = App::echo().await;
    let controller = Controller::start();
    for service in ["default/db", "default/web", "default/evil"] {
        controller.declare(service, &[5432]);
    }
    controller.allow("default/db", &["default/web"]);
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    (controller, app, db)
}

#[tokio::test]
async fn an_address_with_another_sidecar_behind_it_is_refused() {
    let (controller, app, db) = serving().await;
    let evil = Sidecar::serving(&controller, "default/evil/evil-1", 5432, app.address).await;
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    controller.pretend("default/db/db-2", evil.inbound);
    let gone = weft_model::membership::MembershipCommand::Deregister;
    controller.commit(weft_model::Command::Membership("default/db/db-1".parse().unwrap(), gone));
    web.runs(controller.wanted("default/web/web-1")).await;
    web.refuses("default/db", 5432).await;
    let record = web.record("tls_failed").await;
    let detail = record["detail"].as_str().unwrap();
    assert!(detail.starts_with("peer_wrong_identity"), "{detail}");
    assert!(detail.contains("evil-1") && detail.contains("db-2"), "{detail}");
    assert_eq!(evil.record("tls_failed").await["closed_by"], "client");
    drop(db);
}

#[tokio::test]
async fn strangers_do_not_get_in() {
    let (controller, _app, db) = serving().await;
    let mut roots = RootCertStore::empty();
    roots.add(controller.inner.ca.root().clone()).unwrap();
    for versions in [&[&rustls::version::TLS12], &[&rustls::version::TLS13]] {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(danger::Anybody))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"weft/1".to_vec()];
        let stream = TcpStream::connect(db.inbound).await.unwrap();
        let name = ServerName::try_from("db.default").unwrap();
        let failed = match TlsConnector::from(Arc::new(config)).connect(name, stream).await {
            Err(_) => true,
            // In TLS 1.3 a client hears of its refusal only afterwards.
            Ok(mut tunnel) => exchange(&mut tunnel, &open("default/db", 5432)).await.is_err(),
        };
        assert!(failed, "{versions:?}");
    }
    wait_until("two records", LIMIT, async || db.records().len() == 2).await;
    assert!(db.records().iter().all(|record| record["close_reason"] == "tls_failed"), "{:?}", db.records());

    // A member of another mesh of the same name.
    let other = Controller::start();
    let result = connect(db.inbound, other.credential("default/web/web-1"), &[b"weft/1"]).await;
    assert!(result.is_err());
}

#[tokio::test]
async fn a_hand_made_tunnel_follows_the_document() {
    let (controller, _app, db) = serving().await;
    let credential = || controller.credential("default/web/web-9");
    let alpn: &[&[u8]] = &[b"weft/1"];

    let mut tunnel = connect(db.inbound, credential(), alpn).await.unwrap();
    assert!(exchange(&mut tunnel, &open("default/db", 5432)).await.unwrap().opened.is_some());

    for (frame, reason) in
        [(open("default/web", 5432), "no_snapshot"), (open("default/db", 9), "no_snapshot")]
    {
        let mut tunnel = connect(db.inbound, credential(), alpn).await.unwrap();
        let refused = exchange(&mut tunnel, &frame).await.unwrap().refused.unwrap();
        assert_eq!(refused.reason, reason);
        assert!(refused.version.unwrap().position > 0);
    }
    for nonsense in [open("no service name", 5432), open("default/db", 70_000), end(), data(b"!")] {
        let mut tunnel = connect(db.inbound, credential(), alpn).await.unwrap();
        assert!(exchange(&mut tunnel, &nonsense).await.is_err());
    }
    // Without the protocol it is a standard client, and has to ask for the service by its whole name.
    assert!(connect(db.inbound, credential(), &[b"h2"]).await.is_err());
    let unknown = connect(db.inbound, controller.credential("default/evil/evil-1"), alpn).await;
    let refused = exchange(&mut unknown.unwrap(), &open("default/db", 5432)).await.unwrap().refused.unwrap();
    assert_eq!(
        (refused.reason.as_str(), refused.rule.as_str()),
        ("policy_denied", "security/default/db#default")
    );
}

#[tokio::test]
async fn a_new_leaf_does_not_disturb_connections() {
    let (controller, _app, _db) = serving().await;
    controller.state().leaf_lifetime = Duration::from_secs(3);
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    let joined = now();
    let mut client = web.connect("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    let before = web.json("/config").await["leaf"]["serial"].clone();
    wait_until("a renewed leaf, after the first one has ended", LIMIT, async || {
        let renewed = controller.calls().iter().any(|call| matches!(call, Call::Renewed(_)));
        renewed && now() > joined.after(Duration::from_secs(4))
    })
    .await;
    ping(&mut client).await.unwrap();
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    assert_ne!(web.json("/config").await["leaf"]["serial"], before);
    assert_eq!(web.page("/ready").await.0, 200);
    // The stream of notices, too, is opened again with the new leaf.
    let web_1: weft_model::InstanceId = "default/web/web-1".parse().unwrap();
    wait_until("another stream", LIMIT, async || {
        controller.count(|call| *call == Call::Subscribed(web_1.clone())) >= 2
    })
    .await;
}

#[tokio::test]
async fn a_leaf_that_cannot_be_kept_is_used_all_the_same() {
    let (controller, _app, _db) = serving().await;
    controller.state().leaf_lifetime = Duration::from_secs(2);
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    let before = web.json("/config").await["leaf"]["serial"].clone();
    let dir = web.state_dir().join("identity");
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::write(&dir, "in the way").unwrap();
    controller.state().leaf_lifetime = Duration::from_secs(60);
    web.config_is("a renewed leaf", |config| config["leaf"]["serial"] != before).await;
    assert_eq!(
        controller.count(|call| matches!(call, Call::Renewed(by) if by.to_string() == "default/web/web-1")),
        1
    );
}

#[tokio::test]
async fn a_mesh_that_was_made_anew_is_joined_with_its_token() {
    let (old, _app, mut db) = serving().await;
    let ahead = old.wanted("default/db/db-1");
    db.stop().await;
    let new = Controller::start();
    new.declare("default/db", &[5432]);
    let again = db
        .again_with(|config| {
            config.controllers = vec![new.address.to_string().parse().unwrap()];
            config.join_token = Some(new.token("default/db/db-1"));
        })
        .await;
    again.ready().await;
    let wanted = new.wanted("default/db/db-1");
    assert!(wanted < ahead, "the old mesh's snapshot would be newer");
    again.runs(wanted).await;
}

#[tokio::test]
async fn an_expired_leaf_opens_nothing_and_ends_nothing() {
    let (controller, _app, _db) = serving().await;
    controller.script(|state| {
        state.leaf_lifetime = Duration::from_secs(2);
        state.refuse_renewals = true;
    });
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    let mut client = web.connect("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    wait_until("an expired leaf", LIMIT, async || web.page("/ready").await.0 == 503).await;
    assert!(web.page("/ready").await.1.contains("expired"));
    web.refuses("default/db", 5432).await;
    assert_eq!(web.record("cert_expired").await["closed_by"], "local");
    ping(&mut client).await.unwrap();

    // Nobody has to help it: the ended leaf and its key are enough for the controller, once it renews again.
    controller.script(|state| {
        state.leaf_lifetime = Duration::from_secs(60);
        state.refuse_renewals = false;
    });
    web.ready().await;
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    ping(&mut client).await.unwrap();
}

mod danger {
    //! A client that believes any server, to be judged itself.

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    #[derive(Debug)]
    pub(super) struct Anybody;

    impl ServerCertVerifier for Anybody {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ED25519]
        }
    }
}
