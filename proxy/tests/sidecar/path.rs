//! Bytes: that all of them arrive, in order, with their ends; and what happens when there is no way.

use crate::support::app::{dead_address, expect_reset, ping, reset};
use crate::support::{App, Controller, LIMIT, Sidecar, tunnel};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use weft_identity::tls::{ClientAuth, ExpectedPeer, TlsIdentity};
use weft_model::Port;
use weft_model::traffic::{Balance, ConnectPolicy, TrafficPolicy};
use weft_testkit::wait_until;

/// `db` behind a sidecar, `web` before one, and `web` may connect.
async fn pair(app: &App) -> (Controller, Sidecar, Sidecar) {
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[8080]);
    controller.allow("default/db", &["default/web"]);
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    (controller, db, web)
}

#[tokio::test]
async fn many_bytes_arrive_both_ways_unchanged() {
    const BYTES: usize = 32 << 20;
    let app = App::echo().await;
    let (_controller, db, web) = pair(&app).await;
    let mut client = web.connect("default/db", 5432).await;
    let (mut read, mut write) = client.split();

    let send = async {
        let mut sent = Sha256::new();
        let mut chunk = vec![0_u8; 1 << 20];
        for round in 0..BYTES / chunk.len() {
            for (index, byte) in chunk.iter_mut().enumerate() {
                *byte = (index.wrapping_mul(31) ^ index >> 8 ^ round.wrapping_mul(17)).to_le_bytes()[0];
            }
            sent.update(&chunk);
            write.write_all(&chunk).await.unwrap();
        }
        write.shutdown().await.unwrap();
        sent.finalize()
    };
    let receive = async {
        let (mut received, mut bytes) = (Sha256::new(), 0);
        let mut chunk = vec![0; 1 << 16];
        loop {
            match read.read(&mut chunk).await.unwrap() {
                0 => return (received.finalize(), bytes),
                count => {
                    received.update(&chunk[..count]);
                    bytes += count;
                }
            }
        }
    };
    let (sent, (received, bytes)) = tokio::join!(send, receive);
    assert_eq!(bytes, BYTES);
    assert_eq!(sent, received);

    let (there, here) = (db.record("client_fin").await, web.record("client_fin").await);
    assert_eq!(there["connection_id"], here["connection_id"]);
    for record in [&there, &here] {
        assert_eq!(
            (record["bytes_up"].as_u64(), record["bytes_down"].as_u64()),
            (Some(BYTES as u64), Some(BYTES as u64))
        );
        assert_eq!((record["tls"].as_str(), record["closed_by"].as_str()), (Some("TLSv1_3"), Some("client")));
        assert_eq!(record["key_exchange"], "X25519MLKEM768");
        assert_eq!(record["source_identity"], "spiffe://weft.test/ns/default/svc/web/inst/web-1");
        assert!(record["first_byte_ms"].as_f64().unwrap() > 0.0);
    }
    assert_eq!((here["pick"].as_str(), here["attempts"].as_u64()), (Some("least_connections"), Some(1)));
    assert_eq!(there["rule"], "security/default/db#the-test-allows");
}

#[tokio::test]
async fn who_ends_first_still_hears_the_other() {
    let (tell, mut heard) = mpsc::channel(2);
    // Answers only after the client has ended.
    let patient = App::serve(move |mut stream| {
        let tell = tell.clone();
        async move {
            let mut said = String::new();
            stream.read_to_string(&mut said).await.unwrap();
            // A probe says nothing.
            if !said.is_empty() {
                tell.send(said).await.unwrap();
                stream.write_all(b"and good night").await.unwrap();
            }
        }
    })
    .await;
    let (_controller, db, web) = pair(&patient).await;
    let mut client = web.connect("default/db", 5432).await;
    client.write_all(b"good night").await.unwrap();
    client.shutdown().await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert_eq!((heard.recv().await.unwrap().as_str(), answer.as_str()), ("good night", "and good night"));
    assert_eq!(db.record("client_fin").await["bytes_down"], 14);
    assert_eq!(web.record("client_fin").await["bytes_up"], 10);
}

#[tokio::test]
async fn a_server_that_ends_first_still_hears_the_client() {
    let (tell, mut heard) = mpsc::channel(2);
    let brief = App::serve(move |mut stream| {
        let tell = tell.clone();
        async move {
            let _ = stream.write_all(b"only this").await;
            let _ = stream.shutdown().await;
            let mut said = String::new();
            // A probe says nothing.
            if stream.read_to_string(&mut said).await.is_ok_and(|bytes| bytes > 0) {
                tell.send(said).await.unwrap();
            }
        }
    })
    .await;
    let (_controller, _db, web) = pair(&brief).await;
    let mut client = web.connect("default/db", 5432).await;
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "only this");
    client.write_all(b"but I was not done").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(heard.recv().await.unwrap(), "but I was not done");
    assert_eq!(web.record("server_fin").await["closed_by"], "server");
}

