//! Handshakes between real configurations, in memory and once over loopback. What bad certificates do is in
//! `bad_certificates.rs`, who may resume in `resume.rs`.

mod bad_certificates;
mod resume;

use super::*;
use crate::ca::{CertificateAuthority, LEAF_LIFETIME};
use crate::fixture::{API, CONTROLLER, Clock, DB, NOW, authority, credential, handshake, subject};
use rustls::{NamedGroup, ProtocolVersion, RootCertStore};
use rustls_pki_types::ServerName;
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use weft_model::id::InstanceId;
use weft_model::time::Timestamp;

const ALPN: &[&[u8]] = &[b"weft/1"];
const OPERATOR: &str = "spiffe://weft.test/operator/admin/ann";

fn tls(credential: Credential) -> TlsIdentity {
    TlsIdentity::with_clock(credential, Clock::at(NOW))
}

fn instance(id: &str) -> InstanceId {
    id.parse::<SpiffeId>().unwrap().as_instance().unwrap().clone()
}

fn server(identity: &TlsIdentity) -> Arc<ServerConfig> {
    identity.server_config(ClientAuth::Required, ExpectedPeer::AnyInstance, ALPN)
}

fn client_for(identity: &TlsIdentity, id: &str) -> Arc<ClientConfig> {
    identity.client_config(ExpectedPeer::instance(instance(id)), ALPN)
}

#[test]
fn two_instances_know_each_other_and_speak_the_newest_tls() {
    let authority = authority();
    let (api, db) = (tls(credential(&authority, API)), tls(credential(&authority, DB)));
    let done = handshake(&client_for(&api, DB), &server(&db));
    let (client, server) = (done.client.unwrap(), done.server.unwrap());

    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    let group = client.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::X25519MLKEM768);
    assert_eq!(client.alpn_protocol(), Some(b"weft/1".as_slice()));
    assert_eq!(peer_identity(client.peer_certificates()).unwrap().unwrap().id.to_string(), DB);
    assert_eq!(peer_identity(server.peer_certificates()).unwrap().unwrap().id.to_string(), API);
    assert_eq!(client.peer_certificates().unwrap().len(), 1, "an instance sends its leaf alone");
}

#[test]
fn each_expectation_admits_its_own_kind_alone() {
    let authority = authority();
    let api = tls(credential(&authority, API));
    let one_of = |ids: &[&str]| ExpectedPeer::OneOf(ids.iter().map(|id| instance(id)).collect());
    for (expected, admitted) in [
        (ExpectedPeer::AnyInstance, [true, true, false, false]),
        (ExpectedPeer::Controller, [false, false, true, false]),
        (ExpectedPeer::Any, [true, true, true, true]),
        (one_of(&[API]), [true, false, false, false]),
        (one_of(&[API, DB]), [true, true, false, false]),
        (ExpectedPeer::OneOf(BTreeSet::new()), [false, false, false, false]),
    ] {
        for (id, admitted) in [API, DB, CONTROLLER, OPERATOR].into_iter().zip(admitted) {
            let peer = tls(credential(&authority, id));
            let dialled = handshake(
                &api.client_config(expected.clone(), ALPN),
                &peer.server_config(ClientAuth::Required, ExpectedPeer::Any, ALPN),
            );
            let accepted = handshake(
                &peer.client_config(ExpectedPeer::Any, ALPN),
                &api.server_config(ClientAuth::Required, expected.clone(), ALPN),
            );
            for result in [dialled.client.map(|_| ()), accepted.server.map(|_| ())] {
                let fault = result.as_ref().err().map(HandshakeFault::of_rustls);
                let wanted = (!admitted).then_some(HandshakeFault::PeerWrongIdentity);
                assert_eq!(fault, wanted, "{expected} and {id}");
            }
        }
    }
}

#[test]
fn an_impostor_with_a_valid_leaf_of_another_service_is_refused_by_name() {
    let authority = authority();
    let (api, impostor) = (tls(credential(&authority, API)), tls(credential(&authority, API)));
    let done = handshake(&client_for(&api, DB), &server(&impostor));
    let error = done.client.unwrap_err();
    let rejection = PeerRejection::of_rustls(&error).unwrap();
    assert_eq!(rejection.to_string(), format!("the peer is {API}, not default/db/db-1"));
    assert_eq!(HandshakeFault::of_rustls(&done.server.unwrap_err()), HandshakeFault::OwnRefused);
}

