//! What services cost a sidecar that does not use them.

use weft_fleet::Fleet;

use crate::figures::{plan, tell};
use crate::mesh::{TestMesh, filling};
use crate::{Bench, say};

/// Services that the sidecar uses, with the one of the fleet itself.
const USED: usize = 3;

/// The snapshot of a sidecar that names three services, in a mesh of three and in one of ten thousand.
pub(crate) async fn unused(bench: &mut Bench) -> anyhow::Result<()> {
    if !bench.plan.wants(&["unused_services_bytes"]) {
        return Ok(());
    }
    let services = bench.plan.of(10_000, 100);
    say(&format!("a sidecar that uses {USED} of {services} services"));
    let small = snapshot_bytes(bench, USED).await?;
    let large = snapshot_bytes(bench, services).await?;
    bench.report.set("snapshot_bytes", large);
    bench.report.set("unused_services_bytes", i64::try_from(large)? - i64::try_from(small)?);
    Ok(())
}

async fn snapshot_bytes(bench: &Bench, services: usize) -> anyhow::Result<u64> {
    let mesh = TestMesh::start(bench, &format!("unused_{services}")).await?;
    mesh.fill(services - 1, 1).await?;
    let mut plan = plan(1, 1, 1, 1)?;
    plan.also = (0..USED - 1).map(|service| filling(service).parse()).collect::<Result<_, _>>()?;
    let mut fleet = Fleet::enroll(mesh.mesh()?, plan, tell).await?;
    fleet.subscribe(|_| {}).await?;
    let bytes = fleet.snapshot_bytes();
    drop(fleet);
    mesh.end(&bench.server).await?;
    Ok(bytes)
}