#[tokio::test]
async fn a_server_may_speak_first() {
    let app = App::named("welcome").await;
    let (_controller, _db, web) = pair(&app).await;
    let mut client = web.connect("default/db", 5432).await;
    let mut banner = [0; 7];
    timeout(LIMIT, client.read_exact(&mut banner)).await.unwrap().unwrap();
    assert_eq!(&banner, b"welcome");
}

#[tokio::test]
async fn a_reset_by_the_client_reaches_the_app() {
    let (app, mut heard) = App::listening().await;
    let (_controller, db, web) = pair(&app).await;
    let mut client = web.connect("default/db", 5432).await;
    client.write_all(b"?").await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    reset(client);
    let heard = timeout(LIMIT, heard.recv()).await.unwrap().unwrap();
    assert_eq!(heard, Err(std::io::ErrorKind::ConnectionReset));
    db.record("client_reset").await;
    assert_eq!(web.record("client_reset").await["closed_by"], "client");
}

#[tokio::test]
async fn a_stream_that_ends_without_an_end_is_reset_for_the_app() {
    let (app, mut heard) = App::listening().await;
    let (controller, db, _web) = pair(&app).await;
    let credential = controller.credential("default/web/web-9");
    let mut peer = tunnel::connect(db.inbound, credential, &[b"weft/1"]).await.unwrap();
    tunnel::exchange(&mut peer, &tunnel::open("default/db", 5432)).await.unwrap();
    assert_eq!(tunnel::exchange(&mut peer, &tunnel::data(b"?")).await.unwrap(), tunnel::data(b"!"));
    // A FIN, as anybody on the way could send it.
    peer.into_inner().0.shutdown().await.unwrap();
    let heard = timeout(LIMIT, heard.recv()).await.unwrap().unwrap();
    assert_eq!(heard, Err(std::io::ErrorKind::ConnectionReset));
    db.record("client_reset").await;
}

/// A db instance that takes its time: says when it was asked, and says OPENED when it is told to.
async fn late_endpoint(controller: &Controller) -> (App, mpsc::Receiver<()>, CancellationToken) {
    let identity = TlsIdentity::new(controller.credential("default/db/db-late"));
    let tls = identity.server_config(ClientAuth::Required, ExpectedPeer::Any, &[b"weft/1"]);
    let (tell, asked) = mpsc::channel(8);
    let release = CancellationToken::new();
    let go_on = release.clone();
    let app = App::serve(move |stream| {
        let (tls, tell, go_on) = (TlsAcceptor::from(tls.clone()), tell.clone(), go_on.clone());
        async move {
            let mut peer = tls.accept(stream).await.unwrap();
            tunnel::read(&mut peer).await.unwrap().open.unwrap();
            tell.send(()).await.unwrap();
            go_on.cancelled().await;
            let opened = tunnel::Frame { opened: Some(tunnel::Opened {}), ..Default::default() };
            tunnel::write(&mut peer, &opened).await.unwrap();
            let _ = peer.read(&mut [0]).await;
        }
    });
    let app = app.await;
    controller.pretend("default/db/db-late", app.address);
    (app, asked, release)
}

fn leave(controller: &Controller, instance: &str) {
    let gone = weft_model::membership::MembershipCommand::Deregister;
    controller.commit(weft_model::Command::Membership(instance.parse().unwrap(), gone));
}

#[tokio::test]
async fn an_endpoint_that_left_before_it_answered_is_not_used() {
    let app = App::echo().await;
    let (controller, _db, web) = pair(&app).await;
    let (_late, mut asked, release) = late_endpoint(&controller).await;
    let connect = ConnectPolicy { timeout_ms: 10_000, retries: 2, ..ConnectPolicy::default() };
    let policy = TrafficPolicy { balance: Balance::RoundRobin, connect, ..TrafficPolicy::default() };
    controller.put_traffic("default/db", policy);
    web.sees("default/db", 2).await;
    web.runs(controller.wanted("default/web/web-1")).await;
    // One of two goes to the late one.
    let mut clients = [web.connect("default/db", 5432).await, web.connect("default/db", 5432).await];
    asked.recv().await.unwrap();
    leave(&controller, "default/db/db-late");
    web.runs(controller.wanted("default/web/web-1")).await;
    assert_eq!(web.records().len(), 0, "an attempt is not cut");
    release.cancel();
    assert_eq!(web.record("endpoint_removed").await["endpoint_identity"], "default/db/db-late");
    let mut alive = 0;
    for client in &mut clients {
        alive += usize::from(ping(client).await.is_ok());
    }
    assert_eq!(alive, 1);
}

