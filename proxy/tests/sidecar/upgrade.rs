//! One sidecar takes another one's place: what goes over, who does what, and what becomes of it when one of them dies, lies or is late.

use crate::support::app::{expect_reset, ping};
use crate::support::controller::Call;
use crate::support::sidecar::{metrics, upstream};
use crate::support::{App, Controller, LIMIT, Sidecar};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use weft_proxy::{Proxy, StartError, UpgradeError};
use weft_testkit::wait_until;

fn controller() -> Controller {
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[5432]);
    controller.allow("default/db", &["default/web"]);
    controller
}

/// A server's and a client's sidecar.
async fn pair(controller: &Controller, app: &App) -> (Sidecar, Sidecar) {
    let db = Sidecar::serving(controller, "default/db/db-1", 5432, app.address).await;
    let web = Sidecar::start(controller, "default/web/web-1", |config| {
        config.upstreams.push(upstream("default/db", 5432));
        config.dns_listen = Some(([127, 0, 0, 1], 0).into());
        config.redirect_listen = vec![([127, 0, 0, 1], 0).into()];
    })
    .await;
    web.sees("default/db", 1).await;
    (db, web)
}

/// Opens connections one after the other, each of which has to answer, until it is asked how many did.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    task: AbortOnDropHandle<()>,
}

