//! One seed from its beginning to its verdict.

use std::time::Duration;

use serde::Serialize;
use weft_model::security::{Action, SecurityCommand, SecurityPolicy};
use weft_model::{Command, ConfigVersion, SecurityScope};

use crate::plant::Plant;
use crate::world::World;

/// How long after the faults everybody has, to be where the log is: two leases, silences and waits over, and a minute's rest.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);
/// Two missed heartbeats, and the way back to a controller.
const NOTICED_WITHIN: Duration = Duration::from_secs(20);
/// How long a change may take in a calm mesh, from whoever wants it to the last sidecar: the mesh's default bound.
const CHANGE_WITHIN: Duration = Duration::from_secs(1);
/// How often a run looks whether everybody is there.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What came of a seed.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// What was found wrong, if anything was.
    pub violation: Option<String>,
    /// Stands for everything that happened, in order.
    pub trace: String,
    /// How many things happened.
    pub lines: u64,
    /// Events that the log has at the end.
    pub events: usize,
    /// Whether the faults ended, so that liveness was looked at, too.
    pub bounded: bool,
    /// Whether a backup took the log's place.
    pub rewound: bool,
    /// What happened last.
    #[serde(skip)]
    pub tail: Vec<String>,
}

/// Runs a seed, with a bug perhaps. `loud` prints what happens as it does.
#[must_use]
pub fn run(seed: u64, plant: Option<Plant>, loud: bool) -> Outcome {
    let mut world = World::new(seed, plant);
    world.trace.loud = loud;
    go(&mut world);
    world.check_all_acknowledged();
    Outcome {
        seed,
        violation: world.wrong.take(),
        trace: world.trace.digest(),
        lines: world.trace.lines(),
        events: world.database.tables.events.len(),
        bounded: !world.plan.endless,
        rewound: world.plan.restored,
        tail: world.trace.into_tail(),
    }
}

fn go(world: &mut World) {
    let calm = world.plan.calm;
    if world.plan.endless {
        return until(world, calm + Duration::from_secs(10), |_| false);
    }
    until(world, world.plan.changes_until, |_| false);
    until(world, calm + SETTLED_WITHIN, is_settled);
    if world.wrong.is_none() && !is_settled(world) {
        let missing = missing(world);
        return world.complain(format!("liveness: {SETTLED_WITHIN:?} after the last fault, {missing}"));
    }
    // And a change in a calm mesh is quick, once everybody has noticed which streams had broken. Half a second first, so that no
    // heartbeat helps.
    let at = (world.now + Duration::from_millis(500)).max(calm + NOTICED_WITHIN);
    until(world, at, |_| false);
    for default in [Action::Allow, Action::Deny, Action::Allow, Action::Deny] {
        let policy = SecurityPolicy { default: Some(default), ..SecurityPolicy::default() };
        let client = world.want(vec![Command::Security(SecurityScope::Mesh, SecurityCommand::Put(policy))]);
        let reached = |world: &World| world.clients[client].is_done() && is_settled(world);
        let end = world.now + CHANGE_WITHIN;
        until(world, end, reached);
        if world.wrong.is_some() || reached(world) {
            continue;
        }
        // A witness that was shown only now stops every change, as it should: then it is not calm yet.
        if world.database.standing().is_empty() {
            let missing = missing(world);
            return world
                .complain(format!("liveness: {CHANGE_WITHIN:?} after a change in a calm mesh, {missing}"));
        }
        let end = world.now + SETTLED_WITHIN;
        until(world, end, is_settled);
    }
    if world.wrong.is_none() && !is_settled(world) {
        let missing = missing(world);
        world.complain(format!("liveness: {SETTLED_WITHIN:?} after a late finding, {missing}"));
    }
}

/// Lets things happen until then, or until `done`, or until something is wrong.
fn until(world: &mut World, end: Duration, done: impl Fn(&World) -> bool) {
    while world.wrong.is_none() && world.now < end && !done(world) {
        let look = end.min(world.now + LOOK_EVERY);
        while world.wrong.is_none() && world.step(look) {}
    }
}

/// Whether every sidecar, every controller and the rows are where the log is.
fn is_settled(world: &World) -> bool {
    let head = head(world);
    let sidecars = world.sidecars.iter().all(|sidecar| {
        let wanted = world.oracle.projection.wanted(&sidecar.instance);
        let wanted = wanted.map(|wanted| (wanted.version, wanted.class.manifest.hash()));
        let runs = sidecar.snapshot.as_ref().map(|snapshot| (snapshot.version, snapshot.manifest_hash));
        wanted.is_some() && wanted == runs
    });
    sidecars
        && world.database.standing().is_empty()
        && world.database.checkpoint() == head
        && world.controllers.iter().all(|controller| controller.published() == head)
}

fn head(world: &World) -> ConfigVersion {
    world.oracle.projection.version()
}

/// Who is not there yet, in words.
fn missing(world: &World) -> String {
    let sidecars: Vec<String> = world
        .sidecars
        .iter()
        .map(|sidecar| {
            let wanted =
                world.oracle.projection.wanted(&sidecar.instance).map(|wanted| wanted.version.to_string());
            format!("{}, to run {wanted:?}", sidecar.describe())
        })
        .collect();
    let controllers: Vec<String> =
        world.controllers.iter().map(|controller| controller.published().to_string()).collect();
    format!(
        "the log ends at {}, rows at {}, controllers publish {controllers:?}, findings {}: {}",
        head(world),
        world.database.checkpoint(),
        world.database.standing().len(),
        sidecars.join("; ")
    )
}