#[tokio::test]
async fn an_endpoint_that_leaves_while_it_is_tried_costs_a_retry() {
    let app = App::echo().await;
    let (controller, _db, web) = pair(&app).await;
    let (late, mut asked, _release) = late_endpoint(&controller).await;
    let connect = ConnectPolicy { timeout_ms: 1_000, retries: 2, ..ConnectPolicy::default() };
    let policy = TrafficPolicy { balance: Balance::RoundRobin, connect, ..TrafficPolicy::default() };
    controller.put_traffic("default/db", policy);
    web.sees("default/db", 2).await;
    web.runs(controller.wanted("default/web/web-1")).await;
    let mut clients = [web.connect("default/db", 5432).await, web.connect("default/db", 5432).await];
    asked.recv().await.unwrap();
    leave(&controller, "default/db/db-late");
    web.runs(controller.wanted("default/web/web-1")).await;
    drop(late);
    for client in &mut clients {
        ping(client).await.unwrap();
    }
}

#[tokio::test]
async fn a_reset_by_the_app_reaches_the_client() {
    let app = App::serve(|mut stream| async move {
        if stream.read_exact(&mut [0]).await.is_ok() {
            reset(stream);
        }
    })
    .await;
    let (_controller, db, web) = pair(&app).await;
    let mut client = web.connect("default/db", 5432).await;
    client.write_all(b"!").await.unwrap();
    expect_reset(&mut client).await;
    assert_eq!(db.record("server_reset").await["closed_by"], "server");
    web.record("server_reset").await;
}

#[tokio::test]
async fn an_app_that_is_down_is_told_to_the_client() {
    let app = App::echo().await;
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[8080]);
    controller.allow("default/db", &["default/web"]);
    let db = Sidecar::start(&controller, "default/db/db-1", |config| {
        config.apps.insert(Port::new(5432).unwrap(), app.address);
        // The probes do not notice before the client does.
        config.probe.fall = u32::MAX;
    })
    .await;
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    app.gone().await;
    web.refuses("default/db", 5432).await;
    let (there, here) = (db.record("connect_refused").await, web.record("connect_refused").await);
    assert_eq!(there["connection_id"], here["connection_id"]);
    assert_eq!(here["closed_by"], "server");
    assert!(here["detail"].as_str().unwrap().contains("app does not accept"), "{here}");
}

#[tokio::test]
async fn a_dead_endpoint_costs_a_retry_and_no_connection() {
    let app = App::echo().await;
    let (controller, _db, web) = pair(&app).await;
    controller.pretend("default/db/db-dead", dead_address());
    let round_robin = TrafficPolicy { balance: Balance::RoundRobin, ..TrafficPolicy::default() };
    controller.put_traffic("default/db", round_robin);
    web.sees("default/db", 2).await;
    web.runs(controller.wanted("default/web/web-1")).await;
    for _ in 0..6 {
        ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    }
    let mut attempts = Vec::new();
    wait_until("six records", LIMIT, async || {
        attempts = web.records().iter().map(|record| record["attempts"].as_u64().unwrap()).collect();
        attempts.len() == 6
    })
    .await;
    assert!(attempts.contains(&1) && attempts.contains(&2), "{attempts:?}");
    assert!(web.records().iter().any(|record| record["pick"] == "retry"));
}

#[tokio::test]
async fn a_dead_endpoint_is_passed_over_after_it_failed() {
    let app = App::echo().await;
    let (controller, _db, web) = pair(&app).await;
    controller.pretend("default/db/db-dead", dead_address());
    web.sees("default/db", 2).await;
    // They stay, so that the dead one always has the fewest connections.
    let mut clients = Vec::new();
    for _ in 0..6 {
        clients.push(web.connect("default/db", 5432).await);
        ping(clients.last_mut().unwrap()).await.unwrap();
    }
    let live = web.json("/connections").await;
    let retried = live.as_array().unwrap().iter().filter(|live| live["attempts"] == 2).count();
    assert_eq!(retried, 3, "so many failures in a row eject: {live}");
}

#[tokio::test]
async fn without_retries_or_endpoints_the_client_is_reset() {
    let app = App::echo().await;
    let (controller, mut db, web) = pair(&app).await;
    controller.pretend("default/db/db-dead", dead_address());
    let connect = ConnectPolicy { timeout_ms: 1_000, retries: 0, ..ConnectPolicy::default() };
    controller.put_traffic("default/db", TrafficPolicy { connect, ..TrafficPolicy::default() });
    db.stop().await;
    web.sees("default/db", 1).await;
    web.runs(controller.wanted("default/web/web-1")).await;
    web.refuses("default/db", 5432).await;
    assert_eq!(web.record("connect_refused").await["attempts"], 1);

    let gone = weft_model::membership::MembershipCommand::Deregister;
    controller.commit(weft_model::Command::Membership("default/db/db-dead".parse().unwrap(), gone));
    web.sees("default/db", 0).await;
    web.refuses("default/db", 5432).await;
    assert_eq!(web.record("no_healthy_endpoint").await["attempts"], 0);
}

