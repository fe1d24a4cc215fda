//! The running rollout: what its canaries say is kept here until it is written, and whoever leads judges it by what all
//! controllers wrote. What that comes to is decided in [`weft_model::rollout`]; this is the clock and the tables around it.
//!
//! Every controller hears its own canaries. Two that end a rollout at once do no harm, since each says which one it means; but
//! one judge is enough. What a controller heard and did not write is lost with it; its canaries say it again, to the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use weft_model::rollout::{Evidence, Judgement, RolloutBegun, RolloutCommand, Witnessed, judge};
use weft_model::version::ExpectedVersion;
use weft_model::{
    Chain, Command, ConfigVersion, InstanceId, Position, Rejection, Scope, ScopeVersion, Timestamp, Version,
};
use weft_projector::{CanaryWord, View};
use weft_routing::RoutingState;

use crate::Context;
use crate::commands::{Change, Commands};
use crate::convert::words;
use crate::status::ApiError;

/// How often what canaries said is written, and looked at: several times within the shortest watch.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A canary of which nothing was heard for so long, three heartbeats, may not run it any more.
const SILENT_AFTER: Duration = Duration::from_secs(15);
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
    canaries: BTreeMap<InstanceId, CanaryWord>,
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
        let canary = || {
            view.read(|projection| {
                let state = projection.state();
                Some((canary_of(state, instance)?, state.version().epoch))
            })
        };
        // Nearly everybody is none.
        if canary().is_none() {
            return;
        }
        let mut heard = self.lock();
        // Again under the lock, so that of two words the later one is about the later rollout.
        let Some((rollout, epoch)) = canary() else { return };
        if heard.rollout != rollout {
            *heard = Heard { rollout, ..Heard::default() };
        }
        let said = heard.canaries.entry(instance.clone()).or_default();
        // A version of an earlier epoch may be of a history that is no more.
        said.applied =
            word.applied.is_some_and(|applied| applied.epoch == epoch && applied.position >= rollout);
        // Who runs it complains of something else.
        said.error = (!said.applied && !word.error.is_empty()).then(|| words(word.error, ERROR_CHARS_MAX));
        if let Some((of, evidence)) = word.evidence
            && of == rollout
        {
            said.evidence = Some(evidence);
        }
        heard.unwritten.insert(instance.clone());
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
    source: ScopeVersion,
    at: Timestamp,
    /// The canaries that take part.
    live: BTreeSet<InstanceId>,
}

/// What its canaries say.
struct Said {
    /// Since its begin, by the database's clock.
    age: Duration,
    live: BTreeMap<InstanceId, Witnessed>,
    gone: BTreeMap<InstanceId, Witnessed>,
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
                source,
                at: state.rollout().at,
            })
        })
    }

    async fn said(&self, context: &Context) -> Result<Said, ApiError> {
        let (now, rows) = context.store.rollout_evidence(self.source.position, SILENT_AFTER).await?;
        let (mut live, gone): (BTreeMap<_, _>, BTreeMap<_, _>) =
            rows.into_iter().partition(|(canary, _)| self.live.contains(canary));
        for canary in &self.live {
            live.entry(canary.clone()).or_default();
        }
        Ok(Said { age: now.since(self.at), live, gone })
    }
}

/// What the canaries of the running rollout say that take part, each with its name; nothing if none is running.
///
/// # Errors
/// If the database fails.
pub(crate) async fn witnessed(context: &Context) -> Result<Vec<(InstanceId, Witnessed)>, ApiError> {
    match Running::of(&context.view) {
        Some(running) => Ok(running.said(context).await?.live.into_iter().collect()),
        None => Ok(Vec::new()),
    }
}

/// The version of the running rollout's scope, and what all its canaries met with. The caller means the one that began at `meant`;
/// any if that is 0.
///
/// # Errors
/// If none is running, or another one; if the database fails.
pub(crate) async fn running(context: &Context, meant: Position) -> Result<(Version, Evidence), ApiError> {
    let running = Running::of(&context.view);
    let running = running.filter(|it| meant == Position::ZERO || it.source.position == meant);
    let running = running.ok_or_else(|| {
        let rejection = Box::new(Rejection::NoRollout);
        ApiError::Rejected { change: None, scope: Scope::Rollout, rejection }
    })?;
    let said = running.said(context).await?;
    let mut evidence = Evidence::default();
    for witnessed in said.live.values().chain(said.gone.values()) {
        evidence += witnessed.evidence.unwrap_or_default();
    }
    Ok((running.source.version, evidence))
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
        let Some(running) = running else { return Ok(()) };
        self.context.store.forget_rollouts_after(running.source.position).await?;
        let Said { age, live, gone } = running.said(&self.context).await?;
        let version = running.source.version;
        match judge(&running.begun, age, &live, &gone) {
            Judgement::Watch => Ok(()),
            Judgement::Advance(evidence) => self.advance(version, evidence).await,
            Judgement::Abort { reason, evidence } => self.abort(version, reason, evidence).await,
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

    async fn advance(&self, version: Version, evidence: Evidence) -> Result<(), ApiError> {
        let reason = "its canaries were watched for long enough";
        let advance = RolloutCommand::Advance(evidence);
        match self.end(version, "advanced", reason.to_owned(), advance).await {
            // What it rests on is not there any more, a service perhaps: nobody else will get it either.
            Err(ApiError::Rejected { scope, rejection, .. }) => {
                let reason = format!("it cannot be given to everybody: {scope}: {rejection}");
                self.abort(version, reason, evidence).await
            }
            ended => ended,
        }
    }

    async fn abort(&self, version: Version, reason: String, evidence: Evidence) -> Result<(), ApiError> {
        let abort = RolloutCommand::Abort { reason: reason.clone(), evidence };
        self.end(version, "aborted", reason, abort).await
    }

    /// Ends the rollout that was judged, which began with this version of the scope, and no other.
    async fn end(
        &self,
        version: Version,
        outcome: &'static str,
        reason: String,
        end: RolloutCommand,
    ) -> Result<(), ApiError> {
        let change = Change::new(ExpectedVersion::exactly(version), Command::Rollout(end));
        match self.commands.execute_own(&self.actor, reason.clone(), change).await {
            Ok(_) => {
                metrics::counter!("weft_rollouts_ended_total", "outcome" => outcome).increment(1);
                tracing::info!(outcome, reason, "the rollout ended");
                Ok(())
            }
            // Somebody else was faster.
            Err(ApiError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
