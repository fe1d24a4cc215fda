//! What a sidecar runs: never older, never half, never nothing without saying so; and on without a controller.

use crate::support::app::{expect_reset, ping};
use crate::support::controller::{Call, shard, wire_version};
use crate::support::sidecar::upstream;
use crate::support::{App, Controller, LIMIT, Sidecar};
use serde_json::Value;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;
use tokio::net::TcpStream;
use weft_model::{ConfigVersion, Epoch, Position};
use weft_proto::v1;
use weft_routing::manifest::decode_entries;
use weft_routing::{Hash, Manifest};
use weft_testkit::{reserve_loopback_port, wait_until};

async fn pair() -> (Controller, App, Sidecar, Sidecar) {
    let app = App::echo().await;
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[5432]);
    controller.allow("default/db", &["default/web"]);
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    (controller, app, db, web)
}

fn refusals(controller: &Controller, instance: &str) -> Vec<String> {
    let calls = controller.calls().into_iter();
    calls
        .filter_map(|call| match call {
            Call::Acked(by, _, error) if by.to_string() == instance && !error.is_empty() => Some(error),
            _ => None,
        })
        .collect()
}

async fn refused(controller: &Controller, instance: &str, words: &str) {
    wait_until(&format!("a refusal with {words:?}"), LIMIT, async || {
        refusals(controller, instance).iter().any(|error| error.contains(words))
    })
    .await;
}

#[tokio::test]
async fn an_older_snapshot_is_refused_also_after_a_restart() {
    let (controller, _app, mut db, _web) = pair().await;
    let old = controller.full_pull("default/db/db-1");
    let newest = controller.allow("default/db", &[]);
    db.runs(newest).await;
    // A controller that lost its newest events, and does not know it.
    let forged = v1::PullResponse {
        header: old.header.clone().map(|header| v1::SnapshotHeader {
            version: Some(wire_version(ConfigVersion::new(Epoch(1), Position(newest.position.0 - 1)))),
            ..header
        }),
        ..old
    };
    controller.script(|state| {
        state.forged.insert("default/db/db-1".parse().unwrap(), forged);
    });
    db.config_is("a word about it", |config| {
        config["refused"].as_str().is_some_and(|refused| refused.contains("older"))
    })
    .await;
    assert_eq!(db.json("/config").await["version"], newest.to_string());

    db.stop().await;
    let again = db.again().await;
    again.config_is("a word about it again", |config| config["refused"].is_string()).await;
    assert_eq!(again.json("/config").await["version"], newest.to_string());
}

#[tokio::test]
async fn a_notice_does_not_make_an_old_snapshot_new() {
    let (controller, _app, db, _web) = pair().await;
    let old = controller.full_pull("default/db/db-1");
    let newest = controller.allow("default/db", &[]);
    db.runs(newest).await;
    let instance = "default/db/db-1".parse().unwrap();
    // Announces something newer, but what can be pulled is old.
    let mut announced = controller.notice("default/db/db-1");
    announced.wanted.as_mut().unwrap().version =
        Some(wire_version(ConfigVersion::new(Epoch(1), Position(newest.position.0 + 7))));
    controller.script(|state| {
        state.forged.insert("default/db/db-1".parse().unwrap(), old);
        state.frozen.insert(instance, Some(announced));
        state.heartbeat = Duration::from_millis(100);
    });
    refused(&controller, "default/db/db-1", "is not newer than").await;
    assert_eq!(db.json("/config").await["version"], newest.to_string());
}

#[tokio::test]
async fn a_corrupted_snapshot_is_refused_and_the_old_one_goes_on() {
    let (controller, _app, db, web) = pair().await;
    let before = controller.wanted("default/db/db-1");
    let mut corrupted = controller.full_pull("default/db/db-1");
    corrupted.header.as_mut().unwrap().version =
        Some(wire_version(ConfigVersion::new(Epoch(1), Position(before.position.0 + 9))));
    // A manifest of the hash that is announced lists something that nobody has, under an event that happened.
    let mut entries = decode_entries(&corrupted.manifest).unwrap();
    for entry in entries.values_mut() {
        entry.hash = Hash::of(b"something that nobody has");
    }
    let listed = Manifest::new(entries);
    corrupted.header.as_mut().unwrap().manifest_hash = listed.hash().0.to_vec().into();
    corrupted.manifest = listed.encode().into();
    corrupted.shards[0] = shard(&corrupted.shards[0].key, b"not what the manifest says");
    controller.script(|state| {
        state.forged.insert("default/db/db-1".parse().unwrap(), corrupted);
    });
    refused(&controller, "default/db/db-1", "is missing").await;
    assert_eq!(db.json("/config").await["version"], before.to_string());
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();

    // And when the controller is itself again, it is believed again.
    controller.script(|state| state.forged.clear());
    db.runs(controller.allow("default/db", &[])).await;
    assert_eq!(db.json("/config").await["refused"], Value::Null);
}

