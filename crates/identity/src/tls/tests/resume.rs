//! Who may resume, and as whom.

use super::{Clock, tls};
use crate::ca::{CertificateAuthority, LEAF_LIFETIME};
use crate::certificate::PeerIdentity;
use crate::credential::Credential;
use crate::fixture::{API, CONTROLLER, Handshake, NOW, authority, credential, handshake, subject};
use crate::introduction::binding;
use crate::tls::{
    ClientAuth, ExpectedPeer, HandshakeFault, ResumingClient, ResumingServer, TlsIdentity,
    join_config_with_clock, peer_identity,
};
use rustls::HandshakeKind::{Full, Resumed};
use rustls::{Error, HandshakeKind, NamedGroup};
use std::sync::Arc;
use std::time::Duration;

const ALPN: &[&[u8]] = &[b"h2"];

fn server_of(identity: &TlsIdentity) -> ResumingServer {
    identity.resuming_server(ClientAuth::Optional, ExpectedPeer::Any, ALPN).unwrap()
}

fn client_of(identity: &TlsIdentity) -> ResumingClient {
    identity.resuming_client(ExpectedPeer::Controller, ALPN)
}

/// What each side says of a connection.
struct Met {
    kind: HandshakeKind,
    client: Result<(), Error>,
    server: Result<Option<PeerIdentity>, Error>,
}

fn meet(client: &ResumingClient, server: &ResumingServer) -> Met {
    let attempt = client.attempt();
    let done = handshake(attempt.config(), server.config());
    let (reached, came) = (done.client.unwrap(), done.server.unwrap());
    assert_eq!(reached.handshake_kind(), came.handshake_kind());
    Met {
        kind: came.handshake_kind().unwrap(),
        client: client.admit(&attempt, &reached),
        server: server.admit(&came),
    }
}

/// Meets, both are content, and the server tells who came how.
fn welcome(client: &ResumingClient, server: &ResumingServer) -> (HandshakeKind, PeerIdentity) {
    let met = meet(client, server);
    met.client.unwrap();
    (met.kind, met.server.unwrap().unwrap())
}

