//! What a fleet goes through: kinds of change, one after the other, and how each spread.

use futures_util::future::try_join_all;
use std::time::Duration;
use tokio::time::sleep;
use weft_proto::v1;
use weft_proto::v1::change::Change as Wire;

use crate::convergence::Convergence;
use crate::error::FleetError;
use crate::{Counts, Fleet, Progress, Spread};

/// A kind of churn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// Endpoints of the target go down and up again, one after the other.
    Endpoint,
    /// Every endpoint of the target is replaced, one after the other: drained, taken out, registered, found healthy.
    Rolling,
    /// A tenth of the target's endpoints go down and up all the time, all of them at once. A mesh damps that: only the
    /// first changes spread.
    Flap,
    /// The target's traffic policy changes.
    Policy,
    /// All connections break at once.
    Reconnect,
}

impl Profile {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Endpoint, Self::Rolling, Self::Flap, Self::Policy, Self::Reconnect];

    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Endpoint => "endpoint",
            Self::Rolling => "rolling",
            Self::Flap => "flap",
            Self::Policy => "policy",
            Self::Reconnect => "reconnect",
        }
    }
}

/// How a profile went.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Outcome {
    /// Which.
    pub profile: Profile,
    /// Events that were asked for and acknowledged, or cuts.
    pub changes: usize,
    /// From asking to acknowledgement.
    pub append: Spread,
    /// From acknowledgement to each interested sidecar's running it; for a cut, until all are back.
    pub converged: Spread,
    /// Notices per change and interested sidecar. Below 1 where several changes came together.
    pub notices_per_change: f64,
    /// Mean size of a notice, framed.
    pub bytes_per_notice: f64,
    /// Pulls that were needed.
    pub pulls: u64,
    /// Sessions that a fault ended.
    pub faults: u64,
    /// Snapshots that were refused.
    pub refused: u64,
}

/// How long a profile is.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Changes; cuts are a tenth of that.
    pub changes: usize,
    /// Between the end of one and the next.
    pub pause: Duration,
}

/// Puts a fleet through a profile.
///
/// # Errors
/// A change is refused, or does not spread.
pub async fn run(
    fleet: &Fleet,
    profile: Profile,
    pace: Pace,
    progress: impl Fn(Progress),
) -> Result<Outcome, FleetError> {
    let before = fleet.counts();
    let what = profile.as_str();
    let mut spread: Vec<Convergence> = Vec::new();
    let mut cuts = Vec::new();
    let steps = if profile == Profile::Reconnect { pace.changes.div_ceil(10) } else { pace.changes };
    for step in 0..steps {
        match profile {
            Profile::Endpoint => spread.extend(fleet.endpoint_step(step).await?),
            Profile::Rolling => spread.extend(fleet.rolling_step(step).await?),
            Profile::Flap => spread.extend(fleet.flap_step(step).await?),
            Profile::Policy => spread.push(fleet.policy_step(step).await?),
            Profile::Reconnect => cuts.push(fleet.cut(|_| {}).await?),
        }
        progress(Progress { what, done: step + 1, of: steps });
        sleep(pace.pause).await;
    }
    // What is half done would be in the next one's way.
    match profile {
        Profile::Endpoint if steps % 2 == 1 => drop(fleet.endpoint_step(steps).await?),
        Profile::Rolling => {
            for step in (steps..).take_while(|step| step % ROLLING_STEPS != 0) {
                fleet.rolling_step(step).await?;
            }
        }
        Profile::Flap if steps % 2 == 1 => drop(fleet.flap_step(steps).await?),
        Profile::Endpoint | Profile::Flap | Profile::Policy | Profile::Reconnect => {}
    }
    Ok(outcome(fleet, profile, before, &spread, &cuts))
}

fn outcome(
    fleet: &Fleet,
    profile: Profile,
    before: Counts,
    spread: &[Convergence],
    cuts: &[Duration],
) -> Outcome {
    let after = fleet.counts();
    let changes = spread.len() + cuts.len();
    let notices = after.notices - before.notices;
    let expected = changes * fleet.shared.plan.interested;
    Outcome {
        profile,
        changes,
        append: Spread::of(spread.iter().map(|change| change.append)),
        converged: Spread::of(spread.iter().flat_map(|change| &change.applied).chain(cuts).copied()),
        notices_per_change: ratio(notices, u64::try_from(expected).unwrap_or_default()),
        bytes_per_notice: ratio(after.notice_bytes - before.notice_bytes, notices),
        pulls: after.pulls - before.pulls,
        faults: after.faults - before.faults,
        refused: after.refused - before.refused,
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of messages are far below 2^52")]
fn ratio(of: u64, to: u64) -> f64 {
    if to == 0 { 0.0 } else { of as f64 / to as f64 }
}

/// What replacing an endpoint takes.
const ROLLING_STEPS: usize = 4;

impl Fleet {
    /// One endpoint after the other goes down, and up again.
    async fn endpoint_step(&self, step: usize) -> Result<Option<Convergence>, FleetError> {
        let health = if step.is_multiple_of(2) { v1::Health::Unhealthy } else { v1::Health::Healthy };
        self.report((step / 2) % self.shared.plan.endpoints, health).await
    }

    async fn rolling_step(&self, step: usize) -> Result<Option<Convergence>, FleetError> {
        let endpoint = (step / ROLLING_STEPS) % self.shared.plan.endpoints;
        let instance = self.instance(endpoint)?;
        let change = match step % ROLLING_STEPS {
            0 => Wire::DrainInstance(v1::DrainInstance { instance }),
            1 => Wire::DeregisterInstance(v1::DeregisterInstance { instance }),
            2 => {
                self.unseen(endpoint)?;
                Wire::RegisterInstance(self.registration(endpoint)?)
            }
            _ => return self.report(endpoint, v1::Health::Healthy).await,
        };
        self.change(change).await.map(Some)
    }

    /// Some endpoints change at once; each such report is a change of its own, until the mesh damps them.
    async fn flap_step(&self, step: usize) -> Result<Vec<Convergence>, FleetError> {
        let health = if step.is_multiple_of(2) { v1::Health::Unhealthy } else { v1::Health::Healthy };
        let flapping = self.shared.plan.endpoints.div_ceil(10);
        let spread = try_join_all((0..flapping).map(|endpoint| self.report(endpoint, health))).await?;
        Ok(spread.into_iter().flatten().collect())
    }

    async fn policy_step(&self, step: usize) -> Result<Convergence, FleetError> {
        let scope = self.shared.plan.target()?.to_string();
        let policy = v1::TrafficPolicy {
            connect_timeout_ms: 1_000 + u32::try_from(step % 1_000).unwrap_or_default(),
            ..v1::TrafficPolicy::default()
        };
        self.change(Wire::PutTrafficPolicy(v1::PutTrafficPolicy { scope, policy: Some(policy) })).await
    }
}
