//! A snapshot with what the data path counts beside it: live connections of each endpoint, whose turn it is, who is ejected, and the
//! tables of services that are balanced by source. Made once for each snapshot; counts of services and endpoints that stay are
//! carried over, and a service that did not change costs nothing.

mod counts;

use crate::balance::maglev::{self, Table};
use crate::balance::{self, Candidates};
use crate::clock;
use crate::metrics;
use counts::{EndpointCount, Full, Limit, ServiceCount};
pub(crate) use counts::{EndpointView, Load, Way};
use rand::Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use weft_model::traffic::{Balance, TrafficPolicy};
use weft_model::{InstanceId, Name, ServiceName};
use weft_routing::Snapshot;
use weft_routing::shard::{Endpoint, EndpointsShard};

/// How often a choice is made anew because another thread took what it was about to take: its limit's last place, or the
/// trial of an endpoint. Each time somebody else got on, so more are not needed but in a storm.
const CHOICES_MAX: usize = 8;

/// What connections are routed by.
#[derive(Debug)]
pub(crate) struct Routes {
    pub(crate) snapshot: Arc<Snapshot>,
    services: BTreeMap<ServiceName, Arc<Counts>>,
}

#[derive(Debug)]
struct Counts {
    service: Arc<ServiceCount>,
    /// In the order of the shard's endpoints.
    endpoints: Vec<Arc<EndpointCount>>,
    /// Which of them take connections.
    open: Vec<usize>,
    /// Of those, for [`Balance::Maglev`].
    table: Option<Table>,
}

/// An endpoint that was chosen, counted as one more connection until its load is dropped.
#[derive(Debug)]
pub(crate) struct Chosen<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) load: Load,
    pub(crate) way: Way,
}

/// Why no endpoint was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unchosen {
    /// Every one was tried, or there is none.
    NoneLeft,
    /// A circuit limit is reached.
    Full(Full),
}

impl Routes {
    /// Routes of `own`'s sidecar for a snapshot that follows `previous`.
    pub(crate) fn new(snapshot: &Arc<Snapshot>, previous: Option<&Self>, own: &InstanceId) -> Self {
        let now = clock::uptime_ms();
        let services = snapshot.endpoints.iter().map(|(service, shard)| {
            let known = previous.and_then(|previous| {
                Some((&**previous.snapshot.endpoints.get(service)?, previous.services.get(service)?))
            });
            if let Some((former, counts)) = known
                && std::ptr::eq(former, &raw const **shard)
            {
                // Nothing is counted anew for a service that did not change, however many there are.
                return (service.clone(), Arc::clone(counts));
            }
            let known = known.map(|(shard, counts)| (shard, &**counts));
            (service.clone(), Arc::new(Counts::new(shard, known, own, now)))
        });
        Self { services: services.collect(), snapshot: Arc::clone(snapshot) }
    }

    /// Says which services are in panic that were not before, and which are not any more.
    pub(crate) fn tell_panic(&self, previous: Option<&Self>) {
        let in_panic = |routes: &Self| -> BTreeSet<ServiceName> {
            let endpoints = routes.snapshot.endpoints.iter();
            endpoints.filter(|(_, shard)| shard.panic).map(|(service, _)| service.clone()).collect()
        };
        let (now, before) = (in_panic(self), previous.map(in_panic).unwrap_or_default());
        metrics::services_in_panic(now.len());
        for service in now.difference(&before) {
            let eligible = self.snapshot.endpoints.get(service).map_or(0, |shard| shard.eligible().count());
            tracing::warn!(%service, eligible, "PANIC: too few endpoints are healthy; connections go to unhealthy ones as well");
        }
        for service in before.difference(&now) {
            tracing::info!(%service, "panic is over: connections go to healthy endpoints only");
        }
    }

