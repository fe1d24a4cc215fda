//! How long nothing is published once the leader was killed.

use std::time::Duration;

use anyhow::Context as _;
use tokio::time::{Instant, sleep};
use weft_fleet::Spread;
use weft_proto::v1;
use weft_proto::v1::change::Change as Wire;

use crate::figures::{fleet, plan};
use crate::mesh::TestMesh;
use crate::{Bench, say};

/// Somebody leads by then.
const LEADER_MAX: Duration = Duration::from_secs(30);

pub(crate) async fn failover(bench: &mut Bench) -> anyhow::Result<()> {
    if !bench.plan.wants(&["leader_kill_to_publish_p99_s"]) {
        return Ok(());
    }
    let rounds = bench.plan.of(30, 2);
    say(&format!("the leader is killed {rounds} times"));
    let mut mesh = TestMesh::start(bench, "failover").await?;
    mesh.add_controller("controller-2").await?;
    let mut took = Vec::new();
    for round in 0..rounds {
        took.push(one_kill(&mut mesh, round).await?);
    }
    let took = Spread::of(took);
    say(&format!("p50 {:.2} s, p99 {:.2} s", took.p50_ms / 1e3, took.p99_ms / 1e3));
    bench.report.set("leader_kill_to_publish_p50_s", took.p50_ms / 1e3);
    bench.report.set("leader_kill_to_publish_p99_s", took.p99_ms / 1e3);
    mesh.end(&bench.server).await
}

/// From killing the leader until a change that was made then has reached a sidecar. The killed one is started again.
async fn one_kill(mesh: &mut TestMesh, round: usize) -> anyhow::Result<Duration> {
    let leader = leader(mesh).await?;
    let place = mesh.controllers.iter().position(|controller| controller.name() == leader);
    let leader = mesh.controllers.swap_remove(place.context("a leader that is not of this mesh")?);
    let name = leader.name().to_owned();
    // The fleet is the survivor's, whose sidecars wait for whoever publishes next.
    let fleet = fleet(mesh, plan(2, 2, 1, 1)?).await?;
    let scope = "bench/target".to_owned();
    let policy = v1::TrafficPolicy {
        connect_timeout_ms: 1_000 + u32::try_from(round)?,
        ..v1::TrafficPolicy::default()
    };
    let killed = Instant::now();
    leader.kill().await?;
    fleet.change(Wire::PutTrafficPolicy(v1::PutTrafficPolicy { scope, policy: Some(policy) })).await?;
    let took = killed.elapsed();
    fleet.leave().await?;
    mesh.add_controller(&name).await?;
    Ok(took)
}

/// The name of whoever leads.
async fn leader(mesh: &TestMesh) -> anyhow::Result<String> {
    let begun = Instant::now();
    loop {
        for number in 1..=2 {
            let name = format!("controller-{number}");
            let leads = format!("select count(*) from status.leader where alive and holder = '{name}'");
            if mesh.number(&leads).await? == 1 {
                return Ok(name);
            }
        }
        anyhow::ensure!(begun.elapsed() < LEADER_MAX, "nobody leads");
        sleep(Duration::from_millis(20)).await;
    }
}
