//! How fast a change reaches a fleet, how fast a fleet comes back, and what a sidecar costs the controller in memory.

use std::time::Duration;

use anyhow::Context as _;
use tokio::time::sleep;
use weft_bench::cpu;
use weft_fleet::Fleet;
use weft_fleet::profile::{self, Pace, Profile};

use crate::figures::reconnect::reconnect;
use crate::figures::{plan, tell};
use crate::mesh::TestMesh;
use crate::{Bench, say};

/// Endpoints of the service that changes.
const ENDPOINTS: usize = 100;
/// Sidecars behind one relay, where a fleet is too large for a connection each.
const BEHIND_RELAY: usize = 1_000;
/// How long a controller has to settle before its memory is read.
const SETTLE: Duration = Duration::from_secs(3);

/// A fleet to be measured.
struct Case {
    key: &'static str,
    sidecars: usize,
    interested: usize,
    per_connection: usize,
    changes: usize,
}

pub(crate) async fn convergence(bench: &mut Bench) -> anyhow::Result<()> {
    const CONVERGENCE: [&str; 2] = ["convergence_p50_ms", "convergence_p99_ms"];
    const OF_10000: [&str; 2] = ["reconnect_10000_s", "memory_kib_per_sidecar"];
    let of = |whole, quick| bench.plan.of(whole, quick);
    let cases = [
        Case {
            key: "1000",
            sidecars: of(1_000, 20),
            interested: of(1_000, 20),
            per_connection: 1,
            changes: of(200, 4),
        },
        Case {
            key: "10000",
            sidecars: of(10_000, 30),
            interested: of(10_000, 30),
            per_connection: 1,
            changes: of(40, 4),
        },
        Case {
            key: "100000_1pct",
            sidecars: of(100_000, 50),
            interested: of(1_000, 5),
            per_connection: of(BEHIND_RELAY, 10),
            changes: of(100, 4),
        },
    ];
    for case in cases {
        let whole = case.key == "10000" && bench.plan.wants(&OF_10000);
        if whole || bench.plan.wants(&CONVERGENCE) {
            measure(bench, &case).await?;
        }
    }
    Ok(())
}

async fn measure(bench: &mut Bench, case: &Case) -> anyhow::Result<()> {
    let Case { key, sidecars, interested, per_connection, changes } = *case;
    say(&format!("{sidecars} sidecars, {interested} of them interested, {per_connection} on a connection"));
    let mesh = TestMesh::start(bench, &format!("convergence_{key}")).await?;
    let plan = plan(sidecars, interested, bench.plan.of(ENDPOINTS, 5), per_connection)?;
    let controller = mesh.controllers.first().context("no controller")?.id()?;
    sleep(SETTLE).await;
    let before = cpu::resident_kib(controller).context("the controller's memory cannot be read")?;
    let mut fleet = Fleet::enroll(mesh.mesh()?, plan, tell).await?;
    fleet.subscribe(|_| {}).await?;
    sleep(SETTLE).await;
    let after = cpu::resident_kib(controller).context("the controller's memory cannot be read")?;
    let memory = kib_each(after.saturating_sub(before), fleet.size());
    say(&format!("memory per sidecar: {memory:.1} KiB"));

    // Acknowledgements of one change are over before the next one comes, as they would be in most meshes.
    let pause = Duration::from_micros(120).saturating_mul(u32::try_from(interested)?);
    let pace = Pace { changes, pause: pause.max(Duration::from_millis(50)) };
    let outcome = profile::run(&fleet, Profile::Endpoint, pace, |_| {}).await?;
    anyhow::ensure!(outcome.refused == 0, "snapshots were refused");
    say(&format!("p50 {:.1} ms, p99 {:.1} ms", outcome.converged.p50_ms, outcome.converged.p99_ms));
    bench.report.set_of("convergence_p50_ms", key, outcome.converged.p50_ms);
    bench.report.set_of("convergence_p99_ms", key, outcome.converged.p99_ms);
    bench.report.set_of("convergence_max_ms", key, outcome.converged.max_ms);
    bench.report.set_of("pulls_while_converging", key, outcome.pulls);
    bench.report.set_of("memory_kib_each", key, memory);
    if key == "10000" {
        bench.report.set("memory_kib_per_sidecar", memory);
    }
    reconnect(bench, &fleet, key, controller).await?;
    drop(fleet);
    mesh.end(&bench.server).await
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn kib_each(kib: u64, sidecars: usize) -> f64 {
    kib as f64 / sidecars as f64
}
