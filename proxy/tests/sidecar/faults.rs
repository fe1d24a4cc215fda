//! Endpoints that fail, each in its way, beside one that works: no connection of the app fails, and who fails is ejected. The
//! exact counts and times are held under a simulated clock by the unit tests of `src/outlier.rs` and `src/routes.rs`; here it is
//! real sockets.

use crate::support::app::{dead_address, expect_reset, ping, reset};
use crate::support::sidecar::metrics;
use crate::support::{App, Controller, LIMIT, Sidecar};
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use weft_identity::tls::{ClientAuth, ExpectedPeer, TlsIdentity};
use weft_model::Port;
use weft_model::traffic::{
    Balance, CircuitLimits, ConnectPolicy, ConnectionPolicy, OutlierPolicy, TrafficPolicy,
};
use weft_testkit::wait_until;

/// More than one burst of a test needs, and far from what a machine under load takes for a healthy connect.
const CONNECT: ConnectPolicy = ConnectPolicy {
    timeout_ms: 5_000,
    retries: 2,
    backoff_ms: 1,
    budget_percent: 20,
    budget_min_per_second: 100,
};

fn mesh(policy: TrafficPolicy) -> Controller {
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[8080]);
    controller.allow("default/db", &["default/web"]);
    controller.put_traffic("default/db", policy);
    controller
}

async fn calling(controller: &Controller, endpoints: usize) -> Sidecar {
    let web = Sidecar::calling(controller, "default/web/web-1", "default/db", 5432, endpoints).await;
    web.runs(controller.wanted("default/web/web-1")).await;
    web
}

/// What `/config` counts of an endpoint.
async fn counted(web: &Sidecar, instance: &str) -> Value {
    let config = web.json("/config").await;
    let endpoints = config["endpoints"][0]["endpoints"].as_array().unwrap();
    endpoints.iter().find(|endpoint| endpoint["instance"] == instance).unwrap()["counted"].clone()
}

async fn is_ejected(web: &Sidecar, instance: &str) -> bool {
    counted(web, instance).await["outlier"] == "ejected"
}

/// Whether a connection works.
async fn works(web: &Sidecar) -> bool {
    match web.try_connect("default/db", 5432).await {
        Ok(mut client) => ping(&mut client).await.is_ok(),
        Err(_) => false,
    }
}

/// So many connections one after the other, then as many at once, and all of them work.
async fn all_work(web: &Sidecar, count: usize) {
    for _ in 0..count {
        ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    }
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(web.connect("default/db", 5432).await);
    }
    for client in &mut clients {
        ping(client).await.unwrap();
    }
}

/// `db-good` works, and the two others are at `address`.
async fn beside_one_that_works(policy: TrafficPolicy, address: SocketAddr, causes: &[&str]) {
    let controller = mesh(policy);
    let app = App::echo().await;
    let _db = Sidecar::serving(&controller, "default/db/db-good", 5432, app.address).await;
    controller.pretend("default/db/db-bad-1", address);
    controller.pretend("default/db/db-bad-2", address);
    let web = calling(&controller, 3).await;
    let ejections = |page: &str| -> f64 {
        let lines = page.lines().filter(|line| {
            line.starts_with("weft_endpoint_ejections_total")
                && causes.iter().any(|cause| line.contains(&format!("cause=\"{cause}\"")))
        });
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    };
    let before = ejections(&metrics().render());
    all_work(&web, 20).await;
    // Of three endpoints one is half, rounded down.
    wait_until("an ejection", LIMIT, async || {
        ping(&mut web.connect("default/db", 5432).await).await.unwrap();
        is_ejected(&web, "db-bad-1").await || is_ejected(&web, "db-bad-2").await
    })
    .await;
    assert!(ejections(&metrics().render()) > before, "counted by its cause");
    assert_eq!(counted(&web, "db-good").await["outlier"], "closed");
    let failed = web.records().into_iter().filter(|record| {
        !["client_fin", "server_fin", "client_reset"].contains(&record["close_reason"].as_str().unwrap())
    });
    assert_eq!(failed.collect::<Vec<_>>(), Vec::<Value>::new());
}