#[test]
fn dates_fail_with_a_fault_of_their_own_on_both_sides() {
    let authority = authority();
    let clock = Clock::at(NOW);
    let api = TlsIdentity::with_clock(credential(&authority, API), clock.clone());
    let long = authority.issue_credential(&subject(DB), NOW, LEAF_LIFETIME * 24).unwrap();
    let db = TlsIdentity::with_clock(long, clock.clone());
    let backdated = Timestamp(NOW.0 - 299_000);
    let end = NOW.after(LEAF_LIFETIME);

    for now in [backdated, NOW, end] {
        clock.set(now);
        assert!(handshake(&client_for(&api, DB), &server(&db)).server.is_ok(), "{now:?}");
    }
    for (now, fault) in [
        (end.after(Duration::from_secs(1)), HandshakeFault::PeerExpired),
        (Timestamp(NOW.0 - 301_000), HandshakeFault::PeerNotYetValid),
    ] {
        // The dialling side judges by a clock that accepts the server, so that it is its own leaf that fails.
        let tolerant = TlsIdentity { source: api.source.clone(), clock: Clock::at(NOW) };
        clock.set(now);
        let done = handshake(&client_for(&tolerant, DB), &server(&db));
        assert_eq!(HandshakeFault::of_rustls(&done.server.unwrap_err()), fault);
        let own = HandshakeFault::of_rustls(&done.client.unwrap_err());
        assert_eq!(own, HandshakeFault::OwnExpired);
        assert!(fault.is_expiry() && own.is_expiry());
    }
}

#[test]
fn who_has_expired_still_reaches_a_controller_as_nobody() {
    let authority = authority();
    let clock = Clock::at(NOW);
    let api = TlsIdentity::with_clock(credential(&authority, API), clock.clone());
    let lifetime = LEAF_LIFETIME * 24;
    let controller = authority.issue_credential(&subject(CONTROLLER), NOW, lifetime).unwrap();
    let controller = TlsIdentity::with_clock(controller, clock.clone());
    let server = controller.server_config(ClientAuth::Optional, ExpectedPeer::Any, ALPN);
    clock.set(NOW.after(LEAF_LIFETIME * 2));

    let done = handshake(&api.client_config(ExpectedPeer::Controller, ALPN), &server);
    assert_eq!(HandshakeFault::of_rustls(&done.server.unwrap_err()), HandshakeFault::PeerExpired);
    let done = handshake(&api.anonymous_client_config(ExpectedPeer::Controller, ALPN), &server);
    assert_eq!(peer_identity(done.server.unwrap().peer_certificates()), Ok(None));
    // It is still picky about whom it talks to.
    let db = TlsIdentity::with_clock(credential(&authority, DB), Clock::at(NOW));
    let impostor = db.server_config(ClientAuth::Optional, ExpectedPeer::Any, ALPN);
    assert!(
        handshake(&api.anonymous_client_config(ExpectedPeer::Controller, ALPN), &impostor).client.is_err()
    );
}

#[test]
fn the_next_handshake_uses_the_renewed_leaf() {
    let authority = authority();
    let (api, db) = (tls(credential(&authority, API)), tls(credential(&authority, DB)));
    let (client, server) = (client_for(&api, DB), server(&db));
    let serials = || {
        let done = handshake(&client, &server);
        let serial = |certificates| peer_identity(certificates).unwrap().unwrap().serial;
        (serial(done.server.unwrap().peer_certificates()), serial(done.client.unwrap().peer_certificates()))
    };
    let before = serials();
    assert_eq!(serials(), before);
    api.replace(credential(&authority, API)).unwrap();
    let renewed = serials();
    assert_ne!(renewed.0, before.0);
    assert_eq!(renewed.1, before.1);
    db.replace(credential(&authority, DB)).unwrap();
    assert_ne!(serials().1, before.1);

    let refused = api.replace(credential(&authority, DB)).unwrap_err();
    assert_eq!((refused.current.to_string(), refused.offered.to_string()), (API.into(), DB.into()));
    assert_eq!(serials().0, renewed.0);
}

