//! Processes and servers that are killed, connections that are cut, and many writers that are held up.

use anyhow::Context;
use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::time::Duration;
use tokio::time::{sleep, timeout};

use super::{Findings, PROGRESS_MAX, Scene};
use crate::proxy::{Fault, Point};
use crate::server::Postgres;
use crate::watch::head;
use crate::writer::Habits;

/// Short commands, and many repeats.
const BRISK: Habits = Habits { events_max: 4, repeats: 0.1 };
/// Batches that a point may let pass: the first ones of a process are decided under the lock, later ones are sent ahead.
const SKIPS_MAX: u32 = 40;
/// How long an armed point may take to be reached by writers who do nothing else.
const FIRED_MAX: Duration = Duration::from_secs(30);

/// A process is killed at each point in turn: every other time one that is alone and sends its batches ahead, or one that
/// writes beside another process, under the lock.
pub(crate) async fn kills(
    server: &Postgres,
    seed: u64,
    count: u64,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    for (database, processes, writers_each, count) in
        [("kills", 1, 16, count.div_ceil(2)), ("kills_beside", 2, 8, count / 2)]
    {
        let scene = Scene::set(server, database, processes, writers_each, seed, BRISK).await?;
        scene.progress(16).await?;
        let mut killed = 0;
        for n in 0..count {
            let point = Point::APPEND[usize::try_from(n).unwrap_or_default() % Point::APPEND.len()];
            killed += u64::from(kill_one(&scene, point, rng.random_range(0..SKIPS_MAX), findings).await?);
        }
        scene.progress(16).await?;
        scene.close(server, killed, findings).await?;
    }
    Ok(())
}

/// Kills the first process once it has come to the point so many times more. False if it did not come there.
async fn kill_one(scene: &Scene, point: Point, skips: u32, findings: &mut Findings) -> anyhow::Result<bool> {
    let (proxy, worker) = (&scene.proxies[0], &scene.workers[0]);
    let deaths = worker.deaths();
    proxy.arm(point, Fault::Kill, skips);
    if !proxy.fired(FIRED_MAX).await {
        findings.complain(format!("nobody came to {}", point.name()));
        return Ok(false);
    }
    findings.count(point.name());
    let died = async {
        while worker.deaths() == deaths {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PROGRESS_MAX, died).await.context("a killed process does not die")?;
    Ok(true)
}

/// Commits are cut on either side of them; the process lives on and finds out.
pub(crate) async fn ambiguous(
    server: &Postgres,
    seed: u64,
    count: u64,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    const PROCESSES: u64 = 4;
    let scene = Scene::set(server, "ambiguous", 4, 4, seed, BRISK).await?;
    for (proxy, n) in scene.proxies.iter().zip(0..) {
        proxy.storm(seed.wrapping_add(n), count.div_ceil(PROCESSES));
    }
    let cuts = || scene.proxies.iter().map(|proxy| proxy.cuts()).sum::<u64>();
    let mut before = 0;
    while cuts() < count.div_ceil(PROCESSES) * PROCESSES {
        scene.progress(1).await?;
        let now = cuts();
        if now / 1_000 > before / 1_000 {
            crate::say(&format!("{now} commits cut"));
        }
        before = now;
    }
    findings.done.insert("ambiguous".into(), cuts());
    scene.progress(16).await?;
    scene.close(server, 0, findings).await
}

/// The server's processes are killed, one of them or the first, or it shuts down at once.
pub(crate) async fn server_kills(
    server: &mut Postgres,
    seed: u64,
    count: u64,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    let scene = Scene::set(server, "server_kills", 2, 8, seed, BRISK).await?;
    scene.progress(16).await?;
    for n in 0..count {
        sleep(Duration::from_millis(rng.random_range(0..100))).await;
        match n % 4 {
            0 | 1 => {
                // Right after another fault nobody may be connected yet.
                while !server.kill_backend("server_kills").await.unwrap_or(false) {
                    scene.progress(1).await?;
                }
                findings.count("backend");
                server.answers().await?;
            }
            kind => {
                let (signal, name) =
                    if kind == 2 { (Signal::SIGKILL, "postmaster") } else { (Signal::SIGQUIT, "immediate") };
                server.signal(signal)?;
                server.start_again().await?;
                scene.follow(server)?;
                findings.count(name);
            }
        }
        scene.progress(4).await?;
    }
    scene.close(server, 0, findings).await
}

/// Sixty-four writers in four processes, each transaction held up at random, until the log has so many events.
pub(crate) async fn writers(
    server: &Postgres,
    seed: u64,
    events: u64,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let habits = Habits { events_max: 200, repeats: 0.02 };
    let scene = Scene::set(server, "writers", 4, 16, seed, habits).await?;
    for (proxy, n) in scene.proxies.iter().zip(0..) {
        proxy.delay(seed.wrapping_add(n), 3);
    }
    let url = server.url("writers")?;
    let mut told = 0;
    loop {
        let now = head(&url).await?;
        if now >= events {
            break;
        }
        if now / 100_000 > told {
            told = now / 100_000;
            crate::say(&format!("{now} events of {} writers", 64));
        }
        scene.progress(64).await?;
    }
    findings.done.insert("writers".into(), 64);
    findings.done.insert("processes".into(), 4);
    scene.close(server, 0, findings).await
}