    /// Chooses among the endpoints that a service takes connections at, that were not tried yet and that have room; those that are
    /// ejected only if no others are left.
    pub(crate) fn choose(
        &self,
        service: &ServiceName,
        policy: &TrafficPolicy,
        source: Source<'_>,
        tried: &[Name],
        rng: &mut impl Rng,
    ) -> Result<Chosen<'_>, Unchosen> {
        let shard = self.snapshot.endpoints.get(service).ok_or(Unchosen::NoneLeft)?;
        let counts = self.services.get(service).ok_or(Unchosen::NoneLeft)?;
        if tried.is_empty() {
            counts.service.begun();
        }
        let now = clock::uptime_ms();
        let mut view =
            View { shard, counts, policy, tried, last_resort: !policy.outlier_detection.enabled, now };
        let source = if policy.balance == Balance::Maglev { source.key() } else { 0 };
        let turn = counts.service.turn.fetch_add(1, Ordering::Relaxed);
        let mut full = None;
        for choice in 0..CHOICES_MAX {
            // Whoever loses so many races for a trial does without one.
            view.last_resort |= choice >= CHOICES_MAX / 2;
            let picked = balance::pick(policy.balance, &view, turn, counts.table.as_ref(), source, rng);
            let Some(picked) = picked else {
                if view.last_resort {
                    break;
                }
                view.last_resort = true;
                continue;
            };
            let index = counts.open[picked];
            let added = Load::add(
                &counts.endpoints[index],
                &counts.service,
                &policy.limits,
                policy.outlier_detection,
                now,
            );
            match added.map(|mut load| (load.begin(view.last_resort), load)) {
                Ok((Some(way), load)) => return Ok(Chosen { endpoint: &shard.endpoints[index], load, way }),
                Ok((None, _)) => {}
                Err(Limit::Service(limit)) => return Err(Unchosen::Full(limit)),
                Err(Limit::Endpoint(limit)) => full = Some(limit),
            }
        }
        // Whoever was not tried has no room, if there is anybody.
        let untried = || (0..view.count()).filter(|index| !view.was_tried(*index));
        let full = full.or_else(|| untried().find_map(|index| view.endpoint(index).full(&policy.limits)));
        Err(full.map_or(Unchosen::NoneLeft, Unchosen::Full))
    }

    /// Whether a service has an endpoint that takes connections besides these.
    pub(crate) fn has_untried(&self, service: &ServiceName, tried: &[Name]) -> bool {
        let untried = |shard: &Arc<EndpointsShard>| {
            let mut endpoints = shard.endpoints.iter();
            endpoints.any(|endpoint| shard.takes(endpoint) && !tried.contains(&endpoint.instance))
        };
        self.snapshot.endpoints.get(service).is_some_and(untried)
    }

    /// How many endpoints are ejected or returning.
    pub(crate) fn ejected(&self) -> usize {
        let endpoints = self.services.values().flat_map(|counts| &counts.endpoints);
        endpoints.filter(|endpoint| endpoint.is_ejected()).count()
    }

    /// What is counted of a service's endpoints, in the shard's order.
    pub(crate) fn views(&self, service: &ServiceName) -> impl Iterator<Item = EndpointView> {
        let now = clock::uptime_ms();
        let endpoints = self.services.get(service).into_iter().flat_map(|counts| &counts.endpoints);
        endpoints.map(move |endpoint| endpoint.view(now))
    }
}

/// Whose connection it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    pub(crate) address: IpAddr,
    pub(crate) own: &'a InstanceId,
}

impl Source<'_> {
    fn key(self) -> u64 {
        maglev::source(self.address, &self.own.to_string())
    }
}

impl Counts {
    fn new(
        shard: &EndpointsShard,
        known: Option<(&EndpointsShard, &Self)>,
        own: &InstanceId,
        now: u64,
    ) -> Self {
        let mut open = Vec::new();
        let endpoints = shard.endpoints.iter().enumerate().map(|(index, endpoint)| {
            let former = known.and_then(|(former, counts)| {
                let same = |old: &Endpoint| old.instance.cmp(&endpoint.instance);
                let index = former.endpoints.binary_search_by(same).ok()?;
                Some((&former.endpoints[index], counts.endpoints.get(index)?))
            });
            // What runs at another address is another process, and nothing is known of it.
            let carried = former.filter(|(former, _)| former.address == endpoint.address);
            let count = carried.map(|(_, count)| Arc::clone(count)).unwrap_or_default();
            // All of a service that was not known before are as warm as each other.
            let was_eligible = carried.is_some_and(|(former, _)| former.eligible());
            if known.is_some() && endpoint.eligible() && !was_eligible {
                count.became_eligible(now);
            }
            if shard.takes(endpoint) {
                open.push(index);
            }
            count
        });
        let endpoints: Vec<_> = endpoints.collect();
        let service = known.map(|(_, counts)| Arc::clone(&counts.service)).unwrap_or_default();
        *service.members.lock().unwrap_or_else(PoisonError::into_inner) =
            open.iter().map(|index| Arc::clone(&endpoints[*index])).collect();
        let (policy, _) = shard.traffic_for(&own.service);
        let names = open.iter().map(|index| shard.endpoints[*index].instance.as_str());
        let table = (policy.balance == Balance::Maglev).then(|| Table::build(names));
        Self { service, endpoints, open, table }
    }
}

/// The endpoints of a service as they are chosen among.
struct View<'a> {
    shard: &'a EndpointsShard,
    counts: &'a Counts,
    policy: &'a TrafficPolicy,
    tried: &'a [Name],
    /// Those that are ejected fit too.
    last_resort: bool,
    now: u64,
}

impl View<'_> {
    fn endpoint(&self, index: usize) -> &EndpointCount {
        &self.counts.endpoints[self.counts.open[index]]
    }

    fn was_tried(&self, index: usize) -> bool {
        let endpoint = &self.shard.endpoints[self.counts.open[index]];
        self.tried.contains(&endpoint.instance)
    }
}

impl Candidates for View<'_> {
    fn count(&self) -> usize {
        self.counts.open.len()
    }

    fn fits(&self, index: usize) -> bool {
        let endpoint = self.endpoint(index);
        (self.last_resort || endpoint.is_sound(self.now))
            && endpoint.full(&self.policy.limits).is_none()
            && !self.was_tried(index)
    }

    fn live(&self, index: usize) -> u64 {
        self.endpoint(index).live()
    }

    fn warmth(&self, index: usize) -> u64 {
        self.endpoint(index).warmth(self.policy.slow_start_ms, self.now)
    }

    fn connect_us(&self, index: usize) -> Option<u64> {
        self.endpoint(index).connect_us(self.now)
    }
}

#[cfg(test)]
mod tests;