#[test]
fn who_comes_back_resumes_as_who_it_was() {
    let authority = authority();
    let (api, controller) = (tls(credential(&authority, API)), tls(credential(&authority, CONTROLLER)));
    let (client, server) = (client_of(&api), server_of(&controller));
    assert_eq!(welcome(&client, &server), (Full, api.current().identity().clone()));
    let mut bindings = Vec::new();
    for _ in 0..4 {
        let attempt = client.attempt();
        let Handshake { client: reached, server: came } = handshake(attempt.config(), server.config());
        let (reached, came) = (reached.unwrap(), came.unwrap());
        assert_eq!((reached.handshake_kind(), came.handshake_kind()), (Some(Resumed), Some(Resumed)));
        client.admit(&attempt, &reached).unwrap();
        assert_eq!(server.admit(&came).unwrap().as_ref(), Some(api.current().identity()));
        let found = peer_identity(reached.peer_certificates()).unwrap().unwrap();
        assert_eq!(found, *controller.current().identity());
        // A new secret each time, of the hybrid exchange.
        assert_eq!(came.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
        assert_eq!(binding(&reached).unwrap(), binding(&came).unwrap());
        bindings.push(binding(&came).unwrap());
    }
    bindings.sort_unstable();
    bindings.dedup();
    assert_eq!(bindings.len(), 4, "what proves an introduction is of one connection");

    client.forget();
    assert_eq!(welcome(&client, &server).0, Full);
}

#[test]
fn a_renewed_leaf_comes_by_a_whole_handshake_and_the_old_one_s_tickets_are_gone() {
    let authority = authority();
    let (api, controller) = (tls(credential(&authority, API)), tls(credential(&authority, CONTROLLER)));
    let (client, server) = (client_of(&api), server_of(&controller));
    // It began with the old leaf, and ends when there is a new one already.
    let began = client.attempt();
    welcome(&client, &server);
    api.replace(credential(&authority, API)).unwrap();
    handshake(began.config(), server.config()).server.unwrap();
    assert_eq!(welcome(&client, &server), (Full, api.current().identity().clone()));
    assert_eq!(welcome(&client, &server), (Resumed, api.current().identity().clone()));

    // A controller's own leaf is renewed without that anybody has to be checked anew.
    controller.replace(credential(&authority, CONTROLLER)).unwrap();
    assert_eq!(welcome(&client, &server).0, Resumed);
    // A process that starts anew has no old tickets.
    assert_eq!(welcome(&client, &server_of(&controller)).0, Full);
}

fn with_roots(credential: &Credential, roots: &[&CertificateAuthority]) -> Credential {
    credential.with_roots(roots.iter().map(|authority| authority.root().clone()).collect()).unwrap()
}

#[test]
fn no_session_outlives_a_change_of_the_roots() {
    let (old, new) = (authority(), authority());
    let (api, controller) = (tls(credential(&old, API)), tls(credential(&old, CONTROLLER)));
    let (client, server) = (client_of(&api), server_of(&controller));
    welcome(&client, &server);
    assert_eq!(welcome(&client, &server).0, Resumed);

    // The client's.
    api.replace(with_roots(&api.current(), &[&old, &new])).unwrap();
    assert_eq!(welcome(&client, &server).0, Full);
    assert_eq!(welcome(&client, &server).0, Resumed);

    // The server's, to which a connection belongs that has just resumed.
    let resumed = handshake(client.attempt().config(), server.config()).server.unwrap();
    assert_eq!(resumed.handshake_kind(), Some(Resumed));
    controller.replace(with_roots(&credential(&new, CONTROLLER), &[&new, &old])).unwrap();
    server.admit(&resumed).unwrap();
    assert_eq!(welcome(&client, &server).0, Full);
    assert_eq!(welcome(&client, &server).0, Resumed);
    let resumed = handshake(client.attempt().config(), server.config()).server.unwrap();
    assert_eq!(resumed.handshake_kind(), Some(Resumed));
    controller.replace(with_roots(&credential(&new, CONTROLLER), &[&new])).unwrap();
    let refused = HandshakeFault::of_rustls(&server.admit(&resumed).unwrap_err());
    assert_eq!(refused, HandshakeFault::PeerUntrusted);
    let refused = handshake(client.attempt().config(), server.config()).server.unwrap_err();
    assert_eq!(HandshakeFault::of_rustls(&refused), HandshakeFault::PeerUntrusted);
}

#[test]
fn no_session_outlives_the_client_s_leaf() {
    let authority = authority();
    let (clock, slow) = (Clock::at(NOW), Clock::at(NOW));
    let api = TlsIdentity::with_clock(credential(&authority, API), slow.clone());
    let long = authority.issue_credential(&subject(CONTROLLER), NOW, LEAF_LIFETIME * 24).unwrap();
    let controller = TlsIdentity::with_clock(long, clock.clone());
    let (client, server) = (client_of(&api), server_of(&controller));
    welcome(&client, &server);
    clock.set(NOW.after(LEAF_LIFETIME));
    assert_eq!(welcome(&client, &server).0, Resumed);

    // By the server's clock it has ended; the client's own does not know that.
    clock.set(NOW.after(LEAF_LIFETIME + Duration::from_secs(1)));
    let met = meet(&client, &server);
    let refused = HandshakeFault::of_rustls(&met.server.unwrap_err());
    assert_eq!((met.kind, refused), (Resumed, HandshakeFault::PeerExpired));

    // Whose own clock says so does not resume, and is told why.
    slow.set(NOW.after(LEAF_LIFETIME + Duration::from_secs(1)));
    let done = handshake(client.attempt().config(), server.config());
    assert_eq!(HandshakeFault::of_rustls(&done.server.unwrap_err()), HandshakeFault::PeerExpired);
    assert!(done.client.is_err());
}

#[test]
fn no_session_outlives_the_server_s_leaf() {
    let authority = authority();
    let clock = Clock::at(NOW);
    let long = authority.issue_credential(&subject(API), NOW, LEAF_LIFETIME * 24).unwrap();
    let api = TlsIdentity::with_clock(long, clock.clone());
    let controller = TlsIdentity::with_clock(credential(&authority, CONTROLLER), clock.clone());
    let (client, server) = (client_of(&api), server_of(&controller));
    welcome(&client, &server);
    assert_eq!(welcome(&client, &server).0, Resumed);

    // The leaf is renewed when half of its life is over; who resumed a session of the old one then gets to know the new one.
    let leaf = controller.current().identity().clone();
    let later = leaf.not_before.0.midpoint(leaf.not_after.0) + 1_000;
    clock.set(weft_model::time::Timestamp(later));
    assert_eq!(welcome(&client, &server).0, Resumed);
    assert_eq!(welcome(&client, &server).0, Full);

    clock.set(NOW.after(LEAF_LIFETIME + Duration::from_secs(1)));
    let met = meet(&client, &server);
    let refused = HandshakeFault::of_rustls(&met.client.unwrap_err());
    assert_eq!((met.kind, refused), (Resumed, HandshakeFault::PeerExpired));
    let renewed =
        authority.issue_credential(&subject(CONTROLLER), NOW.after(LEAF_LIFETIME), LEAF_LIFETIME).unwrap();
    controller.replace(renewed).unwrap();
    assert_eq!(welcome(&client, &server).0, Full);
}

#[test]
fn whoever_shows_no_leaf_stays_nobody() {
    let authority = authority();
    let controller = tls(credential(&authority, CONTROLLER));
    let server = server_of(&controller);
    let joiner = join_config_with_clock(authority.root_fingerprint(), ALPN, Clock::at(NOW));
    for _ in 0..2 {
        let came = handshake(&joiner, server.config()).server.unwrap();
        assert_eq!((came.handshake_kind(), server.admit(&came).unwrap()), (Some(Full), None));
    }
    // Nor is a ticket of a server that lets anybody in good for one that does not.
    let strict = controller.resuming_server(ClientAuth::Required, ExpectedPeer::Any, ALPN).unwrap();
    let mut anonymous = rustls::ClientConfig::clone(&joiner);
    anonymous.resumption = rustls::client::Resumption::in_memory_sessions(1);
    let anonymous = Arc::new(anonymous);
    handshake(&anonymous, server.config()).server.unwrap();
    let came = handshake(&anonymous, server.config()).server.unwrap();
    assert_eq!(came.handshake_kind(), Some(Resumed));
    assert_eq!(server.admit(&came).unwrap(), None);
    assert_eq!(strict.admit(&came).unwrap_err(), Error::NoCertificatesPresented);
}
