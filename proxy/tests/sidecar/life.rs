//! Starting, being watched, stopping.

use crate::support::app::{expect_reset, ping};
use crate::support::controller::Call;
use crate::support::sidecar::{config, metrics};
use crate::support::{App, Controller, LIMIT, Sidecar};
use std::net::TcpListener;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use weft_model::health::{Health, HealthCommand, HealthReported};
use weft_model::{Command, InstanceId, Port};
use weft_proto::v1;
use weft_proxy::{JoinError, Proxy, StartError};
use weft_testkit::wait_until;

fn db_1() -> InstanceId {
    "default/db/db-1".parse().unwrap()
}

fn controller() -> Controller {
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[5432]);
    controller.allow("default/db", &["default/web"]);
    controller
}

fn reports(controller: &Controller) -> Vec<(Health, u64)> {
    let calls = controller.calls().into_iter();
    calls
        .filter_map(|call| match call {
            Call::Health(instance, health, revision) if instance == db_1() => Some((health, revision)),
            _ => None,
        })
        .collect()
}

#[tokio::test]
async fn a_used_address_is_named() {
    let controller = controller();
    let dir = tempfile::tempdir().unwrap();
    let squatter = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = squatter.local_addr().unwrap();
    let base = || config(&controller, "default/db/db-1", dir.path());
    let mut inbound = base();
    inbound.inbound_listen = taken;
    let mut admin = base();
    admin.admin_listen = taken;
    let mut outbound = base();
    let mut upstream = crate::support::sidecar::upstream("default/web", 5432);
    upstream.listen = Some(taken);
    outbound.upstreams.push(upstream);
    for (config, flag) in [(inbound, "--inbound-listen"), (admin, "--admin-listen"), (outbound, "--upstream")]
    {
        let Err(error) = Proxy::bind(config, metrics()).await else { panic!("{flag} was bound twice") };
        assert!(error.to_string().contains(flag), "{error}");
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.starts_with(&format!("address {taken} is already used; ")), "{cause}");
    }
}

#[tokio::test]
async fn two_sidecars_do_not_share_an_address() {
    let controller = controller();
    let first = Sidecar::start(&controller, "default/db/db-1", |_| ()).await;
    let dir = tempfile::tempdir().unwrap();
    let mut second = config(&controller, "default/db/db-2", dir.path());
    second.inbound_listen = first.inbound;
    assert!(matches!(Proxy::bind(second, metrics()).await, Err(StartError::Listen { .. })));
}

#[tokio::test]
async fn a_used_token_is_an_error_with_the_next_step() {
    let controller = controller();
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(&controller, "default/db/db-1", dir.path());
    let run =
        async |config| Proxy::bind(config, metrics()).await.unwrap().run(CancellationToken::new()).await;
    controller.state().forget_tokens();
    let error = run(config.clone()).await.unwrap_err();
    let StartError::Join(refused @ JoinError::Refused { .. }) = &error else { panic!("{error:?}") };
    assert!(refused.to_string().contains("was used already"), "{refused}");
    assert!(refused.to_string().contains("weft token create --service default/db"), "{refused}");

    config.join_token = None;
    let error = run(config).await.unwrap_err();
    assert!(matches!(error, StartError::Join(JoinError::NoToken { .. })), "{error:?}");
    assert!(!dir.path().join("state").exists());
}

#[tokio::test]
async fn a_token_is_not_used_up_for_a_directory_that_cannot_be_written() {
    let controller = controller();
    let dir = tempfile::tempdir().unwrap();
    let config = config(&controller, "default/db/db-1", dir.path());
    std::os::unix::fs::symlink("/nonexistent/volume", &config.state_dir).unwrap();
    let proxy = Proxy::bind(config, metrics()).await.unwrap();
    let error = proxy.run(CancellationToken::new()).await.unwrap_err();
    let StartError::Join(error @ JoinError::StateDir { .. }) = &error else { panic!("{error:?}") };
    assert!(error.to_string().contains("--state-dir"), "{error}");
    assert_eq!(controller.calls(), []);
}

#[tokio::test]
async fn a_sidecar_joins_as_soon_as_there_is_a_controller() {
    let mut controller = controller();
    let app = App::echo().await;
    controller.stop();
    let sidecar = Sidecar::start(&controller, "default/db/db-1", |config| {
        config.apps.insert(Port::new(5432).unwrap(), app.address);
    })
    .await;
    assert_eq!(sidecar.page("/ready").await.0, 503);
    assert_eq!(sidecar.page("/live").await.0, 200);
    controller.go_on();
    sidecar.ready().await;
    assert_eq!(controller.calls()[..2], [Call::Joined(db_1()), Call::Registered(db_1())]);
}

#[tokio::test]
async fn another_instances_state_is_not_used() {
    let controller = controller();
    let mut first = Sidecar::start(&controller, "default/db/db-1", |_| ()).await;
    first.ready().await;
    first.stop().await;
    first.config.instance = "default/db/db-2".parse().unwrap();
    let mut second = first.again().await;
    let error = second.stopped().await.unwrap_err();
    assert!(matches!(error, StartError::Join(JoinError::Foreign { .. })), "{error:?}");
}

