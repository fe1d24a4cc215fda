//! The running rollout: what its canaries say is kept here until it is written, and whoever leads judges it by what all
//! controllers wrote. What that comes to is decided in [`weft_model::rollout`]; this is the clock and the tables around it.
//!
//! Every controller hears its own canaries. Two that end a rollout at once do no harm, the append's compare-and-swap sees to that;
//! but one judge is enough. What a controller heard and did not write is lost with it; its canaries say it again to the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use weft_model::rollout::{Evidence, Judgement, RolloutBegun, RolloutCommand, Witnessed, judge};
use weft_model::{Chain, Command, ConfigVersion, InstanceId, Position, Timestamp};
use weft_projector::View;
use weft_routing::RoutingState;

use crate::Context;
use crate::commands::Commands;
use crate::status::ApiError;

/// How often what canaries said is written, and looked at: several times within the shortest watch.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Longest reason for a refused snapshot that is kept, in characters.
const ERROR_CHARS_MAX: usize = 200;

/// What canaries of the running rollout said to this controller.
#[derive(Debug, Default)]
pub struct Rollouts {
    heard: Mutex<Heard>,
}

#[derive(Debug, Default)]
struct Heard {
    /// The event that began the rollout.
    rollout: Position,
    /// Bounded by the canaries that a rollout may have.
    canaries: BTreeMap<InstanceId, Witnessed>,
    unwritten: BTreeSet<InstanceId>,
}

/// A word of a sidecar that may be a canary.
#[derive(Debug, Default)]
pub(crate) struct Word<'a> {
    /// What it runs.
    pub(crate) applied: Option<ConfigVersion>,
    /// Why it refused a newer snapshot; empty if it did not.
    pub(crate) error: &'a str,
    /// What it met with in which rollout.
    pub(crate) evidence: Option<(Position, Evidence)>,
}

impl Rollouts {
    /// A sidecar says something. It counts if that is a canary of the running rollout.
    pub(crate) fn hear(&self, view: &View, instance: &InstanceId, word: &Word<'_>) {
        let Some(rollout) = view.read(|projection| canary_of(projection.state(), instance)) else { return };
        let mut heard = self.lock();
        if heard.rollout != rollout {
            *heard = Heard { rollout, ..Heard::default() };
        }
        let witnessed = heard.canaries.entry(instance.clone()).or_default();
        let before = witnessed.clone();
        witnessed.applied = word.applied.is_some_and(|applied| applied.position >= rollout);
        // Who runs it complains of something else.
        witnessed.error = (!witnessed.applied && !word.error.is_empty()).then(|| {
            word.error.chars().filter(|c| !c.is_control()).take(ERROR_CHARS_MAX).collect::<String>()
        });
        if let Some((of, evidence)) = word.evidence
            && of == rollout
        {
            witnessed.evidence = evidence;
        }
        if *witnessed != before {
            heard.unwritten.insert(instance.clone());
        }
    }

