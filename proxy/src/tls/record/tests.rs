//! Records between two sessions whose handshake was real; and what changed, repeated, missing and hostile records do.

use super::*;
use crate::clock;
use crate::tls::handshake::{Established, accept, connect};
use proptest::prelude::*;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ClientConfig, ServerConfig};
use weft_identity::ca::{CertificateAuthority, LEAF_LIFETIME};
use weft_identity::spiffe::Subject;
use weft_identity::tls::{ClientAuth, ExpectedPeer, TlsIdentity};

/// The configurations of two sidecars of one mesh.
fn configs() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let ca = CertificateAuthority::create(&"weft.test".parse().unwrap(), clock::now()).unwrap();
    let identity = |instance: &str| {
        let subject = Subject::Instance(instance.parse().unwrap());
        TlsIdentity::new(ca.issue_credential(&subject, clock::now(), LEAF_LIFETIME).unwrap())
    };
    let client = identity("default/web/web-1").client_config(ExpectedPeer::AnyInstance, &[]);
    let server =
        identity("default/db/db-1").server_config(ClientAuth::Required, ExpectedPeer::AnyInstance, &[]);
    let (mut client, mut server) = (Arc::unwrap_or_clone(client), Arc::unwrap_or_clone(server));
    client.enable_secret_extraction = true;
    server.enable_secret_extraction = true;
    (Arc::new(client), Arc::new(server))
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

async fn accepted(server: Arc<ServerConfig>, far: &mut TcpStream) -> Established {
    match accept(Arc::clone(&server), |_| server, far).await {
        Ok(established) => established,
        Err(_) => panic!("the handshake failed"),
    }
}

/// A client's and a server's session with each other.
async fn sessions() -> (Session, Session) {
    let (client, server) = configs();
    let (mut near, mut far) = sockets().await;
    let connecting = async {
        let established = connect(client, "db.default".try_into().unwrap(), &mut near).await.unwrap();
        near.write_all(&established.unsent).await.unwrap();
        established.session
    };
    let accepting = async {
        let Established { session, received, unsent, negotiated } = accepted(server, &mut far).await;
        assert!(received.is_empty() && unsent.is_empty());
        assert_eq!(negotiated.peer.id.to_string(), "spiffe://weft.test/ns/default/svc/web/inst/web-1");
        session
    };
    tokio::join!(connecting, accepting)
}

fn sealed(session: &mut Session, content: &[u8]) -> Vec<u8> {
    let mut record = [&[0; HEADER][..], content, &[0; TRAILER]].concat();
    session.seal(&mut record).unwrap();
    record
}

