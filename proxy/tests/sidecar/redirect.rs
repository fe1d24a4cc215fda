//! The transparent way in, with the kernel's own redirection: each test has a network namespace of its own and another one that is the
//! outside. That needs root, `ip` and `nft`.
//!
//! Clients are processes of another user, because the sidecar's user is the one that is left out.

use crate::support::{App, Controller, LIMIT, Sidecar};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use weft_model::Port;
use weft_proxy::config::Outside;
use weft_testkit::wait_until;

/// The machine under test, where it has a foreign address for its own, and the outside.
const HERE: &str = "192.0.2.10";
const ALIAS: &str = "192.0.2.77";
const OUTSIDE: &str = "192.0.2.1:7";
const OUTSIDE_V6: &str = "[2001:db8::1]:7";
/// The user that clients run as.
const NOBODY: u32 = 65_534;

/// Somebody else's rules, which lead the alias here.
const OTHERS_RULES: &str = "table ip other {
    chain output {
        type nat hook output priority -100; policy accept;
        ip daddr 192.0.2.77 dnat to 192.0.2.10
    }
}";

fn said(program: &str, args: &[&str], input: &str) -> Output {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{program} is needed: {error}"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn run(program: &str, args: &[&str], input: &str) -> String {
    let Output { status, stdout, stderr } = said(program, args, input);
    assert!(status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

fn ip(line: &str) {
    run("ip", &line.split(' ').collect::<Vec<_>>(), "");
}

fn redirect(args: &[&str]) -> String {
    run(env!("CARGO_BIN_EXE_weft-proxy"), &[&["redirect"], args].concat(), "")
}

/// Gives this thread, and what it starts, a network of its own.
fn own_network() {
    unshare(CloneFlags::CLONE_NEWNET)
        .expect("this test makes network namespaces, which needs root (CAP_SYS_ADMIN): run it with sudo");
    ip("link set lo up");
}

/// Runs a test in a network of its own, with an outside that echoes.
fn in_a_network(test: impl AsyncFnOnce()) {
    own_network();
    let (tell, told) = mpsc::channel();
    let (connected, connect) = mpsc::channel();
    std::thread::spawn(move || {
        own_network();
        tell.send(gettid()).unwrap();
        connect.recv().unwrap();
        ip("addr add 192.0.2.1/24 dev weft-out");
        ip("-6 addr add 2001:db8::1/64 dev weft-out nodad");
        ip("link set weft-out up");
        let listener = TcpListener::bind("[::]:7").unwrap();
        tell.send(gettid()).unwrap();
        for mut stream in listener.incoming().map(Result::unwrap) {
            std::thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut stream));
        }
    });
    let outside = told.recv().unwrap();
    ip(&format!("link add weft-in type veth peer name weft-out netns {outside}"));
    connected.send(()).unwrap();
    ip(&format!("addr add {HERE}/24 dev weft-in"));
    ip("-6 addr add 2001:db8::10/64 dev weft-in nodad");
    ip("link set weft-in up");
    told.recv().unwrap();
    run("nft", &["-f", "-"], OTHERS_RULES);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test());
}

/// What a client of another user reads after it sent a line: the line's echo, or none if it was reset.
async fn client(address: &str, says: &str) -> Option<String> {
    let (host, port) = address.rsplit_once(':').unwrap();
    let host = host.trim_matches(['[', ']']);
    let script = format!(
        "exec 3<>/dev/tcp/{host}/{port} && echo '{says}' >&3 && read -r -t 15 -u 3 line && echo \"$line\""
    );
    let mut command = Command::new("bash");
    command.args(["-c", &script]).uid(NOBODY).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut status = None;
    wait_until("the client's end", LIMIT, async || {
        status = child.try_wait().unwrap();
        status.is_some()
    })
    .await;
    let mut line = String::new();
    child.stdout.take().unwrap().read_to_string(&mut line).unwrap();
    status.unwrap().success().then(|| line.trim_end().to_owned())
}

fn mesh() -> Controller {
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[80]);
    controller.allow("default/db", &["default/web"]);
    controller
}