#[tokio::test]
async fn an_endpoint_that_does_not_answer_times_out() {
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[8080]);
    // Accepts, and says nothing.
    let silent = App::serve(|stream| async move {
        let _stream = stream;
        std::future::pending::<()>().await;
    })
    .await;
    controller.pretend("default/db/db-1", silent.address);
    let connect = ConnectPolicy { timeout_ms: 50, retries: 2, ..ConnectPolicy::default() };
    controller.put_traffic("default/db", TrafficPolicy { connect, ..TrafficPolicy::default() });
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    web.refuses("default/db", 5432).await;
    // There is no other endpoint to try.
    assert_eq!(web.record("connect_timeout").await["attempts"], 1);
}

#[tokio::test]
async fn connections_spread_over_instances() {
    let (one, two) = (App::named("1").await, App::named("2").await);
    let (controller, _db, web) = pair(&one).await;
    let _second = Sidecar::serving(&controller, "default/db/db-2", 5432, two.address).await;
    web.sees("default/db", 2).await;
    let mut answered = BTreeSet::new();
    let mut open: Vec<TcpStream> = Vec::new();
    for _ in 0..8 {
        let mut client = web.connect("default/db", 5432).await;
        answered.insert(client.read_u8().await.unwrap());
        open.push(client);
    }
    assert_eq!(answered, BTreeSet::from(*b"12"));
    let live = web.json("/connections").await;
    let to = |instance: &str| {
        live.as_array().unwrap().iter().filter(|live| live["endpoint_identity"] == instance).count()
    };
    // Of two endpoints, the one with fewer connections is always taken.
    assert_eq!((to("default/db/db-1"), to("default/db/db-2")), (4, 4));
}

#[tokio::test]
async fn an_app_that_asks_is_told_who_connects() {
    let (tell, mut heard) = mpsc::unbounded_channel();
    let app = App::serve(move |mut stream| {
        let tell = tell.clone();
        async move {
            let mut said = Vec::new();
            let _ = stream.read_to_end(&mut said).await;
            tell.send(said).unwrap();
        }
    });
    let app = app.await;
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[8080]);
    controller.allow("default/db", &["default/web"]);
    let db = Sidecar::start(&controller, "default/db/db-1", |config| {
        config.apps.insert(Port::new(5432).unwrap(), app.address);
        config.proxy_protocol = true;
    })
    .await;
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    let mut client = web.connect("default/db", 5432).await;
    client.write_all(b"hello").await.unwrap();
    client.shutdown().await.unwrap();
    let said = loop {
        let said = timeout(LIMIT, heard.recv()).await.unwrap().unwrap();
        // Version 2, and LOCAL: a probe. It says nothing else.
        assert_eq!(&said[..12], b"\r\n\r\n\0\r\nQUIT\n");
        match said[12] {
            0x20 => assert_eq!(said.len(), 16),
            _ => break said,
        }
    };
    let source = client.local_addr().unwrap();
    assert_eq!(said[12..14], [0x21, 0x11]);
    assert_eq!(said[16..20], [127, 0, 0, 1]);
    assert_eq!(said[24..26], source.port().to_be_bytes());
    let rest = &said[28..];
    assert_eq!(&rest[3..], b"spiffe://weft.test/ns/default/svc/web/inst/web-1hello");
    drop(db);
}

#[tokio::test]
async fn a_reset_behind_an_end_is_noticed_though_nobody_speaks() {
    let release = CancellationToken::new();
    let held = release.clone();
    let (tell, mut heard) = mpsc::channel(64);
    // Reads to the end and says nothing, for as long as it is held.
    let app = App::serve(move |mut stream| {
        let (held, tell) = (held.clone(), tell.clone());
        async move {
            let mut said = String::new();
            if stream.read_to_string(&mut said).await.is_ok_and(|bytes| bytes > 0) {
                tell.send(said).await.unwrap();
                held.cancelled().await;
            }
        }
    });
    let app = app.await;
    let (_controller, db, web) = pair(&app).await;
    let mut client = web.connect("default/db", 5432).await;
    client.write_all(b"over and").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(timeout(LIMIT, heard.recv()).await.unwrap().unwrap(), "over and");
    reset(client);
    assert_eq!(web.record("client_reset").await["closed_by"], "client");
    db.record("client_reset").await;
    release.cancel();
}