#[tokio::test]
async fn a_sidecar_serves_from_its_disk_without_a_controller() {
    let (mut controller, _app, mut db, mut web) = pair().await;
    controller.stop();
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    // As a crash leaves it: nobody was told.
    db.stop().await;
    web.stop().await;
    let db_address = db.inbound;
    db.config.inbound_listen = db_address;
    let (db, web) = (db.again().await, web.again().await);
    db.ready().await;
    web.ready().await;
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    let config = web.json("/config").await;
    assert_eq!(config["connected"], false);
    assert!(config["control_error"].is_string());

    controller.go_on();
    db.config_is("a connected sidecar", |config| config["connected"] == true).await;
    db.runs(controller.allow("default/db", &[])).await;
    web.refuses("default/db", 5432).await;
}

#[tokio::test]
async fn without_a_snapshot_nothing_passes() {
    let (mut controller, _app, mut db, mut web) = pair().await;
    controller.stop();
    db.stop().await;
    web.stop().await;
    for sidecar in [&db, &web] {
        std::fs::remove_file(sidecar.state_dir().join("snapshot")).unwrap();
    }
    let web = web.again().await;
    web.refuses("default/db", 5432).await;
    web.record("no_snapshot").await;
    let (status, reasons) = web.page("/ready").await;
    assert_eq!(status, 503);
    assert!(reasons.contains("no snapshot yet"), "{reasons}");

    // The other side refuses as well, and says so.
    let db = db.again().await;
    wait_until("an identity", LIMIT, async || db.json("/config").await["leaf"].is_object()).await;
    let credential = controller.credential("default/web/web-1");
    let mut tunnel = crate::support::tunnel::connect(db.inbound, credential, &[b"weft/1"]).await.unwrap();
    let frame = crate::support::tunnel::open("default/db", 5432);
    let refused = crate::support::tunnel::exchange(&mut tunnel, &frame).await.unwrap().refused.unwrap();
    assert_eq!((refused.reason.as_str(), refused.version), ("no_snapshot", None));
}

#[tokio::test]
async fn a_damaged_snapshot_is_not_used_but_fetched_again() {
    let (mut controller, _app, mut db, _web) = pair().await;
    db.stop().await;
    let path = db.state_dir().join("snapshot");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    controller.stop();
    let db = db.again().await;
    wait_until("an identity", LIMIT, async || db.json("/config").await["leaf"].is_object()).await;
    assert_eq!(db.json("/config").await["version"], Value::Null);
    controller.go_on();
    db.ready().await;
    db.runs(controller.wanted("default/db/db-1")).await;
}

#[tokio::test]
async fn silence_is_told_and_passes() {
    let (controller, _app, _db, web) = pair().await;
    controller.script(|state| state.heartbeat = Duration::from_millis(100));
    web.config_is("a fresh configuration", |config| config["stale"].is_null() && config["connected"] == true)
        .await;
    controller.script(|state| state.silent = true);
    web.config_is("a stale configuration", |config| config["stale"]["since"].is_string()).await;
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    controller.script(|state| state.silent = false);
    web.config_is("a fresh configuration again", |config| config["stale"].is_null()).await;
}

