//! Health damping: an endpoint that goes up and down all the time is held down until it is calm, so that its flaps reach
//! neither sidecars nor the log one by one.
//!
//! **Points.** Each time an endpoint goes from healthy to unhealthy it gets a thousand points, each change of its
//! registration some ([`weft_model::damping`]); half of them are forgotten every half-life. One that goes down with more than
//! `suppress` points is **held**: published as unhealthy whatever it reports. With fewer than `reuse`, and after
//! [`CALM`] of being up, it is let go.
//!
//! **Who decides what.** The fold holds an endpoint, at the event that brings it over the threshold: it looks at logged time
//! alone. What needs time to *pass* is an event, appended by the leading controller when [`due`] says so and
//! [`reconsider`] agrees: decided again against the state that the append's compare-and-swap vouches for, so of two
//! controllers that try, one finds nothing left to do. An endpoint's published health changes only by an event of its own
//! two scopes, which is what `weft why` shows.
//!
//! **Counting.** While [`counts`] says so, a controller takes an endpoint's reports into a [`Counting`] and has one summary
//! recorded now and then. What a controller counted and could not record is lost with it, and then points are too low, never
//! wrong otherwise: the sidecar, cut off with it, reports how it is to the next one, with a higher revision.
//!
//! **Capacity** comes before damping ([`guard`]): what a service needs is not held, and let go.
//!
//! Points are integers with a fixed point ([`penalty`]), so that the fold is the same on every machine (I2). Read
//! `tests/damping.rs`.

pub mod counting;
pub mod guard;
pub mod penalty;

pub use counting::Counting;
pub use penalty::Penalty;

use crate::state::RoutingState;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;
use weft_model::damping::DampingSettings;
use weft_model::health::{DampingOverridden, DampingReleased, Health, HealthEvent, ReleaseCause};
use weft_model::{InstanceId, ScopeVersion, Timestamp};

/// How long an endpoint must have been up before it is let go.
pub const CALM: Duration = Duration::from_secs(5);
/// Passes between the moment from which reports are recorded again one by one and the release: what another controller,
/// whose clock may be a little behind, has counted until then is in the log first.
pub const GRACE: Duration = Duration::from_secs(1);
/// An endpoint with more points than `suppress` that its service cannot do without is not held; but its reports are
/// recorded no more often than this.
pub const KEPT_EVERY: Duration = Duration::from_secs(1);

/// How much an endpoint flapped. There is none for one that never got points since it registered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Damping {
    /// Its points when it last got some.
    pub penalty: Penalty,
    /// When that was.
    pub charged_at: Timestamp,
    /// What its sidecar reported last; what is published may differ.
    pub reported: Health,
    /// Since when it reports that, without a flap in between.
    pub reported_since: Timestamp,
    /// Since when it is held; none if it is not.
    pub held: Option<Held>,
}

/// An endpoint is held down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Held {
    /// Since when.
    pub since: Timestamp,
    /// The event of its health that brought it over the threshold.
    pub source: ScopeVersion,
    /// How many changes of its health were not published since.
    pub hidden: u64,
}

impl Damping {
    pub(crate) const fn new(reported: Health, now: Timestamp) -> Self {
        Self { penalty: Penalty::ZERO, charged_at: now, reported, reported_since: now, held: None }
    }

    /// Its points at a moment.
    #[must_use]
    pub fn penalty_at(&self, now: Timestamp, settings: &DampingSettings) -> Penalty {
        self.penalty.decayed(now.since(self.charged_at), settings.half_life_ms)
    }

    /// Adds points that came evenly within the time `over` before `now`: they count as if all had come in its middle.
    pub(crate) fn charge(&mut self, points: u64, over: Duration, now: Timestamp, settings: &DampingSettings) {
        let new = Penalty::of(points).decayed(over / 2, settings.half_life_ms);
        self.penalty = self.penalty_at(now, settings).plus(new).min(Penalty::most(settings));
        self.charged_at = now;
    }

    /// From when on points allow to let it go.
    #[must_use]
    pub fn reusable_at(&self, settings: &DampingSettings) -> Timestamp {
        let after = self.penalty.falls_below(settings.reuse, settings.half_life_ms);
        self.charged_at.after(after)
    }

    /// When it will be let go if it stays up; none if it is not held, or not up.
    #[must_use]
    pub fn release_at(&self, settings: &DampingSettings) -> Option<Timestamp> {
        let up = self.held.is_some() && self.reported == Health::Healthy;
        let calm = self.reported_since.after(CALM);
        up.then(|| self.reusable_at(settings).after(GRACE).max(calm))
    }
}

/// Whether reports of an endpoint are counted, not recorded one by one: while it is held and has too many points to be let
/// go, and for a moment after each report of one that is only not held because its service needs it.
#[must_use]
pub fn counts(state: &RoutingState, id: &InstanceId, now: Timestamp) -> bool {
    let settings = &state.mesh().state.damping;
    let Some(damping) = state.damping(id).filter(|_| settings.enabled) else { return false };
    let penalty = damping.penalty_at(now, settings);
    match damping.held {
        Some(_) => penalty >= Penalty::of(settings.reuse.into()),
        None => {
            let last = state.health(id).map(|entry| entry.at).unwrap_or_default();
            penalty > Penalty::of(settings.suppress.into()) && now < last.after(KEPT_EVERY)
        }
    }
}

/// The held endpoints that are to be let go now.
#[must_use]
pub fn due(state: &RoutingState, now: Timestamp) -> BTreeSet<InstanceId> {
    let mut due: BTreeSet<InstanceId> =
        state.held().filter(|id| released(state, id, now).is_some()).cloned().collect();
    let services: BTreeSet<_> = state.held().map(|id| &id.service).collect();
    due.extend(services.into_iter().flat_map(|service| guard::overridden(state, service, now)));
    due
}

/// What is to happen to a held endpoint now; nothing if it is not held, or not yet to be let go.
#[must_use]
pub fn reconsider(state: &RoutingState, id: &InstanceId, now: Timestamp) -> Option<HealthEvent> {
    released(state, id, now).map(Into::into).or_else(|| overridden(state, id, now).map(Into::into))
}

fn released(state: &RoutingState, id: &InstanceId, now: Timestamp) -> Option<DampingReleased> {
    let settings = &state.mesh().state.damping;
    let damping = state.damping(id).filter(|damping| damping.held.is_some())?;
    let cause = if settings.enabled {
        damping.release_at(settings).filter(|at| *at <= now)?;
        ReleaseCause::Calm
    } else {
        ReleaseCause::Off
    };
    Some(DampingReleased { cause, penalty: damping.penalty_at(now, settings).points() })
}

fn overridden(state: &RoutingState, id: &InstanceId, now: Timestamp) -> Option<DampingOverridden> {
    let damping = state.damping(id).filter(|damping| damping.held.is_some())?;
    if !guard::overridden(state, &id.service, now).contains(id) {
        return None;
    }
    let guard::Standing { usable, of, held } = guard::standing(state, &id.service);
    let penalty = damping.penalty_at(now, &state.mesh().state.damping).points();
    Some(DampingOverridden { penalty, usable, of, held })
}
