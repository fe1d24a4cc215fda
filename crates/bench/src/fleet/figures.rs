//! The figures, a module for each kind.

mod change_cost;
mod convergence;
mod failover;
mod flapper;
mod reconnect;
mod slow_readers;
mod unused;

pub(crate) use change_cost::{change_cost, change_size};
pub(crate) use convergence::convergence;
pub(crate) use failover::failover;
pub(crate) use flapper::flapper;
pub(crate) use slow_readers::slow_readers;
pub(crate) use unused::unused;

use weft_fleet::{Fleet, Plan, Progress, Reading};

use crate::mesh::TestMesh;
use crate::say;

/// So many sidecars are one line of progress.
const LINE_EVERY: usize = 10_000;

/// A fleet of which each sidecar follows.
pub(crate) async fn fleet(mesh: &TestMesh, plan: Plan) -> anyhow::Result<Fleet> {
    let mut fleet = Fleet::enroll(mesh.mesh()?, plan, tell).await?;
    fleet.subscribe(|_| {}).await?;
    Ok(fleet)
}

/// Tells of some progress.
pub(crate) fn tell(progress: Progress) {
    let Progress { what, done, of } = progress;
    if done == of || done.is_multiple_of(LINE_EVERY) {
        say(&format!("{what}: {done} of {of}"));
    }
}

/// A plan in the bench's namespace.
pub(crate) fn plan(
    sidecars: usize,
    interested: usize,
    endpoints: usize,
    per_connection: usize,
) -> anyhow::Result<Plan> {
    let namespace = "bench".parse()?;
    let (also, reading) = (Vec::new(), Reading::Freely);
    Ok(Plan { namespace, sidecars, endpoints, interested, per_connection, also, reading })
}
