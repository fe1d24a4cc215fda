//! A fleet on a real controller and a real database.

#![expect(clippy::unwrap_used, reason = "a helper of tests fails the test that called it")]

use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use weft_controller::{Config, Controller, clock};
use weft_fleet::profile::{self, Pace, Profile};
use weft_fleet::{Fleet, FleetError, Mesh, Plan, Reading};
use weft_identity::credential::Credential;
use weft_identity::tls::TlsIdentity;
use weft_testkit::TestDatabase;

struct TestMesh {
    _database: TestDatabase,
    _state: TempDir,
    controller: Controller,
    mesh: Mesh,
}

impl TestMesh {
    async fn start() -> Self {
        let (database, state) = (TestDatabase::create().await, tempfile::tempdir().unwrap());
        let config = Config {
            database_url: database.url().into(),
            listen: "127.0.0.1:0".parse().unwrap(),
            admin_listen: "127.0.0.1:0".parse().unwrap(),
            state_dir: state.path().into(),
            trust_domain: "weft.test".parse().unwrap(),
            name: "c1".parse().unwrap(),
            allow_unsafe_database: true,
        };
        let controller = Controller::start(config, Arc::new(clock::now), None).await.unwrap();
        let credential = Credential::load(controller.admin_credential()).unwrap();
        let mesh = Mesh {
            controllers: vec![controller.address().to_string().parse().unwrap()],
            operator: TlsIdentity::new(credential),
        };
        Self { _database: database, _state: state, controller, mesh }
    }
}

fn plan(per_connection: usize) -> Plan {
    let (namespace, also) = ("sim".parse().unwrap(), Vec::new());
    let reading = Reading::Freely;
    Plan { namespace, sidecars: 9, endpoints: 3, interested: 7, also, per_connection, reading }
}

async fn goes_through_everything(per_connection: usize) {
    let test = TestMesh::start().await;
    let mut fleet = Fleet::enroll(test.mesh.clone(), plan(per_connection), |_| {}).await.unwrap();
    fleet.subscribe(|_| {}).await.unwrap();
    let pace = Pace { changes: 4, pause: Duration::ZERO };
    for profile in Profile::ALL {
        let outcome = profile::run(&fleet, profile, pace, |_| {}).await.unwrap();
        assert_eq!((outcome.faults, outcome.refused), (0, 0), "{outcome:?}");
        assert!(outcome.changes > 0 && outcome.converged.max_ms > 0.0, "{outcome:?}");
        if profile == Profile::Endpoint {
            // Each change came as a patch to whom it concerns, and to nobody else.
            assert_eq!((outcome.notices_per_change, outcome.pulls), (1.0, 0), "{outcome:?}");
        }
    }
    // The mesh damps an endpoint that flaps: what it hides does not spread, and nobody waits for it.
    let flapping = Pace { changes: 16, pause: Duration::ZERO };
    let outcome = profile::run(&fleet, Profile::Flap, flapping, |_| {}).await.unwrap();
    assert!((1..16).contains(&outcome.changes), "{outcome:?}");
    // Nothing changed for them while they were away, so nothing was pulled.
    let before = fleet.counts();
    fleet.cut(|_| {}).await.unwrap();
    assert_eq!(fleet.counts().pulls, before.pulls);

    let instances = test.controller.view().read(|projection| projection.sidecars().count());
    assert_eq!(instances, 12);
    fleet.leave().await.unwrap();
    let gone = test.controller.view().read(|projection| projection.sidecars().count());
    assert_eq!(gone, 0);
    test.controller.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_with_a_connection_each_goes_through_everything() {
    goes_through_everything(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_behind_relays_goes_through_everything() {
    goes_through_everything(5).await;
}

#[tokio::test]
async fn a_plan_that_makes_no_sense_is_refused_before_anything_is_done() {
    let test = TestMesh::start().await;
    let plans = [
        Plan { endpoints: 0, ..plan(1) },
        Plan { interested: 10, ..plan(1) },
        Plan { interested: 0, ..plan(1) },
        plan(0),
    ];
    let head = test.controller.view().read(weft_routing::Projection::version);
    for plan in plans {
        let refused = Fleet::enroll(test.mesh.clone(), plan, |_| {}).await.unwrap_err();
        assert!(matches!(refused, FleetError::Plan(_)), "{refused}");
    }
    assert_eq!(test.controller.view().read(weft_routing::Projection::version), head);
    test.controller.stop().await;
}

/// The controller tells a stuck sidecar nothing once its connection is full, and cuts it off before long; the others never notice.
#[tokio::test(flavor = "multi_thread")]
async fn slow_readers_delay_nobody_and_are_cut_off() {
    let test = TestMesh::start().await;
    let healthy = plan(1);
    let also = vec![healthy.target().unwrap()];
    let mut healthy = Fleet::enroll(test.mesh.clone(), healthy, |_| {}).await.unwrap();
    healthy.subscribe(|_| {}).await.unwrap();
    let mut slow = Vec::new();
    for (namespace, reading) in [("stuck", Reading::Never), ("slow", Reading::Slowly)] {
        let plan = Plan {
            namespace: namespace.parse().unwrap(),
            sidecars: 8,
            endpoints: 1,
            interested: 8,
            also: also.clone(),
            reading,
            ..plan(1)
        };
        let mut fleet = Fleet::enroll(test.mesh.clone(), plan, |_| {}).await.unwrap();
        fleet.subscribe(|_| {}).await.unwrap();
        fleet.hold_back();
        slow.push(fleet);
    }
    let cut_off = |slow: &[Fleet]| slow.iter().all(|fleet| fleet.counts().faults > 0);
    while !cut_off(&slow) {
        let pace = Pace { changes: 10, pause: Duration::from_millis(50) };
        let outcome = profile::run(&healthy, Profile::Policy, pace, |_| {}).await.unwrap();
        assert_eq!((outcome.faults, outcome.refused, outcome.pulls), (0, 0, 0), "{outcome:?}");
    }
    test.controller.stop().await;
}
