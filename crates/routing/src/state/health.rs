//! What an event of an instance's health does: to what is reported of it, to what the data plane sees, and to how much it
//! is damped.

use super::apply::{Touched, TouchedShards, fold, follows};
use super::{EffectiveHealth, FoldError, RoutingState};
use crate::damping::{Held, Penalty, guard};
use std::time::Duration;
use weft_model::damping::{POINTS_PER_CHANGE, POINTS_PER_DOWN};
use weft_model::health::{self, FlapsSummarized, Health, HealthEvent, HealthReported};
use weft_model::{Fact, InstanceId, Timestamp};

/// What an event says of an instance's health.
struct Observed {
    health: Health,
    /// How often it went down, as far as damping counts it.
    downs: u32,
    /// How often it changed.
    flaps: u64,
    /// Within how long.
    over: Duration,
}

impl RoutingState {
    pub(super) fn apply_health<'a>(
        &mut self,
        fact: &Fact,
        id: &'a InstanceId,
        event: &HealthEvent,
    ) -> Result<Touched<'a>, FoldError> {
        let instance = match self.instances.get_mut(id) {
            Some(instance) => {
                follows(Some(instance.health.source), fact)?;
                instance
            }
            None => {
                follows(None, fact)?;
                self.instances.make(id)
            }
        };
        fold(&mut instance.health, fact, |state| health::apply(state, event));
        if instance.membership.state.registration().is_none() {
            return Ok(Touched::default());
        }
        let before = instance.reported();
        let reported = match event {
            HealthEvent::HealthReported(report) => self.observe(id, &Observed::one(report, before), fact.at),
            HealthEvent::FlapsSummarized(summary) => self.observe(id, &Observed::several(summary), fact.at),
            HealthEvent::DampingReleased(_) | HealthEvent::DampingOverridden(_) => {
                self.let_go(id);
                before
            }
        };
        Ok(self.publish_health(id, reported))
    }

    /// Takes in what is reported, adds points, and holds the endpoint if it has too many. Says what is reported now.
    fn observe(&mut self, id: &InstanceId, observed: &Observed, now: Timestamp) -> Health {
        let settings = self.mesh.state.damping;
        let reported = observed.health;
        let Some(instance) = self.instances.get_mut(id) else { return reported };
        let before = instance.reported();
        if observed.downs > 0 && settings.enabled {
            let points = u64::from(observed.downs) * u64::from(POINTS_PER_DOWN);
            instance.damping_mut(now).charge(points, observed.over, now, &settings);
        }
        let Some(damping) = instance.damping.as_deref_mut() else { return reported };
        damping.reported = reported;
        if reported != before || observed.flaps > 1 {
            damping.reported_since = now;
        }
        if let Some(held) = &mut damping.held {
            held.hidden = held.hidden.saturating_add(observed.flaps);
            return reported;
        }
        let went_down = observed.downs > 0 && reported == Health::Unhealthy;
        let too_many = settings.enabled && damping.penalty > Penalty::of(settings.suppress.into());
        if went_down && too_many && guard::may_hold(self, id) {
            self.hold(id, now);
        }
        reported
    }

    fn hold(&mut self, id: &InstanceId, now: Timestamp) {
        let Some(instance) = self.instances.get_mut(id) else { return };
        let source = instance.health.source;
        if let Some(damping) = instance.damping.as_deref_mut() {
            damping.held = Some(Held { since: now, source, hidden: 0 });
            self.held.insert(id.clone());
        }
    }

    fn let_go(&mut self, id: &InstanceId) {
        self.held.remove(id);
        if let Some(damping) = self.instances.get_mut(id).and_then(|it| it.damping.as_deref_mut()) {
            damping.held = None;
        }
    }

    /// Makes what the data plane sees follow from what is reported.
    fn publish_health<'a>(&mut self, id: &'a InstanceId, reported: Health) -> Touched<'a> {
        let Some(instance) = self.instances.get_mut(id) else { return Touched::default() };
        let health = match reported {
            Health::Healthy if instance.is_held() => Health::Unhealthy,
            Health::Unknown | Health::Healthy | Health::Unhealthy => reported,
        };
        if instance.seen.health == health {
            return Touched::default();
        }
        instance.seen = EffectiveHealth { health, source: instance.health.source };
        Touched::shards(TouchedShards::Endpoints(&id.service))
    }

    /// An instance that takes part goes on doing so, perhaps at another place, perhaps described otherwise.
    pub(super) fn stay(&mut self, id: &InstanceId, moved: bool, described_anew: bool, now: Timestamp) {
        let settings = self.mesh.state.damping;
        let Some(instance) = self.instances.get_mut(id).filter(|_| moved || described_anew) else { return };
        if settings.enabled {
            instance.damping_mut(now).charge(POINTS_PER_CHANGE.into(), Duration::ZERO, now, &settings);
        }
        if moved {
            // Nobody looked at what is reached there now.
            instance.forget_health(now);
        }
    }
}

impl Observed {
    fn one(report: &HealthReported, before: Health) -> Self {
        let down = before == Health::Healthy && report.health == Health::Unhealthy && report.doubt.is_some();
        Self {
            health: report.health,
            downs: down.into(),
            flaps: (before != report.health).into(),
            over: Duration::ZERO,
        }
    }

    fn several(summary: &FlapsSummarized) -> Self {
        let FlapsSummarized { downs, ups, over_ms, ref last } = *summary;
        Self {
            health: last.health,
            downs,
            flaps: u64::from(downs) + u64::from(ups),
            over: Duration::from_millis(over_ms.into()),
        }
    }
}
