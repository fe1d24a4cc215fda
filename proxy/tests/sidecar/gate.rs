//! The gate: the real program before a real sidecar, and what it is to an app and to whoever started it.

use crate::support::{Controller, LIMIT, Sidecar};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use weft_testkit::wait_until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_weft-proxy");

/// A gate that waits for the sidecar at `admin` and runs `sh -c script`.
fn gate(admin: SocketAddr, script: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    let admin = admin.to_string();
    command.args(["gate", "--admin", &admin, "--timeout", "20s", "--", "/bin/sh", "-c", script]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

async fn ended(child: &mut Child) -> ExitStatus {
    let mut status = None;
    wait_until("the gate's end", LIMIT, async || {
        status = child.try_wait().unwrap();
        status.is_some()
    })
    .await;
    status.unwrap()
}

/// Its exit status, and what it complained of.
async fn said(command: &mut Command) -> (Option<i32>, String) {
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let status = ended(&mut child).await;
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    (status.code(), text)
}

async fn ready() -> (Controller, Sidecar) {
    let controller = Controller::start();
    controller.declare("default/web", &[80]);
    let sidecar = Sidecar::start(&controller, "default/web/web-1", |_| ()).await;
    sidecar.ready().await;
    (controller, sidecar)
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
}

#[tokio::test]
async fn the_app_starts_when_the_sidecar_is_ready_and_its_status_comes_back() {
    let mut controller = Controller::start();
    controller.declare("default/web", &[80]);
    controller.stop();
    let sidecar = Sidecar::start(&controller, "default/web/web-1", |_| ()).await;
    let dir = tempfile::tempdir().unwrap();
    let started = dir.path().join("started");
    let script = format!(
        "curl -s -o /dev/null -w '%{{http_code}}' http://{}/ready > '{}'; exit 7",
        sidecar.admin,
        started.display()
    );
    let mut child = gate(sidecar.admin, &script).spawn().unwrap();
    assert_eq!(sidecar.page("/ready").await.0, 503);
    assert!(!started.exists() && child.try_wait().unwrap().is_none());
    controller.go_on();
    assert_eq!(ended(&mut child).await.code(), Some(7));
    // As the app saw it when it started.
    assert_eq!(std::fs::read_to_string(started).unwrap(), "200");
}

#[tokio::test]
async fn a_sidecar_that_does_not_come_is_told_with_the_reason() {
    let dead = crate::support::app::dead_address();
    let dir = tempfile::tempdir().unwrap();
    let started = dir.path().join("started");
    let script = format!("touch '{}'", started.display());
    let mut controller = Controller::start();
    controller.stop();
    let waiting = Sidecar::start(&controller, "default/web/web-1", |_| ()).await;
    for (admin, says) in [(dead, "it cannot be asked"), (waiting.admin, "no identity yet")] {
        let mut command = Command::new(PROGRAM);
        command.args([
            "gate",
            "--timeout",
            "100ms",
            "--admin",
            &admin.to_string(),
            "--",
            "/bin/sh",
            "-c",
            &script,
        ]);
        let (status, text) = said(&mut command).await;
        assert_eq!(status, Some(125), "{text}");
        assert!(
            text.contains(says) && text.contains(&admin.to_string()) && text.contains("--timeout"),
            "{text}"
        );
    }
    assert!(!started.exists());
}

#[tokio::test]
async fn an_app_that_cannot_be_run_is_told_as_env_tells_it() {
    let (_controller, sidecar) = ready().await;
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "no program").unwrap();
    for (app, expected) in [(Path::new("/nonexistent/app"), 127), (&plain, 126)] {
        let mut command = Command::new(PROGRAM);
        command.args(["gate", "--admin", &sidecar.admin.to_string(), "--"]).arg(app);
        let (status, text) = said(&mut command).await;
        assert_eq!(status, Some(expected), "{text}");
        assert!(text.contains(&app.display().to_string()), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_signal_reaches_the_app_once() {
    let (_controller, sidecar) = ready().await;
    let names = ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2"];
    let traps: String = names.iter().map(|name| format!("trap 'echo {name}' {name}; ")).collect();
    // A shell runs traps between commands, so it is always between two.
    let script = format!("{traps} trap 'exit 3' ALRM; echo up; while :; do sleep 0.01; done");
    let mut child = gate(sidecar.admin, &script).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(lines.next().unwrap(), "up");
    let all =
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
    for (name, sent) in names.iter().zip(all) {
        signal(&child, sent);
        // The next line is this signal's: none came twice.
        assert_eq!(lines.next().unwrap(), *name);
    }
    // To the app itself: the gate does not handle this one, and would end by it.
    let app = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    kill(Pid::from_raw(app.trim().parse().unwrap()), Signal::SIGALRM).unwrap();
    assert_eq!(ended(&mut child).await.code(), Some(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_app_that_a_signal_ends_is_told_as_a_shell_tells_it() {
    let (_controller, sidecar) = ready().await;
    for (sent, expected) in [(Signal::SIGTERM, 143), (Signal::SIGQUIT, 131)] {
        let mut child = gate(sidecar.admin, "echo up; exec sleep 1000").spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        signal(&child, sent);
        assert_eq!(ended(&mut child).await.code(), Some(expected));
    }
}

#[tokio::test]
async fn a_stop_before_the_app_was_started_ends_the_gate() {
    let dead = crate::support::app::dead_address();
    let mut child = gate(dead, "echo started").spawn().unwrap();
    // It handles signals once it says so to the kernel.
    let handles = |child: &Child| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim();
        u64::from_str_radix(caught, 16).unwrap() & (1 << (Signal::SIGTERM as u32 - 1)) != 0
    };
    wait_until("handled signals", LIMIT, async || handles(&child)).await;
    signal(&child, Signal::SIGTERM);
    assert_eq!(ended(&mut child).await.code(), Some(143));
    let mut out = String::new();
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert_eq!(out, "");
}

#[tokio::test]
async fn as_the_first_process_it_reaps_what_the_app_leaves_and_heeds_signals() {
    let (_controller, sidecar) = ready().await;
    // The orphan's parent ends first, so the first process inherits it; while nobody reaps it, it stays in /proc.
    let script = "test \"$PPID\" = 1 || exit 90
        orphan=$(sh -c 'sh -c \"exit 5\" >/dev/null & echo $!')
        while [ -e /proc/$orphan ]; do sleep 0.01; done
        trap 'exit 11' TERM
        kill -TERM 1
        while :; do sleep 0.01; done";
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", "--kill-child", PROGRAM, "gate"]);
    command.args(["--admin", &sidecar.admin.to_string(), "--", "/bin/sh", "-c", script]);
    let (status, text) = said(&mut command).await;
    assert_eq!(status, Some(11), "a process namespace needs root, or user namespaces for everybody: {text}");
}