fn with_timeout(timeout_ms: u32) -> TrafficPolicy {
    let connect = ConnectPolicy { timeout_ms, ..CONNECT };
    TrafficPolicy { connect, ..TrafficPolicy::default() }
}

#[tokio::test]
async fn endpoints_that_died() {
    beside_one_that_works(with_timeout(5_000), dead_address(), &["connect_refused"]).await;
}

#[tokio::test]
async fn endpoints_that_swallow_everything() {
    let silent = App::serve(|stream| async move {
        let _stream = stream;
        std::future::pending::<()>().await;
    })
    .await;
    beside_one_that_works(with_timeout(500), silent.address, &["connect_timeout"]).await;
}

#[tokio::test]
async fn endpoints_that_accept_and_reset() {
    // The reset may come before the connect was told that it succeeded.
    let resetting = App::serve(async |stream| reset(stream)).await;
    beside_one_that_works(with_timeout(5_000), resetting.address, &["tls_failed", "connect_refused"]).await;
}

#[tokio::test]
async fn endpoints_that_are_somebody_else() {
    let controller = Controller::start();
    let identity = TlsIdentity::new(controller.credential("default/db/db-other"));
    let tls = identity.server_config(ClientAuth::Required, ExpectedPeer::Any, &[b"weft/1"]);
    let other = App::serve(move |stream| {
        let tls = TlsAcceptor::from(tls.clone());
        async move {
            let _ = tls.accept(stream).await;
        }
    })
    .await;
    beside_one_that_works(with_timeout(5_000), other.address, &["tls_failed"]).await;
}

#[tokio::test]
async fn apps_that_accept_and_reset_before_anybody_says_anything() {
    let policy = TrafficPolicy { balance: Balance::RoundRobin, ..with_timeout(5_000) };
    let controller = mesh(policy);
    let (good, bad) = (App::named("good").await, App::serve(async |stream| reset(stream)).await);
    let _good = Sidecar::serving(&controller, "default/db/db-good", 5432, good.address).await;
    let _bad = Sidecar::serving(&controller, "default/db/db-bad", 5432, bad.address).await;
    let web = calling(&controller, 2).await;
    for _ in 0..20 {
        let mut client = web.connect("default/db", 5432).await;
        let mut said = [0; 4];
        client.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"good");
    }
    assert!(is_ejected(&web, "db-bad").await, "{}", counted(&web, "db-bad").await);
    wait_until("twenty records", LIMIT, async || web.records().len() == 20).await;
    let twice = web.records().into_iter().filter(|record| record["attempts"] == 2).count();
    // Three resets in a row eject it, or three refusals: which it is depends on whether the sidecar there had connected already.
    assert!((3..=9).contains(&twice), "{twice}");
    assert!(web.records().iter().all(|record| record["endpoint_identity"] == "default/db/db-good"));
}

#[tokio::test]
async fn a_reset_after_the_client_spoke_is_the_clients() {
    let controller = mesh(with_timeout(5_000));
    let bad = App::serve(|mut stream| async move {
        if stream.read_exact(&mut [0]).await.is_ok() {
            reset(stream);
        }
    })
    .await;
    let good = App::echo().await;
    let _bad = Sidecar::serving(&controller, "default/db/db-bad", 5432, bad.address).await;
    let mut web = calling(&controller, 1).await;
    let _good = Sidecar::serving(&controller, "default/db/db-good", 5432, good.address).await;
    web.sees("default/db", 2).await;
    let mut resets = 0;
    wait_until("three resets", LIMIT, async || {
        let mut client = web.connect("default/db", 5432).await;
        if ping(&mut client).await.is_err() {
            resets += 1;
        }
        resets == 3
    })
    .await;
    wait_until("an ejection", LIMIT, async || is_ejected(&web, "db-bad").await).await;
    for _ in 0..10 {
        ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    }
    web.stop().await;
    let lost = web.records().into_iter().filter(|record| record["close_reason"] == "server_reset");
    assert!(lost.clone().all(|record| record["attempts"] == 1), "nothing is said twice");
    assert_eq!(lost.count(), 3);
}

