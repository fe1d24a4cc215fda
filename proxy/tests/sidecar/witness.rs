//! What a sidecar was told of the log's end: kept, shown, and what happens when the log does not have it any more.

use crate::support::app::ping;
use crate::support::{App, Controller, LIMIT, Sidecar};
use weft_testkit::wait_until;

fn controller() -> Controller {
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[5432]);
    controller.allow("default/db", &["default/web"]);
    controller
}

#[tokio::test]
async fn a_witness_is_kept_over_a_restart_and_shown() {
    let controller = controller();
    controller.script(|state| state.witness = b"one".to_vec());
    let app = App::echo().await;
    let mut db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    assert_eq!(controller.state().shown, [b""]);
    let file = db.state_dir().join("witness");
    wait_until("a witness on disk", LIMIT, async || file.is_file()).await;

    // On a new stream of the same process, and by the next process.
    controller.script(super::support::controller::State::end_streams);
    wait_until("a new stream", LIMIT, async || controller.state().shown.len() == 2).await;
    db.stop().await;
    let again = db.again().await;
    again.ready().await;
    wait_until("the next process", LIMIT, async || controller.state().shown.len() >= 3).await;
    assert_eq!(controller.state().shown[1..], [b"one".to_vec(), b"one".to_vec()]);
}

#[tokio::test]
async fn a_broken_witness_is_no_fault() {
    let controller = controller();
    controller.script(|state| state.witness = b"one".to_vec());
    let app = App::echo().await;
    let mut db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let file = db.state_dir().join("witness");
    wait_until("a witness on disk", LIMIT, async || file.is_file()).await;
    db.stop().await;
    std::fs::write(&file, b"weft witness 1\nnonsense").unwrap();
    let again = db.again().await;
    again.ready().await;
    wait_until("a stream", LIMIT, async || controller.state().shown.len() == 2).await;
    assert_eq!(controller.state().shown[1], b"");
}

/// The sidecar is started anew, so that it also has to do without being registered again.
#[tokio::test]
async fn a_sidecar_that_is_ahead_of_the_log_says_so_and_goes_on() {
    let mut controller = controller();
    controller.script(|state| state.witness = b"one".to_vec());
    let app = App::echo().await;
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let mut web = Sidecar::calling(&controller, "default/web/web-1", "default/db", 5432, 1).await;
    let version = controller.wanted("default/web/web-1");
    web.runs(version).await;
    let file = web.state_dir().join("witness");
    wait_until("a witness on disk", LIMIT, async || file.is_file()).await;

    web.stop().await;
    controller.stop();
    controller.state().rewound = true;
    controller.go_on();
    let web = web.again().await;
    web.ready().await;
    let said = |config: &serde_json::Value| {
        config["log_rewound"].as_str().is_some_and(|text| text.contains("LOG_REWOUND"))
    };
    web.config_is("that the log was rewound", said).await;
    assert!(web.page("/ready").await.1.contains("LOG_REWOUND"));
    assert!(web.page("/metrics").await.1.contains("weft_log_rewound"));
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();

    // Once somebody has decided, it is as before.
    controller.script(|state| state.rewound = false);
    web.config_is("that it is in order", |config| {
        config["log_rewound"].is_null() && config["connected"] == true
    })
    .await;
    web.runs(controller.wanted("default/web/web-1")).await;
    ping(&mut web.connect("default/db", 5432).await).await.unwrap();
    drop(db);
}