/// The sidecar before the app, at an address that others know by the alias.
async fn db(controller: &Controller, app: &App) -> Sidecar {
    let port = 15_001;
    let db = Sidecar::start(controller, "default/db/db-1", |config| {
        config.inbound_listen = format!("{HERE}:{port}").parse().unwrap();
        config.advertise = Some(format!("{ALIAS}:{port}").parse().unwrap());
        config.apps.insert(Port::new(5432).unwrap(), app.address);
    })
    .await;
    db.ready().await;
    db
}

/// The sidecar that takes redirected connections, on one port for both families.
async fn web(controller: &Controller, outside: Outside) -> Sidecar {
    let web = Sidecar::start(controller, "default/web/web-1", |config| {
        config.all_upstreams = true;
        config.redirect_listen = ["127.0.0.1:15002", "[::1]:15002"].map(|it| it.parse().unwrap()).to_vec();
        config.outside = outside;
    })
    .await;
    web.ready().await;
    web
}

fn service_address(config: &Value) -> SocketAddr {
    let shards = config["endpoints"].as_array().unwrap();
    let shard = shards.iter().find(|shard| shard["service"] == "default/db").unwrap();
    format!("{}:5432", shard["address"].as_str().unwrap()).parse().unwrap()
}

#[test]
fn an_address_of_the_mesh_leads_into_it_and_nothing_else_does() {
    in_a_network(async || {
        let (controller, app) = (mesh(), App::echo().await);
        let _db = db(&controller, &app).await;
        let web = web(&controller, Outside::Refuse).await;
        web.sees("default/db", 1).await;
        redirect(&["install", "--uid", "0"]);

        let own = service_address(&web.json("/config").await);
        // The service's own address, and its port at the address of one of its instances.
        for address in [own.to_string(), format!("{ALIAS}:5432")] {
            assert_eq!(
                client(&address, "through the mesh").await.as_deref(),
                Some("through the mesh"),
                "{address}"
            );
        }
        let record = web.record("client_fin").await;
        assert_eq!((&record["destination"], &record["port"]), (&"default/db".into(), &5432.into()));
        assert_eq!(record["tls"], "TLSv1_3");

        for outside in [OUTSIDE, OUTSIDE_V6] {
            assert_eq!(client(outside, "hello").await, None, "{outside}");
            let refused = |record: &Value| {
                record["endpoint"] == outside
                    && record["close_reason"] == "policy_denied"
                    && record["rule"] == "--outside refuse"
            };
            wait_until("the record", LIMIT, async || web.records().iter().any(refused)).await;
        }
        // An address of services that none has is nobody else's either.
        assert_eq!(client("127.127.0.0:5432", "hello").await, None);
        assert!(web.record("no_snapshot").await["detail"].as_str().unwrap().contains("127.127.0.0"));
        // What stays on the machine is not touched.
        assert_eq!(client(&app.address.to_string(), "local").await.as_deref(), Some("local"));
        // Nor is what the sidecar's user opens.
        assert!(tokio::net::TcpStream::connect(OUTSIDE).await.is_ok());
        let metrics = web.page("/metrics").await.1;
        assert!(metrics.contains("weft_redirected_total{result=\"mesh\"} 2"), "{metrics}");
    });
}

#[test]
fn the_outside_is_reached_where_that_is_allowed() {
    in_a_network(async || {
        let controller = mesh();
        let web = web(&controller, Outside::Allow).await;
        redirect(&["install", "--uid", "root"]);
        for outside in [OUTSIDE, OUTSIDE_V6] {
            assert_eq!(client(outside, "hello").await.as_deref(), Some("hello"), "{outside}");
            let passed = |record: &Value| {
                record["endpoint"] == outside
                    && record["close_reason"] == "client_fin"
                    && record["rule"] == "--outside allow"
                    && (&record["bytes_up"], &record["bytes_down"]) == (&6.into(), &6.into())
            };
            wait_until("the record", LIMIT, async || web.records().iter().any(passed)).await;
        }
        assert_eq!(client("192.0.2.1:9", "nobody listens there").await, None);
        assert_eq!(web.record("connect_refused").await["endpoint"], "192.0.2.1:9");
        assert_eq!(client("127.127.0.0:9", "an address of services").await, None, "it left the mesh");
    });
}

