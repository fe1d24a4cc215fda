//! Upstreams on demand: a service becomes one when the app first connects to it, and not before.

use crate::support::app::{expect_reset, ping};
use crate::support::controller::Call;
use crate::support::sidecar::upstream;
use crate::support::{App, Controller, LIMIT, Sidecar};
use weft_model::Command;
use weft_model::membership::{MembershipCommand, Upstreams};
use weft_testkit::wait_until;

/// `db` behind a sidecar, and `web` before one, whose app may come to need `db` and one that does not exist.
async fn pair(controller: &Controller, app: &App) -> (Sidecar, Sidecar) {
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[8080]);
    controller.allow("default/db", &["default/web"]);
    let db = Sidecar::serving(controller, "default/db/db-1", 5432, app.address).await;
    let web = Sidecar::start(controller, "default/web/web-1", |config| {
        config.on_demand = vec![upstream("default/db", 5432), upstream("default/none", 80)];
    })
    .await;
    web.ready().await;
    web.runs(controller.wanted("default/web/web-1")).await;
    (db, web)
}

fn asked(controller: &Controller) -> usize {
    controller.count(|call| matches!(call, Call::UpstreamAsked(..)))
}

/// What the instance may connect to; none while it takes no part.
fn upstreams(controller: &Controller) -> Option<Upstreams> {
    let state = controller.state();
    let entry = state.projection.state().membership(&"default/web/web-1".parse().unwrap())?;
    Some(entry.state.registration()?.upstreams.clone())
}

fn only_db() -> Upstreams {
    Upstreams::Only(["default/db".parse().unwrap()].into())
}

async fn holds(sidecar: &Sidecar) -> usize {
    sidecar.json("/config").await["endpoints"].as_array().unwrap().len()
}

#[tokio::test]
async fn the_first_connection_adds_its_service_and_proceeds() {
    let (controller, app) = (Controller::start(), App::echo().await);
    let (_db, mut web) = pair(&controller, &app).await;
    assert_eq!((holds(&web).await, asked(&controller)), (0, 0));

    let mut first = web.connect("default/db", 5432).await;
    ping(&mut first).await.unwrap();
    assert_eq!(upstreams(&controller), Some(only_db()));
    assert_eq!(holds(&web).await, 1);
    // From then on it is an upstream like others: nobody is asked, and it is there without a controller.
    let before = asked(&controller);
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    assert_eq!((before, asked(&controller)), (1, 1));

    // Also after a restart, which does not take it back from those who are connected.
    web.stop().await;
    let web = web.again().await;
    web.sees("default/db", 1).await;
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    wait_until("its registration", LIMIT, async || upstreams(&controller) == Some(only_db())).await;
    assert_eq!(asked(&controller), 1);
}

#[tokio::test]
async fn many_first_connections_wait_for_one_addition() {
    let (controller, app) = (Controller::start(), App::echo().await);
    let (_db, web) = pair(&controller, &app).await;
    let pings = (0..40).map(|_| async { ping(&mut web.connect("default/db", 5432).await).await.unwrap() });
    futures_util::future::join_all(pings).await;
    assert_eq!(upstreams(&controller), Some(only_db()));
    assert!(asked(&controller) < 40, "whoever waits for the same is answered with it");
}

#[tokio::test]
async fn what_does_not_exist_or_is_not_admitted_is_refused_by_name_and_not_added() {
    let (controller, app) = (Controller::start(), App::echo().await);
    let (_db, web) = pair(&controller, &app).await;
    expect_reset(&mut web.connect("default/none", 80).await).await;
    let unknown = web.record("no_snapshot").await;
    assert!(unknown["detail"].as_str().unwrap().contains("default/none is not declared"), "{unknown}");

    controller.allow("default/db", &[]);
    expect_reset(&mut web.connect("default/db", 5432).await).await;
    let denied = web.record("policy_denied").await;
    assert_eq!(
        (denied["rule"].as_str(), denied["closed_by"].as_str()),
        (Some("security/default/db#default"), Some("local"))
    );
    assert_eq!(upstreams(&controller), Some(Upstreams::Only([].into())));
    assert_eq!(holds(&web).await, 0);

    // A refusal is not remembered: the next connection asks again.
    controller.allow("default/db", &["default/web"]);
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
}

#[tokio::test]
async fn without_a_controller_the_wait_is_bounded_and_what_was_added_goes_on() {
    let (mut controller, app) = (Controller::start(), App::echo().await);
    let (_db, web) = pair(&controller, &app).await;
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    controller.stop();
    let mut waiting = web.connect("default/none", 80).await;
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    expect_reset(&mut waiting).await;
    let record = web.record("no_snapshot").await;
    assert!(record["detail"].as_str().unwrap().contains("not there after 5s"), "{record}");
}

#[tokio::test]
async fn a_sidecar_that_drains_still_adds_what_its_app_needs() {
    let (controller, app) = (Controller::start(), App::echo().await);
    let (_db, web) = pair(&controller, &app).await;
    let drain = MembershipCommand::Drain;
    controller.commit(Command::Membership("default/web/web-1".parse().unwrap(), drain));
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    let state = controller.state();
    let entry = state.projection.state().membership(&"default/web/web-1".parse().unwrap()).unwrap();
    assert_eq!(entry.state.as_str(), "draining", "an addition is no registration");
}
