//! Who may connect: refused before the app hears of it, and cut when a policy changes.

use crate::support::app::{expect_reset, ping};
use crate::support::{App, Controller, LIMIT, Sidecar};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;
use weft_model::security::{Action, Mode, OnChange, Rule, SecurityPolicy, Sources};
use weft_testkit::wait_until;

async fn three() -> (Controller, App, Sidecar, Sidecar, Sidecar) {
    let app = App::echo().await;
    let controller = Controller::start();
    for service in ["default/db", "default/web", "default/api"] {
        controller.declare(service, &[5432]);
    }
    controller.allow("default/db", &["default/web", "default/api"]);
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    let api = Sidecar::calling(&controller, "default/api/api-1", "default/db", 5432, 1).await;
    (controller, app, db, web, api)
}

#[tokio::test]
async fn a_denied_connection_says_why_on_both_sides() {
    let (controller, _app, db, web, api) = three().await;
    db.runs(controller.allow("default/db", &["default/api"])).await;
    ping(&mut api.connect("default/db", 5432).await).await.unwrap();
    web.refuses("default/db", 5432).await;
    let (there, here) = (db.record("policy_denied").await, web.record("policy_denied").await);
    assert_eq!(there["connection_id"], here["connection_id"]);
    for record in [&there, &here] {
        assert_eq!(record["rule"], "security/default/db#default");
        assert_eq!(record["bytes_up"], 0);
    }
    assert!(there["peer"].is_string() && there["peer"] != there["source"], "{there}");
    assert!(here["peer"].is_null());
    assert_eq!((there["closed_by"].as_str(), here["closed_by"].as_str()), (Some("local"), Some("server")));
    assert_eq!(here["attempts"], 1, "a policy speaks for every instance: no retry");
}

#[tokio::test]
async fn a_policy_change_cuts_what_it_denies_and_nothing_else() {
    let (controller, _app, db, web, api) = three().await;
    let mut denied = web.connect("default/db", 5432).await;
    let mut allowed = api.connect("default/db", 5432).await;
    ping(&mut denied).await.unwrap();
    ping(&mut allowed).await.unwrap();

    let version = controller.allow("default/db", &["default/api"]);
    expect_reset(&mut denied).await;
    let cut = db.record("policy_changed").await;
    assert_eq!(cut["rule"], "security/default/db#default");
    assert!(cut["detail"].as_str().unwrap().contains(&version.to_string()), "{cut}");
    assert_eq!(cut["bytes_up"], 4);
    web.record("server_reset").await;

    ping(&mut allowed).await.unwrap();
    assert_eq!(db.records().len(), 1);
    controller.allow("default/db", &["default/web"]);
    expect_reset(&mut allowed).await;
    db.runs(controller.wanted("default/db/db-1")).await;
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
}

fn rule(action: Action, from: Sources) -> Rule {
    Rule { name: "named".parse().unwrap(), action, from, ports: [].into() }
}

fn from(service: &str) -> Sources {
    Sources { services: [service.parse().unwrap()].into(), ..Sources::default() }
}

/// Nobody may connect any more, and this becomes of who is connected.
fn closed(on_change: OnChange, rules: Vec<Rule>) -> SecurityPolicy {
    SecurityPolicy {
        default: Some(Action::Deny),
        on_change: Some(on_change),
        rules,
        ..SecurityPolicy::default()
    }
}