/// A way to an endpoint that lets every so-and-so-many connections through.
async fn flapping(to: SocketAddr, count: Arc<AtomicUsize>) -> App {
    App::serve(move |mut stream| {
        let turn = count.fetch_add(1, Ordering::SeqCst);
        async move {
            match TcpStream::connect(to).await {
                Ok(mut there) if turn % 4 == 3 => {
                    let _ = copy_bidirectional(&mut stream, &mut there).await;
                }
                _ => reset(stream),
            }
        }
    })
    .await
}

#[tokio::test]
async fn endpoints_that_flap() {
    let outlier_detection =
        OutlierPolicy { ejection_base_ms: 100, ejection_max_ms: 200, ..OutlierPolicy::default() };
    let controller = mesh(TrafficPolicy { outlier_detection, ..with_timeout(5_000) });
    let app = App::echo().await;
    let _good = Sidecar::serving(&controller, "default/db/db-good", 5432, app.address).await;
    let port = weft_testkit::reserve_loopback_port();
    let behind = SocketAddr::from(([127, 0, 0, 1], port));
    let count = Arc::new(AtomicUsize::new(0));
    let front = flapping(behind, Arc::clone(&count)).await;
    let _flaps = Sidecar::start(&controller, "default/db/db-flaps", |config| {
        config.apps.insert(Port::new(5432).unwrap(), app.address);
        config.inbound_listen = behind;
        config.advertise = Some(front.address);
    })
    .await;
    let web = calling(&controller, 2).await;
    let mut states = std::collections::BTreeSet::new();
    // It is ejected, tried again, and comes back; whatever it is, every connection works.
    wait_until("every state, twice around", LIMIT, async || {
        let mut client = web.connect("default/db", 5432).await;
        ping(&mut client).await.unwrap();
        // A tunnel that came through is not kept: the next connection is to try its luck.
        reset(client);
        let counted = counted(&web, "db-flaps").await;
        states.insert(counted["outlier"].as_str().unwrap().to_owned());
        let trials = web.records().iter().filter(|record| record["pick"] == "trial").count();
        states.len() == 3 && trials >= 2
    })
    .await;
}

#[tokio::test]
async fn if_all_are_down_the_app_is_told_and_the_first_that_comes_back_is_used_at_once() {
    let outlier_detection = OutlierPolicy {
        failures: 1,
        ejection_base_ms: 3_600_000,
        ejection_max_ms: 3_600_000,
        ejected_percent_max: 100,
        ..OutlierPolicy::default()
    };
    let controller = mesh(TrafficPolicy { outlier_detection, ..with_timeout(5_000) });
    let app = App::echo().await;
    let port = weft_testkit::reserve_loopback_port();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    controller.pretend("default/db/db-1", address);
    controller.pretend("default/db/db-2", dead_address());
    let web = calling(&controller, 2).await;
    web.refuses("default/db", 5432).await;
    let record = web.record("connect_refused").await;
    assert_eq!(record["attempts"], 2, "each of them once");
    assert!(is_ejected(&web, "db-1").await && is_ejected(&web, "db-2").await);

    let _db = Sidecar::start(&controller, "default/db/db-1", |config| {
        config.apps.insert(Port::new(5432).unwrap(), app.address);
        config.inbound_listen = address;
    })
    .await;
    wait_until("a connection", LIMIT, async || works(&web).await).await;
    assert_eq!(counted(&web, "db-1").await["outlier"], "closed", "an hour too early");
    for _ in 0..10 {
        ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    }
    assert!(web.records().iter().any(|record| record["pick"] == "last_resort"));
}

#[tokio::test]
async fn without_budget_nothing_is_tried_again() {
    let connect = ConnectPolicy { budget_percent: 0, budget_min_per_second: 0, ..CONNECT };
    let outlier_detection = OutlierPolicy { enabled: false, ..OutlierPolicy::default() };
    let balance = Balance::RoundRobin;
    let controller = mesh(TrafficPolicy { balance, connect, outlier_detection, ..TrafficPolicy::default() });
    controller.pretend("default/db/db-1", dead_address());
    controller.pretend("default/db/db-2", dead_address());
    let web = calling(&controller, 2).await;
    web.refuses("default/db", 5432).await;
    assert_eq!(web.record("connect_refused").await["attempts"], 1);
    assert!(metrics().render().contains("weft_connect_retries_total{result=\"over_budget\"}"));
    assert_eq!(counted(&web, "db-1").await["outlier"], "closed", "switched off");
}

