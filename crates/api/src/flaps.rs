//! Reports of endpoints that flap: counted here, recorded now and then, and the endpoints let go when it is time. What is
//! counted, when it is due, and who is let go is decided in [`weft_routing::damping`]; this is the clock and the log around it.
//!
//! Every controller counts what its own sidecars report and records that. Letting go is up to the one whose projector leads:
//! not because another one could do harm, the append's compare-and-swap sees to that, but because one is enough.
//!
//! What is counted is lost if this process dies. Its sidecars then report to another controller how they are, so that
//! nothing but points is missing.

use futures_util::{StreamExt, stream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use weft_model::health::{FlapsSummarized, HealthCommand, HealthEvent, HealthReported};
use weft_model::version::ExpectedVersion;
use weft_model::{Command, InstanceId, Rejection, Scope};
use weft_routing::damping::counting::Taken;
use weft_routing::damping::{self, Counting};

use crate::commands::{Change, Commands};
use crate::status::ApiError;
use crate::{Clock, Context};

/// How often what is due is looked for: a quarter of the shortest time that damping knows.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How many appends are under way at once; they share one flush of the log, so more would change little.
const AT_ONCE: usize = 32;
/// How long the rest may take when the controller ends; what is not recorded then is lost as in a crash.
const END_MAX: Duration = Duration::from_secs(2);

/// What this controller counts.
#[derive(Debug, Default)]
pub struct Flaps {
    /// Bounded by the endpoints that are held or kept in spite of flapping.
    counting: Mutex<Counting>,
}

impl Flaps {
    /// Counts a report, or says what to record because of it.
    pub(crate) fn take(
        &self,
        context: &Context,
        instance: &InstanceId,
        report: HealthReported,
    ) -> Result<Taken, Rejection> {
        if context.view.fault().is_some() {
            // The fold stands still, so it cannot tell what is to be counted.
            return Ok(Taken::Record(HealthCommand::Report(report)));
        }
        let now = (context.clock)();
        let taken = context
            .view
            .read(|mesh| self.with(|counting| counting.take(mesh.state(), instance, report, now)))?;
        if taken == Taken::Counted {
            metrics::counter!("weft_health_reports_counted_total").increment(1);
        }
        Ok(taken)
    }

    /// Takes note of what became of a command: what was recorded, or will never be, is not counted any more.
    pub(crate) fn settle<T>(
        &self,
        clock: &Clock,
        instance: &InstanceId,
        command: &HealthCommand,
        result: &Result<T, ApiError>,
    ) {
        if matches!(result, Ok(_) | Err(ApiError::Rejected { .. })) {
            self.with(|counting| counting.settle(instance, command, clock()));
        }
    }

    /// Does what is due until `drain`, and records the rest then. `actor` is this controller.
    pub async fn run(self: Arc<Self>, context: Context, actor: String, drain: CancellationToken) {
        let keeper = Keeper { commands: Commands::new(&context), flaps: self, context, actor };
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let work = async {
            loop {
                ticks.tick().await;
                keeper.record_due(false).await;
                keeper.let_go().await;
            }
        };
        let ended: Option<()> = drain.run_until_cancelled(work).await;
        if ended.is_none() && timeout(END_MAX, keeper.record_due(true)).await.is_err() {
            tracing::warn!("reports that were only counted are lost: the log does not answer");
        }
    }

    fn with<R>(&self, work: impl FnOnce(&mut Counting) -> R) -> R {
        work(&mut self.counting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Keeper {
    flaps: Arc<Flaps>,
    commands: Commands,
    context: Context,
    actor: String,
}

impl Keeper {
    async fn record_due(&self, all: bool) {
        let now = (self.context.clock)();
        let due = self.context.view.read(|mesh| {
            self.flaps.with(|counting| {
                if counting.is_empty() { Vec::new() } else { counting.due(mesh.state(), now, all) }
            })
        });
        let record = |(instance, command): (InstanceId, HealthCommand)| async move {
            let reason = match &command {
                HealthCommand::Summarize(summary) => summary_reason(summary),
                HealthCommand::Report(_) | HealthCommand::Reconsider => "as its sidecar reported".to_owned(),
            };
            let result = self.execute(&instance, command.clone(), reason).await;
            self.flaps.settle(&self.context.clock, &instance, &command, &result);
        };
        stream::iter(due).for_each_concurrent(AT_ONCE, record).await;
    }

    async fn let_go(&self) {
        let leads = self.context.view.leads();
        let now = (self.context.clock)();
        let (held, due) = self.context.view.read(|mesh| {
            let state = mesh.state();
            let due = if leads { damping::due(state, now) } else { Default::default() };
            let reason = |id: InstanceId| Some((reason(&damping::reconsider(state, &id, now)?), id));
            (state.held().len(), due.into_iter().filter_map(reason).collect::<Vec<_>>())
        });
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        metrics::gauge!("weft_endpoints_held").set(held as f64);
        let let_go = |(reason, instance): (String, InstanceId)| async move {
            if self.execute(&instance, HealthCommand::Reconsider, reason.clone()).await.is_ok() {
                tracing::info!(%instance, reason, "not held down any more");
            }
        };
        stream::iter(due).for_each_concurrent(AT_ONCE, let_go).await;
    }

    /// What fails is due again the next time.
    async fn execute(
        &self,
        instance: &InstanceId,
        command: HealthCommand,
        reason: String,
    ) -> Result<(), ApiError> {
        // What makes a repeat harmless is the report's revision, and that a release finds nothing left to do.
        let change = Change::new(ExpectedVersion::Any, Command::Health(instance.clone(), command));
        let result = self.commands.execute_own(&self.actor, reason, change).await.map(drop);
        if let Err(error) = &result {
            tracing::debug!(%instance, ?error, "health could not be recorded");
        }
        result
    }
}

/// A refused report, as every refused change is told.
pub(crate) fn refused(instance: &InstanceId, rejection: Rejection) -> ApiError {
    let scope = Scope::Health(instance.clone());
    ApiError::Rejected { change: None, scope, rejection: Box::new(rejection) }
}

fn summary_reason(summary: &FlapsSummarized) -> String {
    let FlapsSummarized { downs, ups, over_ms, .. } = summary;
    format!("went down {downs} and up {ups} times within {} s", over_ms.div_ceil(1_000))
}

fn reason(event: &HealthEvent) -> String {
    match event {
        HealthEvent::DampingReleased(released) => {
            format!("{}, with {} points", released.cause.as_str(), released.penalty)
        }
        HealthEvent::DampingOverridden(overridden) => {
            let (usable, of) = (overridden.usable, overridden.of);
            format!("its service needs it: {usable} of {of} take connections")
        }
        HealthEvent::HealthReported(_) | HealthEvent::FlapsSummarized(_) => "observed".to_owned(),
    }
}