#[test]
fn roots_rotate_in_two_phases_without_a_failed_handshake() {
    let (old, new) = (authority(), authority());
    let both = || vec![old.root().clone(), new.root().clone()];
    let (api, db) = (tls(credential(&old, API)), tls(credential(&old, DB)));
    let (client, server) = (client_for(&api, DB), server(&db));
    let works = || {
        let done = handshake(&client, &server);
        done.client.is_ok() && done.server.is_ok()
    };
    let step = |identity: &TlsIdentity, credential: Credential| {
        identity.replace(credential).unwrap();
        assert!(works());
    };

    // First everybody trusts both roots, then everybody gets a leaf of the new one, then the old one goes.
    for identity in [&api, &db] {
        step(identity, identity.current().with_roots(both()).unwrap());
    }
    for (identity, id) in [(&api, API), (&db, DB)] {
        step(identity, credential(&new, id).with_roots(both()).unwrap());
    }
    for identity in [&api, &db] {
        step(identity, identity.current().with_roots(vec![new.root().clone()]).unwrap());
    }

    // Whoever slept through it is a stranger now.
    api.replace(credential(&old, API)).unwrap();
    assert!(!works());
}

#[test]
fn a_server_may_let_clients_come_without_a_certificate() {
    let authority = authority();
    let controller = tls(credential(&authority, CONTROLLER));
    let optional = controller.server_config(ClientAuth::Optional, ExpectedPeer::Any, ALPN);
    let required = controller.server_config(ClientAuth::Required, ExpectedPeer::Any, ALPN);
    let joiner = join_config_with_clock(authority.root_fingerprint(), ALPN, Clock::at(NOW));

    let done = handshake(&joiner, &optional);
    assert_eq!(peer_identity(done.server.unwrap().peer_certificates()), Ok(None));
    assert_eq!(
        peer_identity(done.client.unwrap().peer_certificates()).unwrap().unwrap().id.to_string(),
        CONTROLLER
    );

    let done = handshake(&joiner, &required);
    assert_eq!(HandshakeFault::of_rustls(&done.server.unwrap_err()), HandshakeFault::PeerUntrusted);
    assert_eq!(HandshakeFault::of_rustls(&done.client.unwrap_err()), HandshakeFault::OwnRefused);

    // A certificate that is sent is checked all the same.
    let stranger = tls(credential(&self::authority(), API));
    let blind = client_that_trusts(&authority, &stranger);
    let done = handshake(&blind, &optional);
    assert_eq!(HandshakeFault::of_rustls(&done.server.unwrap_err()), HandshakeFault::PeerUntrusted);
}

/// A client with the identity of one mesh that trusts the root of another.
fn client_that_trusts(authority: &CertificateAuthority, identity: &TlsIdentity) -> Arc<ClientConfig> {
    let mut config = ClientConfig::clone(&identity.client_config(ExpectedPeer::Any, ALPN));
    let trusting = tls(credential(authority, API));
    let verifier = ServerVerifier::Member { source: trusting.source, expected: ExpectedPeer::Any };
    config.dangerous().set_certificate_verifier(Arc::new(verifier));
    Arc::new(config)
}

#[test]
fn a_joiner_talks_only_to_the_controller_that_its_token_names() {
    let (ours, theirs) = (authority(), authority());
    let join = |root, identity: Credential| {
        let server = tls(identity).server_config(ClientAuth::Optional, ExpectedPeer::Any, ALPN);
        let done = handshake(&join_config_with_clock(root, ALPN, Clock::at(NOW)), &server);
        done.client.map(|_| ())
    };
    let root = ours.root_fingerprint();
    join(root, credential(&ours, CONTROLLER)).unwrap();
    // In the middle of a rotation a controller presents both roots.
    let rotating =
        credential(&ours, CONTROLLER).with_roots(vec![theirs.root().clone(), ours.root().clone()]).unwrap();
    join(root, rotating).unwrap();

    let missing = PeerRejection::PinnedRootMissing { root };
    for stranger in [credential(&theirs, CONTROLLER), credential(&ours, API), credential(&ours, OPERATOR)] {
        let error = join(root, stranger).unwrap_err();
        assert_eq!(PeerRejection::of_rustls(&error), Some(&missing));
    }
    // The right root beside a leaf that it did not sign: what an attacker would send, since roots are public.
    let parading =
        credential(&theirs, CONTROLLER).with_roots(vec![theirs.root().clone(), ours.root().clone()]).unwrap();
    let error = join(root, parading).unwrap_err();
    assert_eq!(HandshakeFault::of_rustls(&error), HandshakeFault::PeerUntrusted);
    assert_eq!(PeerRejection::of_rustls(&error), None);
}