#[tokio::test]
async fn a_limit_refuses_at_once_and_what_ends_makes_room() {
    let limits = CircuitLimits { service_connections: Some(2), ..CircuitLimits::default() };
    let controller = mesh(TrafficPolicy { limits, ..with_timeout(5_000) });
    let app = App::echo().await;
    let _db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let web = calling(&controller, 1).await;
    let mut clients = [web.connect("default/db", 5432).await, web.connect("default/db", 5432).await];
    for client in &mut clients {
        ping(client).await.unwrap();
    }
    web.refuses("default/db", 5432).await;
    let record = web.record("circuit_open").await;
    assert_eq!((record["closed_by"].as_str(), record["attempts"].as_u64()), (Some("local"), Some(0)));
    assert!(record["detail"].as_str().unwrap().starts_with("service_connections "), "{record}");
    drop(clients);
    wait_until("room", LIMIT, async || works(&web).await).await;
    assert_eq!(counted(&web, "db-1").await["outlier"], "closed", "a limit is no failure of the endpoint");
}

#[tokio::test]
async fn a_full_endpoint_is_passed_over_while_others_have_room() {
    let limits = CircuitLimits { endpoint_connections: Some(2), ..CircuitLimits::default() };
    let controller = mesh(TrafficPolicy { balance: Balance::Maglev, limits, ..with_timeout(5_000) });
    let app = App::echo().await;
    let _one = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let _two = Sidecar::serving(&controller, "default/db/db-2", 5432, app.address).await;
    let web = calling(&controller, 2).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(web.connect("default/db", 5432).await);
        ping(clients.last_mut().unwrap()).await.unwrap();
    }
    let live = web.json("/connections").await;
    let to: Vec<_> = live.as_array().unwrap().iter().map(|live| live["endpoint_identity"].clone()).collect();
    assert_eq!(to.iter().filter(|instance| **instance == to[0]).count(), 2, "{to:?}");
    assert!(live.as_array().unwrap().iter().all(|live| live["pick"] == "maglev"), "{live}");
    web.refuses("default/db", 5432).await;
    assert!(
        web.record("circuit_open").await["detail"].as_str().unwrap().starts_with("endpoint_connections ")
    );
}

#[tokio::test]
async fn a_source_stays_where_it_is() {
    let controller = mesh(TrafficPolicy { balance: Balance::Maglev, ..with_timeout(5_000) });
    let app = App::echo().await;
    let mut endpoints = Vec::new();
    for name in ["default/db/db-1", "default/db/db-2", "default/db/db-3"] {
        endpoints.push(Sidecar::serving(&controller, name, 5432, app.address).await);
    }
    let web = calling(&controller, 3).await;
    for count in [8, 16] {
        for _ in 0..8 {
            ping(&mut web.connect("default/db", 5432).await).await.unwrap();
        }
        wait_until("their records", LIMIT, async || web.records().len() == count).await;
        let records = web.records();
        let home = &records[count - 1]["endpoint_identity"];
        assert!(records[count - 8..].iter().all(|record| record["endpoint_identity"] == *home));
        // It goes, and the source moves once.
        let gone = home.as_str().unwrap().to_owned();
        let index = endpoints.iter().position(|db| db.config.instance.to_string() == gone).unwrap();
        endpoints.remove(index).stop().await;
        web.sees("default/db", endpoints.len()).await;
    }
}