impl Load {
    async fn of(web: &Sidecar) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let address = web.connect("default/db", 5432).await.peer_addr().unwrap();
        let (stopping, counted) = (Arc::clone(&stop), Arc::clone(&done));
        let task = TaskTracker::new().spawn(async move {
            while !stopping.load(Ordering::Relaxed) {
                let mut stream = TcpStream::connect(address).await.expect("never refused");
                ping(&mut stream).await.expect("never failed");
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { stop, done, task: AbortOnDropHandle::new(task) }
    }

    /// Waits until so many more have passed.
    async fn more(&self, count: usize) {
        let wanted = self.done.load(Ordering::Relaxed) + count;
        wait_until("more connections", LIMIT, async || {
            assert!(!self.task.is_finished(), "a connection failed");
            self.done.load(Ordering::Relaxed) >= wanted
        })
        .await;
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
    }
}

/// A new process as the running sidecar sees it, which says what a test wants.
struct Script(UnixStream);

impl Script {
    fn connect(sidecar: &Sidecar) -> Self {
        let stream = UnixStream::connect(sidecar.state_dir().join("upgrade")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self(stream)
    }

    fn say(&mut self, message: &Value) {
        let body = message.to_string();
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        self.0.write_all(&[&length[..], body.as_bytes()].concat()).unwrap();
    }

    /// The sockets that come with it are closed.
    fn hear(&mut self) -> Value {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).unwrap();
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut body).unwrap();
        serde_json::from_slice(&body).unwrap()
    }

    fn hello(&mut self, instance: &str) {
        self.say(&json!({ "say": "hello", "speaks": [1], "release": "0.0.0", "instance": instance }));
    }

    fn sockets(&mut self) {
        let welcome = self.hear();
        let mut left = welcome["sockets"].as_u64().unwrap();
        assert!(left > 0);
        while left > 0 {
            self.say(&json!({ "say": "next" }));
            left -= self.hear()["ways"].as_array().unwrap().len() as u64;
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_connection_is_refused_while_either_side_is_upgraded() {
    let controller = controller();
    let app = App::echo().await;
    let (mut db, mut web) = pair(&controller, &app).await;
    let load = Load::of(&web).await;
    load.more(20).await;
    for _ in 0..3 {
        let next = db.upgraded().await;
        assert_eq!((next.inbound, next.admin), (db.inbound, db.admin));
        db.stopped().await.unwrap();
        db = next;
        load.more(50).await;

        let next = web.upgraded().await;
        assert_eq!((next.dns, &next.redirected, next.admin), (web.dns, &web.redirected, web.admin));
        web.stopped().await.unwrap();
        web = next;
        load.more(50).await;
    }
    load.end().await;
    // The instance never left, and nobody drained it.
    let left = controller.count(|call| matches!(call, Call::Drained(_) | Call::Deregistered(_)));
    assert_eq!(left, 0);
    db.ready().await;
    web.stop().await;
    db.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn established_connections_get_the_whole_drain_and_the_new_policy() {
    let controller = controller();
    let app = App::echo().await;
    let (mut db, mut web) = pair(&controller, &app).await;
    let mut long = web.connect("default/db", 5432).await;
    ping(&mut long).await.unwrap();
    let new_db = db.upgraded().await;
    new_db.ready().await;
    let new_web = web.upgraded().await;
    wait_until("the new one to be the sidecar", LIMIT, async || {
        new_web.json("/config").await["connected"] == true && new_web.json("/connections").await == json!([])
    })
    .await;
    // Both old processes carry it.
    ping(&mut long).await.unwrap();
    controller.allow("default/db", &[]);
    expect_reset(&mut long).await;
    web.stopped().await.unwrap();
    db.stopped().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_process_that_ends_at_any_step_changes_nothing() {
    let controller = controller();
    let app = App::echo().await;
    let (db, web) = pair(&controller, &app).await;
    let load = Load::of(&web).await;
    for steps in 0..4 {
        let mut script = Script::connect(&db);
        blocking(move || {
            if steps > 0 {
                script.hello("default/db/db-1");
            }
            if steps == 2 {
                script.hear();
            }
            if steps == 3 {
                script.sockets();
            }
        })
        .await;
        load.more(5).await;
    }
    // After it had everything, and after it was told that it is the sidecar.
    for until_yours in [false, true] {
        let mut script = Script::connect(&db);
        let subscribed = controller.count(|call| matches!(call, Call::Subscribed(_)));
        blocking(move || {
            script.hello("default/db/db-1");
            script.sockets();
            script.say(&json!({ "say": "ready" }));
            if until_yours {
                assert_eq!(script.hear()["say"], "yours");
            }
        })
        .await;
        wait_until("the old one to follow the controller again", LIMIT, async || {
            controller.count(|call| matches!(call, Call::Subscribed(_))) > subscribed
        })
        .await;
        load.more(5).await;
    }
    // It still can be upgraded, and still hears of changes.
    let version = controller.allow("default/db", &["default/web", "default/db"]);
    db.runs(version).await;
    let mut db = db;
    let new = db.upgraded().await;
    db.stopped().await.unwrap();
    load.more(5).await;
    load.end().await;
    new.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_speaks_otherwise_or_is_somebody_else_is_told_so() {
    let controller = controller();
    let app = App::echo().await;
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    for (speaks, instance, why) in
        [(0, "default/db/db-1", "speaks hand-over 1"), (1, "default/db/db-2", "not default/db/db-2")]
    {
        let mut script = Script::connect(&db);
        let answer = blocking(move || {
            script.say(
                &json!({ "say": "hello", "speaks": [speaks], "release": "9.9.9", "instance": instance }),
            );
            script.hear()
        })
        .await;
        assert_eq!(answer["say"], "refused");
        assert!(answer["why"].as_str().unwrap().contains(why), "{answer}");
    }
    let mut garbage = Script::connect(&db);
    blocking(move || {
        garbage.0.write_all(&[0xff; 64]).unwrap();
        assert_eq!(garbage.0.read(&mut [0]).unwrap_or(0), 0);
    })
    .await;
    db.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_upgrades_at_once_one_has_the_place() {
    let controller = controller();
    let app = App::echo().await;
    let (mut db, web) = pair(&controller, &app).await;
    let load = Load::of(&web).await;
    let mut config = db.config.clone();
    (config.join_token, config.upgrade) = (None, true);
    let first = Proxy::bind(config.clone(), metrics()).await.unwrap();
    // It waits for its turn, which does not come.
    let mut second = Script::connect(&db);
    second.hello("default/db/db-1");
    let stop = CancellationToken::new();
    let running = AbortOnDropHandle::new(TaskTracker::new().spawn(first.run(stop.clone())));
    db.stopped().await.unwrap();
    // The end of its connection, which a new process takes for a no.
    blocking(move || assert_eq!(second.0.read(&mut [0]).unwrap_or(0), 0)).await;
    load.more(5).await;
    db.ready().await;
    load.end().await;
    stop.cancel();
    tokio::time::timeout(LIMIT, running).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_sidecars_do_not_share_a_state_directory() {
    let controller = controller();
    let app = App::echo().await;
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let mut second = db.again().await;
    let error = second.stopped().await.unwrap_err();
    assert!(matches!(error, StartError::Upgrade(UpgradeError::InUse(_))), "{error:?}");
    db.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_running_one_it_starts_as_ever() {
    let controller = controller();
    let app = App::echo().await;
    let mut db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    db.stop().await;
    // The door is still there, and nobody behind it.
    assert!(db.state_dir().join("upgrade").exists());
    let mut db = db.upgraded().await;
    db.ready().await;
    db.stop().await;
}

/// A running sidecar that says what a test wants, in the place of one that has stopped.
async fn replaced(db: &mut Sidecar) -> UnixListener {
    db.stop().await;
    let door = db.state_dir().join("upgrade");
    std::fs::remove_file(&door).unwrap();
    UnixListener::bind(door).unwrap()
}

fn asked(listener: &UnixListener) -> Script {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut script = Script(stream);
    assert_eq!(script.hear()["say"], "hello");
    script
}

/// Says that there are no sockets, waits until the new one is ready, and ends.
fn dies_late(listener: &UnixListener) {
    let mut script = asked(listener);
    script.say(&json!({ "say": "welcome", "speaks": 1, "release": "0.0.0", "sockets": 0 }));
    assert_eq!(script.hear()["say"], "ready");
}

#[tokio::test(flavor = "multi_thread")]
async fn if_the_old_one_dies_the_new_one_goes_on_once_it_is_ready_and_not_before() {
    let controller = controller();
    let app = App::echo().await;
    let mut db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let listener = replaced(&mut db).await;
    let mut config = db.config.clone();
    (config.join_token, config.upgrade) = (None, true);
    let early = TaskTracker::new().spawn_blocking(move || {
        drop(asked(&listener));
        listener
    });
    let error = Proxy::bind(config, metrics()).await.err().expect("no place to take");
    assert!(matches!(error, StartError::Upgrade(UpgradeError::Talk(_))), "{error:?}");

    let listener = early.await.unwrap();
    let late = TaskTracker::new().spawn_blocking(move || dies_late(&listener));
    let mut new = db.upgraded().await;
    late.await.unwrap();
    new.ready().await;
    new.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_one_that_breaks_off_and_lives_keeps_its_place() {
    let controller = controller();
    let app = App::echo().await;
    let mut db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let listener = replaced(&mut db).await;
    let lock = std::fs::File::options().write(true).open(db.state_dir().join("lock")).unwrap();
    lock.try_lock().unwrap();
    let late = TaskTracker::new().spawn_blocking(move || dies_late(&listener));
    let mut new = db.upgraded().await;
    let error = new.stopped().await.unwrap_err();
    assert!(matches!(error, StartError::Upgrade(UpgradeError::BrokenOff)), "{error:?}");
    late.await.unwrap();
}

/// A process that nobody waits for.
struct Orphan(Pid);

impl Orphan {
    fn lives(&self) -> bool {
        std::fs::read_link(format!("/proc/{}/exe", self.0)).is_ok()
    }
}

impl Drop for Orphan {
    fn drop(&mut self) {
        if self.lives() {
            let _ = kill(self.0, Signal::SIGKILL);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn at_a_signal_the_program_takes_its_own_place_and_the_service_manager_is_told() {
    let controller = controller();
    let dir = tempfile::tempdir().unwrap();
    let (state, told) = (dir.path().join("state"), dir.path().join("notify"));
    let manager = tokio::net::UnixDatagram::bind(&told).unwrap();
    let mut old = tokio::process::Command::new(env!("CARGO_BIN_EXE_weft-proxy"))
        .args(["--controller", &controller.address.to_string(), "--instance", "default/db/db-1"])
        .args(["--inbound-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--drain-deadline", "1s"])
        .args(["--state-dir".as_ref(), state.as_os_str()])
        .args(["--connection-log".as_ref(), dir.path().join("log").as_os_str()])
        .env("WEFT_JOIN_TOKEN", controller.token("default/db/db-1").reveal().as_str())
        .env("NOTIFY_SOCKET", &told)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    wait_until("a sidecar with a snapshot", LIMIT, async || {
        state.join("upgrade").exists() && state.join("snapshot").exists()
    })
    .await;
    let pid = Pid::from_raw(old.id().unwrap().try_into().unwrap());
    kill(pid, Signal::SIGUSR2).unwrap();

    let mut text = [0; 256];
    let length = tokio::time::timeout(LIMIT, manager.recv(&mut text)).await.expect("it is told").unwrap();
    let text = std::str::from_utf8(&text[..length]).unwrap();
    let new = text.lines().find_map(|line| line.strip_prefix("MAINPID=")).expect("the new process' id");
    let new = Orphan(Pid::from_raw(new.parse().unwrap()));
    assert_ne!(new.0, pid);
    let ended = tokio::time::timeout(LIMIT, old.wait()).await.expect("the old one drains and ends").unwrap();
    assert!(ended.success() && new.lives());
    kill(new.0, Signal::SIGTERM).unwrap();
    wait_until("the new one to end", LIMIT, async || !new.lives()).await;
    assert_eq!(controller.count(|call| matches!(call, Call::Deregistered(_))), 1);
}