#[tokio::test]
async fn a_peer_that_runs_something_newer_makes_a_sidecar_look() {
    let (controller, _app, db, web) = pair().await;
    // The db's sidecar hears of nothing any more, but its stream stays.
    controller.script(|state| {
        let told = state.frozen.insert("default/db/db-1".parse().unwrap(), None);
        assert!(told.is_none());
    });
    wait_until("the frozen notice", LIMIT, async || {
        controller.state().frozen[&"default/db/db-1".parse().unwrap()].is_some()
    })
    .await;
    let behind = db.json("/config").await["version"].clone();
    let policy = weft_model::security::SecurityPolicy {
        default: Some(weft_model::security::Action::Allow),
        ..Default::default()
    };
    // Somebody who claims more than there can be does not hide what others say.
    let credential = controller.credential("default/web/web-9");
    let mut liar = crate::support::tunnel::connect(db.inbound, credential, &[b"weft/1"]).await.unwrap();
    let mut frame = crate::support::tunnel::open("default/db", 5432);
    frame.open.as_mut().unwrap().version =
        Some(crate::support::tunnel::Version { epoch: u64::MAX, position: u64::MAX });
    let pulls = || controller.count(|call| *call == Call::Pulled("default/db/db-1".parse().unwrap()));
    let before = pulls();
    crate::support::tunnel::exchange(&mut liar, &frame).await.unwrap();
    wait_until("a look for what the liar claims", LIMIT, async || pulls() > before).await;

    let newest = controller.put_security("default", policy);
    web.runs(newest).await;
    assert_eq!(db.json("/config").await["version"], behind);
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    db.runs(newest).await;
}

/// Waits until `instance` has acked `version`; gives the error that it said with it.
async fn acked(controller: &Controller, instance: &str, version: ConfigVersion) -> String {
    let mut said = None;
    wait_until(&format!("an ack of {version}"), LIMIT, async || {
        said = controller.calls().into_iter().rev().find_map(|call| match call {
            Call::Acked(by, acked, error) if by.to_string() == instance && acked == version => Some(error),
            _ => None,
        });
        said.is_some()
    })
    .await;
    said.unwrap()
}