    /// Writes, judges and ends rollouts until `drain`. `actor` is this controller.
    pub async fn run(self: Arc<Self>, context: Context, actor: String, drain: CancellationToken) {
        let judge = Judge { commands: Commands::new(&context), rollouts: self, context, actor };
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let work = async {
            loop {
                ticks.tick().await;
                if let Err(error) = judge.look().await {
                    tracing::warn!(?error, "the rollout is not looked after now");
                }
            }
        };
        let _: Option<()> = drain.run_until_cancelled(work).await;
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The rollout that an instance is a canary of, by the event that began it.
fn canary_of(state: &RoutingState, instance: &InstanceId) -> Option<Position> {
    let (begun, source) = state.running_rollout()?;
    begun.canaries.contains(instance).then_some(source.position)
}

/// The running rollout.
struct Running {
    begun: RolloutBegun,
    rollout: Position,
    at: Timestamp,
    /// The canaries that take part.
    live: Vec<InstanceId>,
}

impl Running {
    fn of(view: &View) -> Option<Self> {
        view.read(|projection| {
            let state = projection.state();
            let (begun, source) = state.running_rollout()?;
            let takes_part = |canary: &&InstanceId| {
                state.membership(canary).is_some_and(|entry| entry.state.registration().is_some())
            };
            Some(Self {
                live: begun.canaries.iter().filter(takes_part).cloned().collect(),
                begun: begun.clone(),
                rollout: source.position,
                at: state.rollout().at,
            })
        })
    }
}

/// What the canaries of the running rollout said, each with its name; nothing if none is running.
///
/// # Errors
/// If the database fails.
pub(crate) async fn witnessed(context: &Context) -> Result<Vec<(InstanceId, Witnessed)>, ApiError> {
    match Running::of(&context.view) {
        Some(running) => said(context, running.rollout, running.live).await,
        None => Ok(Vec::new()),
    }
}

/// The same, all of them together.
///
/// # Errors
/// If the database fails.
pub(crate) async fn evidence(context: &Context) -> Result<Evidence, ApiError> {
    let mut evidence = Evidence::default();
    witnessed(context).await?.into_iter().for_each(|(_, witnessed)| evidence += witnessed.evidence);
    Ok(evidence)
}

async fn said(
    context: &Context,
    rollout: Position,
    canaries: Vec<InstanceId>,
) -> Result<Vec<(InstanceId, Witnessed)>, ApiError> {
    let mut rows = context.store.rollout_evidence(rollout).await?;
    let row = |canary: InstanceId| {
        let witnessed = rows.remove(&canary).unwrap_or_default();
        (canary, witnessed)
    };
    Ok(canaries.into_iter().map(row).collect())
}

struct Judge {
    rollouts: Arc<Rollouts>,
    commands: Commands,
    context: Context,
    actor: String,
}

impl Judge {
    async fn look(&self) -> Result<(), ApiError> {
        self.write().await;
        let leads = self.context.view.leads();
        let running = if leads { Running::of(&self.context.view) } else { None };
        metrics::gauge!("weft_rollout_running").set(f64::from(u8::from(running.is_some())));
        let Some(Running { begun, rollout, at, live }) = running else { return Ok(()) };
        let said = said(&self.context, rollout, live).await?;
        let age = (self.context.clock)().since(at);
        let canaries = said.iter().map(|(canary, witnessed)| (canary, witnessed.clone()));
        match judge(&begun, age, canaries) {
            Judgement::Watch => Ok(()),
            Judgement::End(end) => self.end(end).await,
        }
    }

    /// What is not written is written the next time.
    async fn write(&self) {
        let (rollout, rows) = {
            let mut heard = self.rollouts.lock();
            let unwritten = std::mem::take(&mut heard.unwritten);
            let row = |canary| heard.canaries.get_key_value(&canary).map(|(id, it)| (id.clone(), it.clone()));
            (heard.rollout, unwritten.into_iter().filter_map(row).collect::<Vec<_>>())
        };
        if rows.is_empty() {
            return;
        }
        if let Err(error) = self.context.store.put_rollout_evidence(rollout, &rows).await {
            tracing::warn!(error = %Chain(&error), rows = rows.len(), "what canaries said is not written yet");
            let mut heard = self.rollouts.lock();
            if heard.rollout == rollout {
                heard.unwritten.extend(rows.into_iter().map(|(canary, _)| canary));
            }
        }
    }

    async fn end(&self, end: RolloutCommand) -> Result<(), ApiError> {
        let (outcome, reason) = match &end {
            RolloutCommand::Abort { reason, .. } => ("aborted", reason.clone()),
            RolloutCommand::Begin(_) | RolloutCommand::Advance(_) => {
                ("advanced", "its canaries were watched for long enough".to_owned())
            }
        };
        let evidence = match &end {
            RolloutCommand::Advance(evidence) | RolloutCommand::Abort { evidence, .. } => *evidence,
            RolloutCommand::Begin(_) => Evidence::default(),
        };
        let ended = self.commands.execute_own(&self.actor, reason.clone(), Command::Rollout(end)).await;
        match ended {
            Ok(_) => {
                metrics::counter!("weft_rollouts_ended_total", "outcome" => outcome).increment(1);
                tracing::info!(outcome, reason, ?evidence, "the rollout ended");
                Ok(())
            }
            // What it rests on is not there any more, a service perhaps: nobody else will get it either.
            Err(ApiError::Rejected { scope, rejection, .. }) if outcome == "advanced" => {
                let reason = format!("it cannot be given to everybody: {scope}: {rejection}");
                let abort = RolloutCommand::Abort { reason: reason.clone(), evidence };
                self.commands.execute_own(&self.actor, reason, Command::Rollout(abort)).await.map(drop)
            }
            Err(error) => Err(error),
        }
    }
}
