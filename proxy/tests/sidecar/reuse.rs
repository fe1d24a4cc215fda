//! Tunnels that carry one stream after the other: what is kept, what is not, and that streams stay apart.

use crate::support::app::ping;
use crate::support::controller::Call;
use crate::support::tunnel::{self, Frame, Opened, end};
use crate::support::{App, Controller, LIMIT, Sidecar};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::task::TaskTracker;
use weft_identity::tls::{ClientAuth, ExpectedPeer, TlsIdentity};
use weft_testkit::{RoughLine, wait_until};

/// `web` may connect to `db`, whose sidecar is not there yet.
fn mesh() -> Controller {
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[8080]);
    controller.allow("default/db", &["default/web"]);
    controller
}

/// A connection that ends cleanly.
async fn visit(web: &Sidecar) {
    let before = web.records().len();
    let mut client = web.connect("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    wait_until("its record", LIMIT, async || web.records().len() > before).await;
}

async fn calling(controller: &Controller) -> Sidecar {
    Sidecar::calling(controller, "default/web/web-1", "default/db", 5432, 1).await
}

#[tokio::test]
async fn a_renewed_leaf_retires_tunnels_that_wait() {
    let controller = mesh();
    let app = App::echo().await;
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    controller.state().leaf_lifetime = Duration::from_secs(3);
    let web = calling(&controller).await;
    let renewed = || controller.count(|call| matches!(call, Call::Renewed(_)));
    visit(&web).await;
    let before = renewed();
    wait_until("a renewed leaf", LIMIT, async || renewed() > before).await;
    let serial = web.json("/config").await["leaf"]["serial"].clone();
    wait_until("that it is in use", LIMIT, async || {
        visit(&web).await;
        web.json("/config").await["leaf"]["serial"] != serial || renewed() > before + 1
    })
    .await;
    assert!(web.records().iter().all(|record| record["close_reason"] == "client_fin"), "{:?}", web.records());
    assert!(db.records().iter().filter(|record| record["tunnel_reused"] == false).count() > 1);
}

#[tokio::test]
async fn a_stop_does_not_wait_for_tunnels_that_wait() {
    let controller = mesh();
    let app = App::echo().await;
    let mut db = Sidecar::start(&controller, "default/db/db-1", |config| {
        config.apps.insert(weft_model::Port::new(5432).unwrap(), app.address);
        config.drain_deadline = Duration::from_secs(600);
    })
    .await;
    let web = calling(&controller).await;
    visit(&web).await;
    db.stop().await;
    assert_eq!(db.records().len(), 1, "{:?}", db.records());
}

/// What a server's sidecar made by hand does with a tunnel after a stream.
#[derive(Clone, Copy)]
enum After {
    Closes,
    /// Takes the next OPEN, and closes then.
    ClosesWhenAsked,
    /// Does not answer the next OPEN: it still has to do with the stream before.
    IsSilent,
}

/// A `db` whose tunnels carry one stream each. Counts them.
async fn one_stream_each(controller: &Controller, after: After) -> (App, Arc<AtomicUsize>) {
    let identity = TlsIdentity::new(controller.credential("default/db/db-1"));
    let tls = identity.server_config(ClientAuth::Required, ExpectedPeer::Any, &[b"weft/1"]);
    let tunnels = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&tunnels);
    let app = App::serve(move |stream| {
        let (tls, count) = (TlsAcceptor::from(tls.clone()), Arc::clone(&count));
        async move {
            let mut peer = tls.accept(stream).await.unwrap();
            count.fetch_add(1, Ordering::SeqCst);
            stream_by_hand(&mut peer).await;
            match after {
                After::Closes => {}
                After::ClosesWhenAsked => assert!(tunnel::read(&mut peer).await.unwrap().open.is_some()),
                After::IsSilent => {
                    let _ = peer.read_to_end(&mut Vec::new()).await;
                }
            }
        }
    });
    let app = app.await;
    controller.pretend("default/db/db-1", app.address);
    (app, tunnels)
}

/// Opens a stream, echoes, and ends it.
async fn stream_by_hand(peer: &mut TlsStream<TcpStream>) {
    assert!(tunnel::read(peer).await.unwrap().open.is_some());
    tunnel::write(peer, &Frame { opened: Some(Opened {}), ..Frame::default() }).await.unwrap();
    loop {
        let frame = tunnel::read(peer).await.unwrap();
        tunnel::write(peer, &frame).await.unwrap();
        if frame == end() {
            return;
        }
    }
}

#[tokio::test]
async fn a_tunnel_that_is_of_no_use_any_more_costs_no_connection() {
    for after in [After::Closes, After::ClosesWhenAsked, After::IsSilent] {
        let controller = mesh();
        let (_app, tunnels) = one_stream_each(&controller, after).await;
        let web = calling(&controller).await;
        for _ in 0..5 {
            visit(&web).await;
        }
        for record in web.records() {
            assert_eq!(record["close_reason"], "client_fin", "{record}");
            assert_eq!(record["attempts"], 1, "{record}");
            assert_eq!(record["tunnel_reused"], false, "{record}");
        }
        assert_eq!(tunnels.load(Ordering::SeqCst), 5);
    }
}

/// Says random words in random pieces and hears them again. Both ends may end first.
async fn converse(mut client: TcpStream, rng: &mut SmallRng) {
    let length = if rng.random_ratio(1, 8) { rng.random_range(0..400_000) } else { rng.random_range(0..600) };
    let mut said = vec![0; length];
    rng.fill(&mut said[..]);
    let (mut read, mut write) = client.split();
    let speak = async {
        let mut rest = &said[..];
        while !rest.is_empty() {
            let (piece, more) = rest.split_at(rng.random_range(1..=rest.len()));
            write.write_all(piece).await.unwrap();
            rest = more;
        }
        write.shutdown().await.unwrap();
    };
    let mut heard = Vec::new();
    let hear = read.read_to_end(&mut heard);
    let ((), result) = timeout(LIMIT, async { tokio::join!(speak, hear) }).await.expect("an end");
    result.unwrap();
    assert!(heard == said, "{} bytes came of {}", heard.len(), said.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_one_tunnel_stay_apart_whatever_the_network_does() {
    const CLIENTS: usize = 16;
    const STREAMS: usize = 700;
    let controller = mesh();
    let app = App::echo().await;
    // What peers are told is not where this sidecar listens.
    let between = RoughLine::listen(7, 8).await;
    let db = Sidecar::start(&controller, "default/db/db-1", |config| {
        config.apps.insert(weft_model::Port::new(5432).unwrap(), app.address);
        config.advertise = Some(between.address());
    });
    let db = db.await;
    between.leads_to(db.inbound);
    db.ready().await;
    let web = calling(&controller).await;
    let web = Arc::new(web);
    let tasks = TaskTracker::new();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let web = Arc::clone(&web);
            tasks.spawn(async move {
                let mut rng = SmallRng::seed_from_u64(number as u64);
                for _ in 0..STREAMS {
                    converse(web.connect("default/db", 5432).await, &mut rng).await;
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    wait_until("every record", LIMIT, async || web.records().len() == CLIENTS * STREAMS).await;
    let records = web.records();
    assert!(records.iter().all(|record| record["close_reason"] == "client_fin"));
    let new = records.iter().filter(|record| record["tunnel_reused"] == false).count();
    assert!(new <= CLIENTS * 2, "{new} tunnels for {CLIENTS} at a time");
}