#[tokio::test]
async fn a_disk_that_refuses_is_told_and_stops_no_deny() {
    let (controller, _app, mut db, web) = pair().await;
    let in_the_way = db.state_dir().join("snapshot.new");
    let mut client = web.connect("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    acked(&controller, "default/db/db-1", controller.wanted("default/db/db-1")).await;

    std::fs::create_dir(&in_the_way).unwrap();
    let denied = controller.allow("default/db", &[]);
    expect_reset(&mut client).await;
    let error = acked(&controller, "default/db/db-1", denied).await;
    assert!(error.contains("not durable") && error.contains("cannot write"), "{error}");

    std::fs::remove_dir(&in_the_way).unwrap();
    let kept = controller.allow("default/db", &["default/web"]);
    assert_eq!(acked(&controller, "default/db/db-1", kept).await, "");
    db.stop().await;
    let again = db.again().await;
    again.runs(kept).await;
}

#[tokio::test]
async fn a_disk_that_hangs_holds_up_nothing_and_gets_the_newest_when_it_goes_on() {
    let (mut controller, _app, mut db, web) = pair().await;
    let pipe = db.state_dir().join("snapshot.new");
    let mut client = web.connect("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    acked(&controller, "default/db/db-1", controller.wanted("default/db/db-1")).await;

    // Opening a pipe to write waits until somebody reads from it.
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let denied = controller.allow("default/db", &[]);
    expect_reset(&mut client).await;
    assert!(acked(&controller, "default/db/db-1", denied).await.contains("not durable"));
    db.runs(controller.allow("default/db", &["default/web"])).await;
    let newest = controller.allow("default/db", &[]);
    db.runs(newest).await;

    let reader = std::fs::OpenOptions::new().read(true).open(&pipe).unwrap();
    std::fs::remove_file(&pipe).unwrap();
    wait_until("an ack that says that it is durable", LIMIT, async || {
        acked(&controller, "default/db/db-1", newest).await.is_empty()
    })
    .await;
    drop(reader);
    db.stop().await;
    controller.stop();
    db.again().await.runs(newest).await;
}

#[tokio::test]
async fn a_controller_with_too_much_to_do_is_asked_again_on_the_same_stream() {
    let (controller, _app, db, _web) = pair().await;
    let instance = || "default/db/db-1".parse().unwrap();
    controller.script(|state| {
        state.calls.clear();
        state.overloaded = 3;
    });
    db.runs(controller.allow("default/db", &[])).await;
    assert!(controller.count(|call| *call == Call::Pulled(instance())) >= 2);
    assert_eq!(controller.count(|call| matches!(call, Call::Subscribed(_))), 0);
}

#[tokio::test]
async fn a_new_stream_does_not_undo_a_drain_and_a_refused_one_is_no_session() {
    let (controller, _app, db, _web) = pair().await;
    let instance: weft_model::InstanceId = "default/db/db-1".parse().unwrap();
    let health = |call: &Call| matches!(call, Call::Health(by, ..) if *by == instance);
    wait_until("the first report", LIMIT, async || controller.count(health) == 1).await;
    let drain = weft_model::membership::MembershipCommand::Drain;
    controller.commit(weft_model::Command::Membership(instance.clone(), drain));
    // It comes back to a controller that lags: which does not know the instance yet.
    let lagging = v1::Notice { wanted: None, ..controller.notice("default/db/db-1") };
    controller.script(|state| {
        state.frozen.insert(instance.clone(), Some(lagging));
        state.refuse_subscribers = true;
        state.calls.clear();
        state.end_streams();
    });
    let subscribed = |call: &Call| *call == Call::Subscribed(instance.clone());
    wait_until("three attempts", LIMIT, async || controller.count(subscribed) >= 3).await;
    assert_eq!(controller.count(health), 0, "nobody was there to report to");

    controller.script(|state| state.refuse_subscribers = false);
    db.config_is("the lagging notice", |config| config["connected"] == true && config["wanted"].is_null())
        .await;
    wait_until("a report on the new stream", LIMIT, async || controller.count(health) == 1).await;
    assert_eq!(controller.count(|call| *call == Call::Registered(instance.clone())), 0);
}

#[tokio::test]
async fn another_controller_takes_over() {
    let (mut first, app) = (Controller::start(), App::echo().await);
    first.declare("default/db", &[5432]);
    let dead = crate::support::app::dead_address();
    let db = Sidecar::start(&first, "default/db/db-1", |config| {
        config.controllers.insert(0, dead.to_string().parse().unwrap());
        config.apps.insert(weft_model::Port::new(5432).unwrap(), app.address);
    })
    .await;
    db.ready().await;
    first.stop();
    db.config_is("a lost controller", |config| config["connected"] == false).await;
    first.go_on();
    db.config_is("a found one", |config| config["connected"] == true).await;
}

#[tokio::test]
async fn loopback_addresses_follow_the_services() {
    let app = App::named("!").await;
    let controller = Controller::start();
    let [one, two, taken] = [(); 3].map(|()| reserve_loopback_port());
    controller.declare("default/db", &[one]);
    controller.declare("default/web", &[1]);
    controller.allow("default/db", &["default/web"]);
    let db = Sidecar::start(&controller, "default/db/db-1", |config| {
        for port in [one, two] {
            config.apps.insert(weft_model::Port::new(port).unwrap(), app.address);
        }
    })
    .await;
    db.ready().await;
    let web = Sidecar::start(&controller, "default/web/web-1", |config| {
        config.all_upstreams = true;
        config.loopback_addresses = true;
    })
    .await;
    web.sees("default/db", 1).await;
    let config = web.json("/config").await;
    let shards = config["endpoints"].as_array().unwrap();
    let shard = shards.iter().find(|shard| shard["service"] == "default/db").unwrap();
    let address = |port: u16| -> SocketAddr {
        format!("{}:{port}", shard["address"].as_str().unwrap()).parse().unwrap()
    };
    let reaches = async |port: u16| match TcpStream::connect(address(port)).await {
        Ok(mut stream) => tokio::io::AsyncReadExt::read_u8(&mut stream).await.is_ok(),
        Err(_) => false,
    };
    wait_until("the first port", LIMIT, async || reaches(one).await).await;

    // One port goes, one comes, and one is taken by somebody else.
    let _squatter = TcpListener::bind(address(taken)).unwrap();
    controller.declare("default/db", &[two, taken]);
    wait_until("the second port", LIMIT, async || reaches(two).await).await;
    wait_until("the first port's end", LIMIT, async || TcpStream::connect(address(one)).await.is_err()).await;
    web.config_is("the taken port", |config| {
        let failed = &config["failed_listeners"][address(taken).to_string()];
        failed.as_str().is_some_and(|error| error.contains("is already used"))
    })
    .await;
    assert_eq!(web.page("/ready").await.0, 200);
}

#[tokio::test]
async fn an_unregistered_service_is_waited_for() {
    let controller = Controller::start();
    let web = Sidecar::start(&controller, "default/web/web-1", |config| {
        config.upstreams.push(upstream("default/db", 5432));
    })
    .await;
    web.config_is("the controller's refusal", |config| {
        config["control_error"].as_str().is_some_and(|error| error.contains("default/web"))
    })
    .await;
    assert_eq!(web.page("/ready").await.0, 503);
    controller.declare("default/web", &[80]);
    web.ready().await;
}