#[tokio::test]
async fn a_grace_ends_when_it_is_over_and_not_before() {
    const GRACE: Duration = Duration::from_millis(700);
    let (controller, _app, db, web, api) = three().await;
    let mut forbidden = web.connect("default/db", 5432).await;
    let mut permitted = api.connect("default/db", 5432).await;
    ping(&mut forbidden).await.unwrap();
    ping(&mut permitted).await.unwrap();
    let grace = OnChange::Grace(GRACE.as_millis().try_into().unwrap());
    let api_may = rule(Action::Allow, from("default/api"));
    let begun = Instant::now();
    let version = controller.put_security("default/db", closed(grace, vec![api_may]));
    db.runs(version).await;
    web.refuses("default/db", 5432).await;
    let live = db.json("/connections").await;
    let spared: Vec<_> = live.as_array().unwrap().iter().filter_map(|it| it.get("forbidden")).collect();
    assert_eq!(spared.len(), 1, "{live}");
    assert_eq!(
        (&spared[0]["on_change"], &spared[0]["as_of"]),
        (&"grace".into(), &version.to_string().into())
    );
    assert!(spared[0]["ends"].is_string(), "{live}");
    ping(&mut forbidden).await.unwrap();
    assert!(db.page("/metrics").await.1.contains("weft_connections_forbidden{on_change=\"grace\"} "));

    expect_reset(&mut forbidden).await;
    assert!(begun.elapsed() >= GRACE, "{:?}", begun.elapsed());
    let cut = db.record("policy_changed").await;
    assert_eq!(
        (&cut["rule"], &cut["forbidden"]["rule"]),
        (&"security/default/db#default".into(), &cut["rule"])
    );
    assert!(cut["detail"].as_str().unwrap().ends_with("its grace is over"), "{cut}");
    ping(&mut permitted).await.unwrap();
    assert_eq!(db.records().iter().filter(|record| record["close_reason"] == "policy_changed").count(), 1);
}

#[tokio::test]
async fn a_connection_that_is_permitted_again_has_no_grace_any_more() {
    let (controller, _app, db, web, api) = three().await;
    let mut again = web.connect("default/db", 5432).await;
    let mut never = api.connect("default/db", 5432).await;
    ping(&mut again).await.unwrap();
    ping(&mut never).await.unwrap();
    let grace = OnChange::Grace(600);
    db.runs(controller.put_security("default/db", closed(grace, vec![]))).await;
    let web_may = rule(Action::Allow, from("default/web"));
    db.runs(controller.put_security("default/db", closed(grace, vec![web_may]))).await;
    // Both got it by the same snapshot, so when it is over for one it would be for the other.
    expect_reset(&mut never).await;
    ping(&mut again).await.unwrap();
    let live = db.json("/connections").await;
    assert!(live.as_array().unwrap().iter().all(|live| live["forbidden"].is_null()), "{live}");
}