#[tokio::test]
async fn every_way_to_balance_says_its_name() {
    let controller = mesh(with_timeout(5_000));
    let app = App::echo().await;
    let _one = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let _two = Sidecar::serving(&controller, "default/db/db-2", 5432, app.address).await;
    let web = calling(&controller, 2).await;
    for (balance, seen) in Balance::ALL.into_iter().zip(1..) {
        controller
            .put_traffic("default/db", TrafficPolicy { balance, slow_start_ms: 1, ..with_timeout(4_999) });
        web.runs(controller.wanted("default/web/web-1")).await;
        ping(&mut web.connect("default/db", 5432).await).await.unwrap();
        wait_until("its record", LIMIT, async || web.records().len() == seen).await;
        assert_eq!(web.records()[seen - 1]["pick"], balance.as_str());
        if balance == Balance::PeakEwma {
            let [one, two] = [counted(&web, "db-1").await, counted(&web, "db-2").await];
            assert!(one["connect_us"].is_u64() ^ two["connect_us"].is_u64(), "{one} {two}");
        }
    }
}

/// A pair whose connections last as long as `connection` says.
async fn lasting(connection: ConnectionPolicy, app: &App) -> (Controller, Sidecar, Sidecar) {
    let controller = mesh(TrafficPolicy { connection, ..with_timeout(5_000) });
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let web = calling(&controller, 1).await;
    (controller, db, web)
}

#[tokio::test]
async fn a_connection_that_is_old_enough_ends_at_both_ends() {
    let (app, mut heard) = App::listening().await;
    let connection = ConnectionPolicy { max_age_ms: Some(1_000), ..ConnectionPolicy::default() };
    let (_controller, db, web) = lasting(connection, &app).await;
    let mut client = web.connect("default/db", 5432).await;
    client.write_all(b"?").await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    expect_reset(&mut client).await;
    let heard = tokio::time::timeout(LIMIT, heard.recv()).await.unwrap().unwrap();
    assert_eq!(heard, Err(std::io::ErrorKind::ConnectionReset));
    let record = web.record("max_age").await;
    assert_eq!(
        (record["closed_by"].as_str(), record["detail"].as_str()),
        (Some("local"), Some("it has lasted 1s"))
    );
    assert!(record["duration_ms"].as_f64().unwrap() >= 1_000.0, "{record}");
    db.record("client_reset").await;
    assert_eq!(counted(&web, "db-1").await["failures"], 0, "no failure of the endpoint");
}

#[tokio::test]
async fn a_connection_ends_that_is_idle_and_one_that_is_not_goes_on() {
    let app = App::echo().await;
    let connection = ConnectionPolicy { idle_timeout_ms: Some(1_500), ..ConnectionPolicy::default() };
    let (_controller, _db, web) = lasting(connection, &app).await;
    let (mut busy, mut idle) = (web.connect("default/db", 5432).await, web.connect("default/db", 5432).await);
    ping(&mut idle).await.unwrap();
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    let mut byte = [0];
    loop {
        tokio::select! {
            _ = ticks.tick() => ping(&mut busy).await.unwrap(),
            read = idle.read(&mut byte) => {
                assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
                break;
            }
        }
    }
    ping(&mut busy).await.unwrap();
    let record = web.record("idle_timeout").await;
    assert_eq!(record["detail"], "no byte moved for 1s 500ms");
    assert_eq!(web.records().len(), 1);
}

#[tokio::test]
async fn a_connection_that_is_half_over_ends_if_nothing_moves_and_a_whole_one_does_not() {
    // Hears the end, and says nothing.
    let app = App::serve(|mut stream| async move {
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said).await;
        let _ = stream.writable().await;
        std::future::pending::<()>().await;
    })
    .await;
    let connection = ConnectionPolicy { half_open_timeout_ms: Some(300), ..ConnectionPolicy::default() };
    let (_controller, _db, web) = lasting(connection, &app).await;
    let (whole, mut half) = (web.connect("default/db", 5432).await, web.connect("default/db", 5432).await);
    half.write_all(b"that is all").await.unwrap();
    half.shutdown().await.unwrap();
    expect_reset(&mut half).await;
    let record = web.record("idle_timeout").await;
    assert_eq!(record["detail"], "one direction ended and no byte moved for 300ms");
    assert_eq!(record["bytes_up"], 11);
    let live = web.json("/connections").await;
    assert_eq!(live.as_array().unwrap().len(), 1, "{live}");
    drop(whole);
}
