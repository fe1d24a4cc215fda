//! What one endpoint's change costs: bytes to a sidecar that is concerned, work for the controller.

use std::time::Duration;

use anyhow::Context as _;
use weft_bench::cpu;
use weft_bench::report::median;
use weft_fleet::profile::{self, Pace, Profile};
use weft_proto::v1;
use weft_proto::v1::change::Change as Wire;

use crate::figures::{fleet, plan};
use crate::mesh::{TestMesh, WHY, instance, register};
use crate::{Bench, say};

/// Instances of each service of a mesh that only fills.
const INSTANCES: usize = 50;

/// Bytes of a notice about one endpoint of a thousand.
pub(crate) async fn change_size(bench: &mut Bench) -> anyhow::Result<()> {
    if !bench.plan.wants(&["bytes_per_endpoint_change"]) {
        return Ok(());
    }
    let endpoints = bench.plan.of(1_000, 10);
    say(&format!("a change in a service of {endpoints} endpoints"));
    let mesh = TestMesh::start(bench, "change_size").await?;
    let fleet = fleet(&mesh, plan(10, 10, endpoints, 10)?).await?;
    let pace = Pace { changes: bench.plan.of(200, 4), pause: Duration::ZERO };
    let outcome = profile::run(&fleet, Profile::Endpoint, pace, |_| {}).await?;
    anyhow::ensure!(outcome.pulls == 0, "{} changes had to be pulled", outcome.pulls);
    bench.report.set("bytes_per_endpoint_change", outcome.bytes_per_notice);
    drop(fleet);
    mesh.end(&bench.server).await
}

/// CPU time of the controller for each change, and shards that it built, in a small mesh and in a large one.
pub(crate) async fn change_cost(bench: &mut Bench) -> anyhow::Result<()> {
    if !bench.plan.wants(&["shards_rebuilt_per_change", "cpu_per_change_ratio_1000_vs_10_services"]) {
        return Ok(());
    }
    let sizes = [10, bench.plan.of(1_000, 20)];
    let mut meshes = Vec::new();
    for services in sizes {
        say(&format!("a mesh of {services} services with {INSTANCES} instances each"));
        let mesh = TestMesh::start(bench, &format!("change_cost_{services}")).await?;
        mesh.fill(services, INSTANCES).await?;
        mesh.projected().await?;
        meshes.push(mesh);
    }
    // In turns, since the machine has moods.
    let mut cost: Vec<Vec<f64>> = vec![Vec::new(); sizes.len()];
    let mut built = 0.0_f64;
    let changes = bench.plan.of(400, 10);
    for round in 0..bench.plan.of(5, 1) {
        for (mesh, cost) in meshes.iter().zip(&mut cost) {
            let (seconds, shards) = one_round(mesh, changes, round).await?;
            cost.push(seconds);
            built = built.max(shards);
        }
    }
    let medians: Vec<f64> = cost.iter_mut().map(|cost| median(cost)).collect();
    for (services, seconds) in sizes.iter().zip(&medians) {
        say(&format!("{services} services: {:.0} µs of CPU per change", seconds * 1e6));
        bench.report.set_of("cpu_us_per_change", services, seconds * 1e6);
    }
    bench.report.set("shards_rebuilt_per_change", built);
    bench.report.set("cpu_per_change_ratio_1000_vs_10_services", medians[1] / medians[0]);
    for mesh in meshes {
        mesh.end(&bench.server).await?;
    }
    Ok(())
}

/// So many changes, one after the other; CPU seconds and shards built for each.
async fn one_round(mesh: &TestMesh, changes: usize, round: usize) -> anyhow::Result<(f64, f64)> {
    const BUILT: &str = "weft_projector_shards_rebuilt_total";
    let controller = mesh.controllers.first().context("no controller")?;
    let operator = mesh.operator()?;
    // The connection is made before.
    operator.apply(WHY, vec![register(0, 0)]).await?;
    mesh.projected().await?;
    let cpu = || cpu::process_seconds(controller.id()?).context("the controller's CPU time cannot be read");
    let (seconds, shards) = (cpu()?, controller.counter(BUILT).await?);
    for change in 0..changes {
        // Every other one undoes the last one.
        let number = (round * changes + change) / 2 % INSTANCES;
        let change = if change.is_multiple_of(2) {
            Wire::DrainInstance(v1::DrainInstance { instance: instance(1, number) })
        } else {
            register(1, number)
        };
        operator.apply(WHY, vec![change]).await?;
        // A change on its own, not a batch.
        mesh.projected().await?;
    }
    let (seconds, shards) = (cpu()? - seconds, controller.counter(BUILT).await? - shards);
    #[expect(clippy::cast_precision_loss, reason = "some hundred changes")]
    let changes = changes as f64;
    Ok((seconds / changes, shards / changes))
}
