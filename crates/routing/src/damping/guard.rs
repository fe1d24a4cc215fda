//! Capacity comes before damping. Of a service's endpoints that are ready and were observed, at most 30 % (one at least) are
//! held, and none if fewer than half would take connections then. Where that changes later, because others went down or
//! left, held ones are let go: those with the fewest points first, by name among equals.
//!
//! Unobserved endpoints do not count: nobody can be sent there, so they are no capacity, and a service that is just being
//! rolled out is not in distress. Draining ones do not count either. A service's only endpoint is never held: that would turn
//! a flaky service into none.
//!
//! If fewer than half take connections all the same, the service is in **panic** ([`panics`]): see
//! [`EndpointsShard::panic`](crate::EndpointsShard).

use crate::state::{Instance, RoutingState};
use weft_model::health::Health;
use weft_model::membership::MembershipState;
use weft_model::{InstanceId, ServiceName, Timestamp};

/// The share of a service's endpoints that may be held, in percent.
const HELD_PERCENT_MAX: u32 = 30;

/// How a service stands. Only ready endpoints that were observed are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Endpoints that take new connections.
    pub usable: u32,
    /// Of so many.
    pub of: u32,
    /// Held ones among them.
    pub held: u32,
}

impl Standing {
    /// How many may be held.
    const fn held_max(self) -> u32 {
        let share = self.of / 100 * HELD_PERCENT_MAX + self.of % 100 * HELD_PERCENT_MAX / 100;
        if share > 1 { share } else { 1 }
    }

    /// How many more it takes until at least half are usable.
    const fn lacking(self) -> u32 {
        self.of.div_ceil(2).saturating_sub(self.usable)
    }
}

/// How a service stands.
#[must_use]
pub fn standing(state: &RoutingState, service: &ServiceName) -> Standing {
    let mut standing = Standing::default();
    for (_, instance) in state.live_of(service) {
        if counted(instance) {
            standing.of += 1;
            standing.usable += u32::from(instance.seen.health == Health::Healthy);
            standing.held += u32::from(instance.is_held());
        }
    }
    standing
}

/// Whether an endpoint that has just gone down may be held.
pub(crate) fn may_hold(state: &RoutingState, id: &InstanceId) -> bool {
    let Some(instance) = state.instance(id).filter(|instance| counted(instance)) else { return false };
    let standing = standing(state, &id.service);
    let usable = standing.usable - u32::from(instance.seen.health == Health::Healthy);
    let then = Standing { usable, held: standing.held + 1, ..standing };
    then.held <= then.held_max() && then.lacking() == 0
}

/// The held endpoints of a service that it needs, in the order in which they are let go.
pub(crate) fn overridden(state: &RoutingState, service: &ServiceName, now: Timestamp) -> Vec<InstanceId> {
    let standing = standing(state, service);
    let needed = standing.lacking().max(standing.held.saturating_sub(standing.held_max()));
    if needed == 0 {
        return Vec::new();
    }
    let settings = &state.mesh().state.damping;
    let mut held: Vec<_> = state
        .live_of(service)
        // Letting one go that is down would help nobody.
        .filter(|(_, instance)| {
            counted(instance) && instance.is_held() && instance.reported() == Health::Healthy
        })
        .filter_map(|(id, instance)| Some((instance.damping.as_ref()?.penalty_at(now, settings), id)))
        .collect();
    held.sort();
    held.into_iter().take(needed as usize).map(|(_, id)| id).collect()
}

/// Whether so few endpoints take connections that health is to be disregarded: fewer than half of at least two.
#[must_use]
pub const fn panics(usable: usize, of: usize) -> bool {
    of >= 2 && usable < of.div_ceil(2)
}

fn counted(instance: &Instance) -> bool {
    matches!(instance.membership.state, MembershipState::Ready(_)) && instance.seen.health != Health::Unknown
}
