//! What services cost a sidecar that does not use them.

use weft_fleet::Fleet;
use weft_proto::v1;
use weft_proto::v1::change::Change as Wire;

use crate::figures::{plan, tell};
use crate::mesh::{TestMesh, WHY, filling};
use crate::{Bench, say};

/// Services that the sidecar uses, with the one of the fleet itself.
const USED: usize = 3;

/// The snapshot of a sidecar that names three services, in a mesh of ten thousand and in one of three. Both meshes have logs of the
/// same length, because a larger position takes more bytes to write, whatever it is about.
pub(crate) async fn unused(bench: &mut Bench) -> anyhow::Result<()> {
    if !bench.plan.wants(&["unused_services_bytes"]) {
        return Ok(());
    }
    let services = bench.plan.of(10_000, 100);
    say(&format!("a sidecar that uses {USED} of {services} services"));
    let (large, events) = snapshot_bytes(bench, services, 0).await?;
    let (small, _) = snapshot_bytes(bench, USED, events).await?;
    bench.report.set("snapshot_bytes", large);
    bench.report.set("unused_services_bytes", i64::try_from(large)? - i64::try_from(small)?);
    Ok(())
}

/// Bytes of the snapshot in a mesh of so many services, and events in its log before the sidecar came: at least so many.
async fn snapshot_bytes(bench: &Bench, services: usize, events: i64) -> anyhow::Result<(u64, i64)> {
    let mesh = TestMesh::start(bench, &format!("unused_{services}")).await?;
    mesh.fill(services - 1, 1).await?;
    let operator = mesh.operator()?;
    let mut bound = 1_000;
    for _ in mesh.events().await?..events {
        bound = if bound == 1_000 { 1_001 } else { 1_000 };
        let defaults = v1::MeshDefaults { propagation_bound_ms: bound, ..mesh_defaults() };
        operator.apply(WHY, vec![Wire::SetMeshDefaults(defaults)]).await?;
    }
    let events = mesh.events().await?;
    let mut plan = plan(1, 1, 1, 1)?;
    plan.also = (0..USED - 1).map(|service| filling(service).parse()).collect::<Result<_, _>>()?;
    let mut fleet = Fleet::enroll(mesh.mesh()?, plan, tell).await?;
    fleet.subscribe(|_| {}).await?;
    let bytes = fleet.snapshot_bytes();
    drop(fleet);
    mesh.end(&bench.server).await?;
    Ok((bytes, events))
}

fn mesh_defaults() -> v1::MeshDefaults {
    v1::MeshDefaults { security: v1::Action::Deny.into(), ..v1::MeshDefaults::default() }
}