#[tokio::test]
async fn who_is_kept_goes_on_and_says_that_it_is_forbidden() {
    let (controller, _app, db, web, _api) = three().await;
    let mut client = web.connect("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    let version = controller.put_security("default/db", closed(OnChange::Keep, vec![]));
    db.runs(version).await;
    web.refuses("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    drop(client);
    let record = db.record("client_fin").await;
    assert_eq!((&record["forbidden"]["on_change"], &record["bytes_up"]), (&"keep".into(), &8.into()));
    assert!(record["forbidden"]["ends"].is_null(), "{record}");
    assert_eq!(record["rule"], "security/default/db#the-test-allows");
}

#[tokio::test]
async fn who_is_denied_by_name_is_cut_whatever_is_kept() {
    let (controller, _app, db, web, api) = three().await;
    let mut named = web.connect("default/db", 5432).await;
    let mut kept = api.connect("default/db", 5432).await;
    ping(&mut named).await.unwrap();
    ping(&mut kept).await.unwrap();
    // The policy of the service keeps everybody; the one of its namespace denies one by name.
    db.runs(controller.put_security("default/db", closed(OnChange::Keep, vec![]))).await;
    let deny = rule(Action::Deny, from("default/web"));
    controller.put_security("default", closed(OnChange::Keep, vec![deny]));
    expect_reset(&mut named).await;
    assert_eq!(db.record("policy_changed").await["rule"], "security/default#named");
    ping(&mut kept).await.unwrap();
}

#[tokio::test]
async fn a_port_that_is_gone_takes_its_connections_along_whatever_is_kept() {
    let (controller, _app, db, web, _api) = three().await;
    let mut client = web.connect("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    db.runs(controller.put_security("default/db", closed(OnChange::Keep, vec![]))).await;
    ping(&mut client).await.unwrap();
    controller.declare("default/db", &[1]);
    expect_reset(&mut client).await;
}

#[tokio::test]
async fn the_app_sees_a_cut_as_a_reset() {
    let (app, mut heard) = App::listening().await;
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[5432]);
    controller.allow("default/db", &["default/web"]);
    let _db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    let mut client = web.connect("default/db", 5432).await;
    client.write_all(b"?").await.unwrap();
    client.read_exact(&mut [0]).await.unwrap();
    controller.allow("default/db", &[]);
    let heard = tokio::time::timeout(LIMIT, heard.recv()).await.unwrap().unwrap();
    assert_eq!(heard, Err(std::io::ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn an_audited_refusal_passes_and_is_recorded() {
    let (controller, _app, db, web, _api) = three().await;
    let audit =
        SecurityPolicy { default: Some(Action::Deny), mode: Mode::Audit, ..SecurityPolicy::default() };
    // The namespace's policy would deny by default; the service's own allows by default.
    let open = SecurityPolicy { default: Some(Action::Allow), ..SecurityPolicy::default() };
    controller.put_security("default", open);
    db.runs(controller.put_security("default/db", audit)).await;
    let mut client = web.connect("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    drop(client);
    let record = db.record("client_fin").await;
    assert_eq!(
        (record["mode"].as_str(), record["rule"].as_str()),
        (Some("audit"), Some("security/default/db#default"))
    );
}

#[tokio::test]
async fn connections_to_an_endpoint_that_left_are_cut_by_the_client() {
    let (controller, _app, db, web, _api) = three().await;
    let mut client = web.connect("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    let gone = weft_model::membership::MembershipCommand::Deregister;
    controller.commit(weft_model::Command::Membership("default/db/db-1".parse().unwrap(), gone));
    expect_reset(&mut client).await;
    assert_eq!(web.record("endpoint_removed").await["closed_by"], "local");
    db.record("client_reset").await;
}

#[tokio::test]
async fn ports_that_are_not_there_are_refused() {
    let (controller, _app, _db, web, _api) = three().await;
    let other = Sidecar::start(&controller, "default/api/api-2", |config| {
        config.upstreams.push(crate::support::sidecar::upstream("default/db", 1));
        config.upstreams.push(crate::support::sidecar::upstream("default/unknown", 1));
    })
    .await;
    other.sees("default/db", 1).await;
    other.refuses("default/db", 1).await;
    assert!(other.record("no_snapshot").await["detail"].as_str().unwrap().contains("declares no port 1"));
    other.refuses("default/unknown", 1).await;
    wait_until("the second refusal", LIMIT, async || {
        other
            .records()
            .iter()
            .any(|record| record["detail"].as_str().unwrap().contains("no service default/unknown"))
    })
    .await;
    drop(web);
}

#[tokio::test]
async fn metrics_and_pages_tell_what_happens() {
    let (controller, _app, db, web, _api) = three().await;
    let mut client = web.connect("default/db", 5432).await;
    ping(&mut client).await.unwrap();
    let live = web.json("/connections").await;
    assert_eq!(live.as_array().unwrap().len(), 1);
    assert_eq!((&live[0]["bytes_up"], &live[0]["destination"]), (&4.into(), &"default/db".into()));

    // Each sidecar counts what its own live connections moved when it is asked; the counters are the process's.
    assert_eq!(web.page("/metrics").await.0, 200);
    let (status, text) = db.page("/metrics").await;
    assert_eq!(status, 200);
    for line in [
        "weft_connections_opened_total{direction=\"inbound\"}",
        "weft_bytes_total{direction=\"outbound\",bytes=\"down\"}",
        "weft_authorizations_total{verdict=\"allow\",mode=\"enforce\"}",
        "weft_config_position{kind=\"applied\"}",
        "weft_leaf_expiry_timestamp_seconds",
        "weft_connect_seconds_bucket",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let config = db.json("/config").await;
    assert_eq!(config["instance"], "default/db/db-1");
    assert_eq!(config["version"], controller.wanted("default/db/db-1").to_string());
    assert_eq!(config["inbound"]["policies"][0]["policy"]["default"], "deny");
    assert_eq!(config["shards"].as_array().unwrap().len(), 2);
    assert_eq!((db.page("/live").await.0, db.page("/nothing").await.0), (200, 404));
}