#[tokio::test]
async fn health_is_reported_with_a_rising_revision() {
    let controller = controller();
    // Somebody reported before, with a clock far ahead.
    let ahead = u64::MAX / 2;
    let app = App::echo().await;
    let mut sidecar = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    wait_until("the first report", LIMIT, async || !reports(&controller).is_empty()).await;
    let report = HealthReported {
        health: Health::Unhealthy,
        revision: ahead,
        doubt: Some(0),
        detail: "not by the sidecar".into(),
    };
    controller.commit(Command::Health(db_1(), HealthCommand::Report(report)));

    app.gone().await;
    wait_until("the app's end", LIMIT, async || reports(&controller).len() == 2).await;
    let all = reports(&controller);
    assert_eq!((all[0].0, all[1].0), (Health::Healthy, Health::Unhealthy));
    assert!(all[1].1 > ahead, "jumped above what was recorded: {all:?}");

    // Told again to a controller that it connects to anew.
    let mut controller = controller;
    controller.stop();
    sidecar.config_is("a lost controller", |config| config["connected"] == false).await;
    controller.go_on();
    wait_until("the report to the new connection", LIMIT, async || reports(&controller).len() >= 3).await;
    let all = reports(&controller);
    assert!(all.windows(2).all(|pair| pair[0].1 < pair[1].1), "{all:?}");
    sidecar.stop().await;
}

#[tokio::test]
async fn an_unhealthy_app_gets_no_connections_until_it_is_back() {
    let controller = controller();
    let app = App::echo().await;
    let address = app.address;
    let _db = Sidecar::serving(&controller, "default/db/db-1", 5432, address).await;
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    app.gone().await;
    web.sees("default/db", 0).await;
    web.refuses("default/db", 5432).await;
    web.record("no_healthy_endpoint").await;

    let _back = App::echo_at(address).await;
    web.sees("default/db", 1).await;
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
}

#[tokio::test]
async fn a_stop_waits_for_connections_that_end() {
    let controller = controller();
    let app = App::echo().await;
    let mut db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    let mut client = web.connect("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    db.begin_stop();
    wait_until("the withdrawal", LIMIT, async || controller.calls().contains(&Call::Drained(db_1()))).await;
    web.sees("default/db", 0).await;
    ping(&mut client).await.unwrap();
    drop(client);
    db.stopped().await.unwrap();
    db.record("client_fin").await;
    assert_eq!(db.records().len(), 1);
    let told = controller
        .calls()
        .into_iter()
        .filter(|call| matches!(call, Call::Drained(_) | Call::Deregistered(_)));
    assert_eq!(told.collect::<Vec<_>>(), [Call::Drained(db_1()), Call::Deregistered(db_1())]);
    assert!(tokio::net::TcpStream::connect(db.inbound).await.is_err());
}

#[tokio::test]
async fn a_stop_cuts_what_is_left_at_the_deadline() {
    let controller = controller();
    let app = App::echo().await;
    let mut db = Sidecar::start(&controller, "default/db/db-1", |config| {
        config.apps.insert(Port::new(5432).unwrap(), app.address);
        config.drain_deadline = Duration::from_millis(300);
    })
    .await;
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    let mut client = web.connect("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    db.stop().await;
    expect_reset(&mut client).await;
    assert_eq!(db.record("drain_deadline").await["closed_by"], "local");
    web.record("server_reset").await;
}

#[tokio::test]
async fn a_stop_finds_who_has_not_yet_said_what_it_wants() {
    let controller = controller();
    let app = App::echo().await;
    let mut db = Sidecar::start(&controller, "default/db/db-1", |config| {
        config.apps.insert(Port::new(5432).unwrap(), app.address);
        config.drain_deadline = Duration::from_millis(300);
    })
    .await;
    db.ready().await;
    let credential = controller.credential("default/web/web-9");
    let _tunnel = crate::support::tunnel::connect(db.inbound, credential, &[b"weft/1"]).await.unwrap();
    db.stop().await;
    assert_eq!(db.record("drain_deadline").await["direction"], "inbound");
}

#[tokio::test]
async fn a_stop_without_a_controller_is_bounded() {
    let mut controller = controller();
    let app = App::echo().await;
    let mut db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    controller.stop();
    db.stop().await;
}

#[tokio::test]
async fn a_patch_that_does_not_fit_is_pulled_instead() {
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    let app = App::echo().await;
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    db.runs(controller.wanted("default/db/db-1")).await;
    let told = controller.state().header(&"default/db/db-1".parse().unwrap()).unwrap();
    let base = u32::from_be_bytes(told.manifest_hash[..4].try_into().unwrap());
    let junk = v1::ShardPatch { delta_zstd: b"junk".to_vec().into(), length: 9, ..v1::ShardPatch::default() };
    controller.script(|state| state.patch = Some(v1::Patch { base, shards: vec![junk] }));
    controller.allow("default/db", &["default/db"]);
    db.runs(controller.wanted("default/db/db-1")).await;
}
