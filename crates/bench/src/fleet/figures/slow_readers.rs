//! What sidecars that do not read cost those that do: in time, and the controller in memory.

use std::time::Duration;

use anyhow::Context as _;
use tokio::time::sleep;
use weft_bench::cpu;
use weft_bench::report::median;
use weft_fleet::profile::{self, Outcome, Pace, Profile};
use weft_fleet::{Fleet, Plan, Reading};

use crate::figures::{fleet, plan, tell};
use crate::mesh::TestMesh;
use crate::{Bench, say};

/// Between one change and the next, when acknowledgements of the last one are over.
const PAUSE: Duration = Duration::from_millis(120);
/// How long slow ones have to get slow, and to be gone.
const SLOW_AFTER: Duration = Duration::from_secs(22);
const GONE_AFTER: Duration = Duration::from_secs(3);

/// A healthy fleet alone, and beside one that never reads and one that reads a byte a second, in turns.
pub(crate) async fn slow_readers(bench: &mut Bench) -> anyhow::Result<()> {
    if !bench.plan.wants(&["slow_readers_p99_ratio", "slow_readers_memory_kib_each"]) {
        return Ok(());
    }
    let (sidecars, each) = (bench.plan.of(1_000, 10), bench.plan.of(500, 5));
    say(&format!(
        "{sidecars} sidecars alone, and beside {each} that never read and {each} that read a byte a second"
    ));
    let mesh = TestMesh::start(bench, "slow_readers").await?;
    let controller = mesh.controllers.first().context("no controller")?.id()?;
    let healthy = plan(sidecars, sidecars, bench.plan.of(100, 5), 1)?;
    let target = healthy.target()?;
    let healthy = fleet(&mesh, healthy).await?;
    let mut slow = Vec::new();
    for (namespace, reading) in [("stuck", Reading::Never), ("slow", Reading::Slowly)] {
        let plan = plan(each, each, 1, 1)?;
        let plan = Plan { namespace: namespace.parse()?, also: vec![target.clone()], reading, ..plan };
        let mut fleet = Fleet::enroll(mesh.mesh()?, plan, tell).await?;
        fleet.unsubscribe().await;
        slow.push(fleet);
    }
    let memory = || cpu::resident_kib(controller).context("the controller's memory cannot be read");
    // So many that slow ones are cut off and come back meanwhile.
    let pace = Pace { changes: bench.plan.of(150, 4), pause: PAUSE };
    let (mut alone, mut beside, mut grown) = (Vec::new(), Vec::new(), 0);
    for _ in 0..bench.plan.of(3, 1) {
        alone.push(endpoint_changes(&healthy, pace).await?);
        let before = memory()?;
        for fleet in &mut slow {
            fleet.subscribe(|_| {}).await?;
            fleet.hold_back();
        }
        sleep(SLOW_AFTER).await;
        beside.push(endpoint_changes(&healthy, pace).await?);
        grown = grown.max(memory()?.saturating_sub(before));
        for fleet in &mut slow {
            fleet.unsubscribe().await;
        }
        sleep(GONE_AFTER).await;
    }
    let mut ratios: Vec<f64> = beside
        .iter()
        .zip(&alone)
        .map(|(beside, alone)| beside.converged.p99_ms / alone.converged.p99_ms)
        .collect();
    let p99 = |outcomes: &[Outcome]| {
        median(&mut outcomes.iter().map(|outcome| outcome.converged.p99_ms).collect::<Vec<_>>())
    };
    let (alone, beside, ratio) = (p99(&alone), p99(&beside), median(&mut ratios));
    let cut_off: u64 = slow.iter().map(|fleet| fleet.counts().faults).sum();
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let kib_each = grown as f64 / (2 * each) as f64;
    say(&format!(
        "p99 alone {alone:.1} ms, beside {beside:.1} ms; {kib_each:.1} KiB for each slow one; {cut_off} were cut off"
    ));
    bench.report.set_of("slow_readers_p99_ms", "alone", alone);
    bench.report.set_of("slow_readers_p99_ms", "beside", beside);
    bench.report.set("slow_readers_cut_off", cut_off);
    bench.report.set("slow_readers_p99_ratio", ratio);
    bench.report.set("slow_readers_memory_kib_each", kib_each);
    drop((healthy, slow));
    mesh.end(&bench.server).await
}

async fn endpoint_changes(fleet: &Fleet, pace: Pace) -> anyhow::Result<Outcome> {
    let outcome = profile::run(fleet, Profile::Endpoint, pace, |_| {}).await?;
    anyhow::ensure!(outcome.faults == 0, "{} sessions of healthy sidecars broke", outcome.faults);
    Ok(outcome)
}