fn opened(session: &mut Session, record: &[u8]) -> Result<Vec<u8>, Error> {
    assert_eq!(length(record).unwrap(), Some(record.len()));
    let mut record = record.to_vec();
    match session.open(&mut record)? {
        Opened::Data(bytes) => Ok(record[bytes].to_vec()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_one_end_seals_the_other_opens() {
    let (mut client, mut server) = sessions().await;
    for length in [1, 2, 100, CONTENT_MAX] {
        let content = vec![0xa5; length];
        let record = sealed(&mut client, &content);
        assert_eq!(opened(&mut server, &record).unwrap(), content);
        let record = sealed(&mut server, &content);
        assert_eq!(opened(&mut client, &record).unwrap(), content);
    }
    let mut close_notify = client.sealing.seal_message(&[1, 0], Content::Alert).unwrap();
    assert_eq!(server.open(&mut close_notify).unwrap(), Opened::Closed);
}

#[tokio::test]
async fn a_record_that_is_not_the_next_one_ends_the_session() {
    let (mut client, mut server) = sessions().await;
    let [first, second] = [sealed(&mut client, b"first"), sealed(&mut client, b"second")];
    assert_eq!(opened(&mut server, &first).unwrap(), b"first");
    // Repeated; it is not counted as seen either, so the next one does not fit any more.
    assert_eq!(opened(&mut server, &first).unwrap_err(), Error::DecryptError);
    assert_eq!(opened(&mut server, &second).unwrap_err(), Error::DecryptError);

    let (mut client, mut server) = sessions().await;
    let [_lost, second] = [sealed(&mut client, b"first"), sealed(&mut client, b"second")];
    assert_eq!(opened(&mut server, &second).unwrap_err(), Error::DecryptError);
}

#[tokio::test]
async fn a_change_of_any_byte_is_noticed() {
    let (mut client, mut server) = sessions().await;
    let record = sealed(&mut client, b"hello");
    for at in 0..record.len() {
        let mut changed = record.clone();
        changed[at] ^= 0x10;
        // The type and the length are looked at first; what they let pass does not authenticate.
        let whole = length(&changed).is_ok_and(|length| length == Some(changed.len()));
        if whole {
            let before = server.opening.sealed;
            assert!(server.open(&mut changed).is_err(), "byte {at}");
            server.opening.sealed = before;
        }
    }
    assert_eq!(opened(&mut server, &record).unwrap(), b"hello");
}

#[tokio::test]
async fn keys_are_changed_before_they_are_worn_and_the_other_end_follows() {
    let (mut client, mut server) = sessions().await;
    client.limit = 3;
    let mut changes = 0;
    for number in 0..20_u8 {
        if let Some(mut record) = client.due().unwrap() {
            changes += 1;
            assert_eq!(server.open(&mut record).unwrap(), Opened::Nothing);
        }
        let record = sealed(&mut client, &[number]);
        assert_eq!(opened(&mut server, &record).unwrap(), [number]);
    }
    assert_eq!(changes, 6);
    assert!(server.due().unwrap().is_none(), "nobody asked the server to change its own");
    // It does when it is asked.
    let mut asks = client.sealing.seal_message(&[KEY_UPDATE, 0, 0, 1, 1], Content::Handshake).unwrap();
    client.sealing = Protection::new(client.keys.next_sealing().unwrap()).unwrap();
    assert_eq!(server.open(&mut asks).unwrap(), Opened::Nothing);
    assert_eq!(client.open(&mut server.due().unwrap().unwrap()).unwrap(), Opened::Nothing);
    let record = sealed(&mut server, b"new key");
    assert_eq!(opened(&mut client, &record).unwrap(), b"new key");
}

#[tokio::test]
async fn messages_that_are_not_due_are_refused() {
    for (content, message) in [
        (Content::Handshake, &[KEY_UPDATE, 0, 0, 1, 2][..]),
        (Content::Handshake, &[KEY_UPDATE, 0, 0, 2, 0, 0]),
        (Content::Handshake, &[KEY_UPDATE, 0, 0, 1, 0, KEY_UPDATE, 0, 0, 1, 0]),
        (Content::Handshake, &[KEY_UPDATE, 0, 0]),
        (Content::Handshake, &[NEW_SESSION_TICKET, 0, 0, 0]),
        (Content::Handshake, &[1, 0, 0, 0]),
        (Content::Alert, &[1]),
        (Content::Alert, &[2, 40]),
    ] {
        let (mut client, mut server) = sessions().await;
        let mut record = client.sealing.seal_message(message, content).unwrap();
        assert!(server.open(&mut record).is_err(), "{message:?}");
    }
    let (mut client, mut server) = sessions().await;
    let fatal = server.sealing.seal_message(&[2, 44], Content::Alert).unwrap();
    let error = client.open(&mut fatal.clone()).unwrap_err();
    assert_eq!(error, Error::AlertReceived(AlertDescription::CertificateRevoked));
}

#[tokio::test]
async fn records_without_a_byte_are_bounded() {
    let (mut client, mut server) = sessions().await;
    for _ in 0..FRUITLESS_MAX {
        let mut record = sealed(&mut client, b"");
        assert_eq!(server.open(&mut record).unwrap(), Opened::Nothing);
    }
    assert!(server.open(&mut sealed(&mut client, b"")).is_err());
}

/// The other end is rustls itself, with its own records.
#[tokio::test]
async fn another_implementation_is_understood() {
    let (client, server) = configs();
    let (near, mut far) = sockets().await;
    let theirs = async {
        let mut stream =
            TlsConnector::from(client).connect("db.default".try_into().unwrap(), near).await.unwrap();
        stream.write_all(b"one").await.unwrap();
        stream.get_mut().1.refresh_traffic_keys().unwrap();
        stream.write_all(b"two").await.unwrap();
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).await.unwrap();
        stream.shutdown().await.unwrap();
        answer
    };
    let ours = async {
        let Established { mut session, mut received, .. } = accepted(server, &mut far).await;
        let mut heard = Vec::new();
        loop {
            while let Some(length) = length(&received).unwrap().filter(|length| *length <= received.len()) {
                let mut record: Vec<u8> = received.drain(..length).collect();
                match session.open(&mut record).unwrap() {
                    Opened::Data(bytes) => heard.extend_from_slice(&record[bytes]),
                    Opened::Nothing => {}
                    Opened::Closed => return heard,
                }
                if heard == b"onetwo" {
                    // The client has asked for it, by changing its own.
                    if let Some(update) = session.due().unwrap() {
                        far.write_all(&update).await.unwrap();
                    }
                    far.write_all(&sealed(&mut session, &heard)).await.unwrap();
                }
            }
            assert_ne!(far.read_buf(&mut received).await.unwrap(), 0);
        }
    };
    let (answer, heard) = tokio::join!(theirs, ours);
    assert_eq!((&answer[..], &heard[..]), (&b"onetwo"[..], &b"onetwo"[..]));
}

#[test]
fn what_is_no_record_is_refused_by_its_header() {
    assert_eq!(length(&[23, 3, 3, 0]).unwrap(), None);
    assert_eq!(length(&[23, 3, 3, 0, 0]).unwrap(), Some(5));
    assert_eq!(length(&[23, 3, 3, 0x41, 0]).unwrap(), Some(RECORD_MAX));
    assert_eq!(length(&[23, 3, 3, 0x41, 1]).unwrap_err(), Error::PeerSentOversizedRecord);
    assert!(length(b"GET / HTTP/1.1\r\n").is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_a_record_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        let _ = length(&bytes);
    }
}