#[test]
fn nothing_passes_before_a_snapshot() {
    in_a_network(async || {
        let mut controller = mesh();
        controller.stop();
        let web = Sidecar::start(&controller, "default/web/web-1", |config| {
            config.redirect_listen = vec!["127.0.0.1:15002".parse().unwrap()];
            config.outside = Outside::Allow;
        })
        .await;
        redirect(&["install", "--uid", "0"]);
        assert_eq!(client(OUTSIDE, "hello").await, None);
        assert_eq!(web.record("no_snapshot").await["endpoint"], OUTSIDE);
    });
}

#[test]
fn what_comes_back_to_the_sidecar_is_refused_and_said_to() {
    in_a_network(async || {
        let (controller, app) = (mesh(), App::echo().await);
        let _db = db(&controller, &app).await;
        let web = web(&controller, Outside::Allow).await;
        web.sees("default/db", 1).await;
        // Not redirected at all.
        for listener in web.redirected.iter().map(SocketAddr::to_string) {
            assert_eq!(client(&listener, "to the listener itself").await, None);
        }
        wait_until("both records", LIMIT, async || web.records().len() == 2).await;
        assert!(
            web.record("policy_denied").await["detail"]
                .as_str()
                .unwrap()
                .contains("the redirect listener itself")
        );

        // Rules for a sidecar of another user: they redirect this one's own connections.
        redirect(&["install", "--uid", "12345"]);
        assert_eq!(client(OUTSIDE, "out and back").await, None);
        let own = service_address(&web.json("/config").await);
        assert_eq!(client(&own.to_string(), "in and back").await, None);
        let denied = |what: &str| {
            let all = web.records().into_iter();
            all.filter(|record| record["detail"].as_str().unwrap().contains(what)).count()
        };
        wait_until("the refusals", LIMIT, async || {
            denied("own connection to") >= 1 && denied("is the sidecar of default/db/db-1") >= 1
        })
        .await;
        // Once round, and no further; to the mesh as often as it is tried.
        assert_eq!(denied("own connection to"), 1);
        assert!(web.records().len() < 12, "{:#?}", web.records());
        // The right user, and all is well.
        redirect(&["install", "--uid", "0"]);
        assert_eq!(client(OUTSIDE, "out").await.as_deref(), Some("out"));
    });
}

#[test]
fn rules_come_and_go_whole_and_others_stay() {
    in_a_network(async || {
        let others = || run("nft", &["list", "table", "ip", "other"], "");
        let before = others();
        let none = redirect(&["show"]);
        assert!(none.contains("no rules are installed"), "{none}");
        redirect(&["remove"]);

        let flags = [
            "install",
            "--uid",
            "0",
            "--exclude",
            "192.0.2.0/24",
            "--exclude-port",
            "22",
            "--dns-port",
            "53",
        ];
        redirect(&flags);
        let shown = redirect(&["show"]);
        redirect(&flags);
        assert_eq!(redirect(&["show"]), shown, "twice is not once");
        assert!(shown.contains("table inet weft") && shown.contains("redirect to :15002"), "{shown}");

        // Refused as a whole: what was installed stays.
        let program = env!("CARGO_BIN_EXE_weft-proxy");
        let wrong = said(program, &["redirect", "install", "--uid", "no-such-user"], "");
        assert!(!wrong.status.success());
        assert_eq!(redirect(&["show"]), shown);

        redirect(&["install", "--uid", "0", "--only-uid", "65534", "--no-ipv6"]);
        assert_ne!(redirect(&["show"]), shown);
        redirect(&["remove"]);
        redirect(&["remove"]);
        assert_eq!(redirect(&["show"]), none);
        assert_eq!(others(), before);
    });
}

#[test]
fn who_may_not_change_rules_is_told_what_it_takes() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft-proxy"));
    command.args(["redirect", "install", "--uid", "0"]).uid(NOBODY);
    let Output { status, stderr, .. } = command.output().unwrap();
    let text = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("CAP_NET_ADMIN"), "{text}");
}
