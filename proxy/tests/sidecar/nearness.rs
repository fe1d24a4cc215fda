//! Near endpoints first, and subsets: what a sidecar says of itself reaches the others, and their policies go by it.

use crate::support::app::ping;
use crate::support::sidecar::upstream;
use crate::support::{App, Controller, LIMIT, Sidecar};
use std::net::SocketAddr;
use weft_model::Port;
use weft_model::traffic::{LocalityPolicy, Nearness, Subset, TrafficPolicy};
use weft_proxy::Config;
use weft_testkit::wait_until;

fn runs_at(config: &mut Config, zone: &str) {
    config.metadata = [("region".to_owned(), "eu".to_owned()), ("zone".to_owned(), zone.to_owned())].into();
}

async fn db(controller: &Controller, name: &str, zone: &str, app: SocketAddr) -> Sidecar {
    let sidecar = Sidecar::start(controller, name, |config| {
        config.apps.insert(Port::new(5432).unwrap(), app);
        runs_at(config, zone);
    })
    .await;
    sidecar.ready().await;
    sidecar
}

#[tokio::test]
async fn connections_go_next_door_when_nobody_is_left_at_home_and_come_back() {
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[8080]);
    controller.allow("default/db", &["default/web"]);
    let locality = LocalityPolicy { prefer: Nearness::Zone, threshold_percent: 70 };
    controller.put_traffic("default/db", TrafficPolicy { locality, ..TrafficPolicy::default() });
    let home = App::echo().await;
    let address = home.address;
    let _near = db(&controller, "default/db/db-1", "eu-a", address).await;
    let away = [App::echo().await, App::echo().await];
    let _far = db(&controller, "default/db/db-2", "eu-b", away[0].address).await;
    let _farther = db(&controller, "default/db/db-3", "eu-b", away[1].address).await;
    let web = Sidecar::start(&controller, "default/web/web-1", |config| {
        config.upstreams.push(upstream("default/db", 5432));
        runs_at(config, "eu-a");
    })
    .await;
    web.sees("default/db", 3).await;
    let said = web.json("/config").await;
    assert_eq!(
        (&said["zone"], &said["endpoints"][0]["endpoints"][1]["zone"]),
        (&"eu-a".into(), &"eu-b".into())
    );

    let mut expected = Vec::new();
    go(&web, "zone", &mut expected).await;
    home.gone().await;
    web.sees("default/db", 2).await;
    go(&web, "region", &mut expected).await;
    let _again = App::echo_at(address).await;
    web.sees("default/db", 3).await;
    go(&web, "zone", &mut expected).await;
}

/// Some connections, and that they went there.
async fn go(web: &Sidecar, locality: &'static str, expected: &mut Vec<&'static str>) {
    for _ in 0..6 {
        ping(&mut web.connect("default/db", 5432).await).await.unwrap();
        expected.push(locality);
    }
    wait_until("their records", LIMIT, async || web.records().len() == expected.len()).await;
    let told: Vec<_> = web.records().iter().map(|record| record["locality"].clone()).collect();
    assert_eq!(told, *expected);
}

#[tokio::test]
async fn a_canary_gets_its_part_and_none_while_it_is_down() {
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[8080]);
    controller.allow("default/db", &["default/web"]);
    let subset = |name: &str, weight: u16| Subset {
        name: name.parse().unwrap(),
        labels: [("version".to_owned(), name.to_owned())].into(),
        weight,
    };
    let subsets = vec![subset("v1", 3), subset("v2", 1)];
    controller.put_traffic("default/db", TrafficPolicy { subsets, ..TrafficPolicy::default() });
    let start = async |instance: &str, version: &str, app: SocketAddr| {
        let sidecar = Sidecar::start(&controller, instance, |config| {
            config.apps.insert(Port::new(5432).unwrap(), app);
            config.metadata = [("version".to_owned(), version.to_owned())].into();
        });
        let sidecar = sidecar.await;
        sidecar.ready().await;
        sidecar
    };
    let (stable, canary) = (App::echo().await, App::echo().await);
    let _v1 = start("default/db/db-1", "v1", stable.address).await;
    let _v2 = start("default/db/db-2", "v2", canary.address).await;
    let web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 2).await;
    let told = async |connections: usize| {
        let before = web.records().len();
        for _ in 0..connections {
            ping(&mut web.connect("default/db", 5432).await).await.unwrap();
        }
        wait_until("their records", LIMIT, async || web.records().len() == before + connections).await;
        let records = web.records().split_off(before);
        let of = |subset: &str| records.iter().filter(|record| record["subset"] == subset).count();
        assert!(records.iter().all(|record| {
            let instance = if record["subset"] == "v2" { "default/db/db-2" } else { "default/db/db-1" };
            record["endpoint_identity"] == instance
        }));
        (of("v1"), of("v2"))
    };
    assert_eq!(told(20).await, (15, 5));
    canary.gone().await;
    web.sees("default/db", 1).await;
    assert_eq!(told(20).await, (20, 0));
}