#[test]
fn older_tls_is_refused() {
    let authority = authority();
    let (api, db) = (tls(credential(&authority, API)), tls(credential(&authority, DB)));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());

    let mut roots = RootCertStore::empty();
    roots.add(authority.root().clone()).unwrap();
    let old_client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_cert_resolver(api.source.clone());
    let done = handshake(&Arc::new(old_client), &server(&db));
    assert_eq!(HandshakeFault::of_rustls(&done.server.unwrap_err()), HandshakeFault::Protocol);
    assert_eq!(HandshakeFault::of_rustls(&done.client.unwrap_err()), HandshakeFault::Protocol);

    let old_server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(db.source.clone());
    let done = handshake(&client_for(&api, DB), &Arc::new(old_server));
    assert!(done.client.is_err() && done.server.is_err());
}

#[test]
fn among_sidecars_nothing_is_resumed() {
    let authority = authority();
    let (api, db) = (tls(credential(&authority, API)), tls(credential(&authority, DB)));
    let (client, server) = (client_for(&api, DB), server(&db));
    for _ in 0..3 {
        let client = handshake(&client, &server).client.unwrap();
        assert_eq!(client.tls13_tickets_received(), 0);
        assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
}

#[test]
fn without_a_common_application_protocol_there_is_no_connection() {
    let authority = authority();
    let (api, db) = (tls(credential(&authority, API)), tls(credential(&authority, DB)));
    let client = api.client_config(ExpectedPeer::Any, &[b"h2"]);
    let done = handshake(&client, &server(&db));
    assert_eq!(HandshakeFault::of_rustls(&done.server.unwrap_err()), HandshakeFault::Protocol);
    // A standard client that offers none is served: the port also speaks plain mTLS.
    let plain = handshake(&api.client_config(ExpectedPeer::Any, &[]), &server(&db));
    assert_eq!(plain.server.unwrap().alpn_protocol(), None);
}

#[test]
fn no_text_shows_a_key() {
    let identity = tls(credential(&authority(), API));
    let text = format!("{identity:?} {:?} {:?}", server(&identity), client_for(&identity, DB));
    let credential = identity.current();
    let dir = tempfile::tempdir().unwrap();
    credential.save(dir.path()).unwrap();
    let file = std::fs::read(dir.path().join(crate::credential::CREDENTIAL_FILE)).unwrap();
    let der = crate::pem::private_key(&file).unwrap();
    // The secret number of a P-256 key in PKCS#8 starts at byte 36.
    let secret = &der.secret_pkcs8_der()[36..68];
    assert!(!text.contains(&hex::encode(secret)) && !text.contains(&format!("{secret:?}")));
    assert!(text.contains(API));
}

#[tokio::test]
async fn bytes_cross_a_real_socket_and_faults_are_read_from_it() {
    let authority = authority();
    let (api, db) = (tls(credential(&authority, API)), tls(credential(&authority, DB)));
    let (listener, name) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), "db.default");
    let address = listener.local_addr().unwrap();
    let name = ServerName::try_from(name).unwrap();
    let acceptor = TlsAcceptor::from(server(&db));

    let connect = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut stream =
            TlsConnector::from(client_for(&api, DB)).connect(name.clone(), stream).await.unwrap();
        stream.write_all(b"select 1").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let accept = async {
        let mut stream = acceptor.accept(listener.accept().await.unwrap().0).await.unwrap();
        let mut question = String::new();
        stream.read_to_string(&mut question).await.unwrap();
        stream.write_all(question.to_uppercase().as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
    };
    assert_eq!(tokio::join!(connect, accept).0, "SELECT 1");

    // An operator is no instance: the server refuses it, and the client learns so from its first read.
    let operator = tls(credential(&authority, OPERATOR));
    let connect = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut stream = TlsConnector::from(client_for(&operator, DB)).connect(name, stream).await.unwrap();
        HandshakeFault::of_io(&stream.read_u8().await.unwrap_err())
    };
    let accept = async {
        let error = acceptor.accept(listener.accept().await.unwrap().0).await.unwrap_err();
        assert!(matches!(PeerRejection::of_io(&error), Some(PeerRejection::Identity { .. })));
        HandshakeFault::of_io(&error)
    };
    let faults = tokio::join!(connect, accept);
    assert_eq!(faults, (HandshakeFault::OwnRefused, HandshakeFault::PeerWrongIdentity));

    let reset = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    assert_eq!(HandshakeFault::of_io(&reset), HandshakeFault::Io);
}
