//! A snapshot with what the data path counts beside it: live connections of each endpoint, and whose turn it is. Made
//! once for each snapshot; counts of services and endpoints that stay are carried over.

use crate::balance;
use crate::metrics;
use rand::Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use weft_model::traffic::Balance;
use weft_model::{Name, ServiceName, Timestamp};
use weft_routing::Snapshot;
use weft_routing::shard::Endpoint;

/// How long an endpoint that failed is passed over while others are left, in milliseconds. A dead one has no live
/// connections, so it would look like the best; its own health report takes about this long to say that it is not.
const FAILED_MS: u64 = 5_000;

/// What connections are routed by.
#[derive(Debug)]
pub(crate) struct Routes {
    pub(crate) snapshot: Arc<Snapshot>,
    services: BTreeMap<ServiceName, Arc<Counts>>,
}

#[derive(Debug, Default)]
struct Counts {
    turn: Arc<AtomicUsize>,
    /// In the order of the shard's endpoints.
    endpoints: Vec<Arc<Count>>,
}

/// What is counted of an endpoint.
#[derive(Debug, Default)]
struct Count {
    live: AtomicUsize,
    /// When an attempt failed last, in milliseconds since 1970; 0 if none did.
    failed_at: AtomicI64,
}

/// An endpoint that was chosen, counted as one more connection until it is dropped.
#[derive(Debug)]
pub(crate) struct Chosen<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) load: Load,
}

/// One connection in an endpoint's count.
#[derive(Debug)]
pub(crate) struct Load(Arc<Count>);

impl Load {
    /// The attempt failed, and another endpoint may do better: others come first for a while.
    pub(crate) fn failed(&self, now: Timestamp) {
        self.0.failed_at.store(now.0, Ordering::Relaxed);
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.live.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Routes {
    /// Routes for a snapshot that follows `previous`.
    pub(crate) fn new(snapshot: &Arc<Snapshot>, previous: Option<&Self>) -> Self {
        let services = snapshot.endpoints.iter().map(|(service, shard)| {
            let known = previous.and_then(|previous| {
                Some((previous.snapshot.endpoints.get(service)?, previous.services.get(service)?))
            });
            if let Some((former, counts)) = known
                && Arc::ptr_eq(former, shard)
            {
                // Nothing is counted anew for a service that did not change, however many there are.
                return (service.clone(), Arc::clone(counts));
            }
            let endpoints = shard.endpoints.iter().map(|endpoint| {
                let carried = known.and_then(|(shard, counts)| {
                    let index =
                        shard.endpoints.binary_search_by_key(&&endpoint.instance, |old| &old.instance);
                    counts.endpoints.get(index.ok()?).cloned()
                });
                carried.unwrap_or_default()
            });
            let turn = known.map(|(_, counts)| Arc::clone(&counts.turn)).unwrap_or_default();
            (service.clone(), Arc::new(Counts { turn, endpoints: endpoints.collect() }))
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

    /// Chooses among the endpoints that a service takes connections at and that were not tried yet; those that failed lately only if no
    /// others are left.
    pub(crate) fn choose(
        &self,
        service: &ServiceName,
        balance: Balance,
        tried: &[Name],
        now: Timestamp,
        rng: &mut impl Rng,
    ) -> Option<Chosen<'_>> {
        let shard = self.snapshot.endpoints.get(service)?;
        let counts = self.services.get(service)?;
        let mut candidates: Vec<_> = shard
            .endpoints
            .iter()
            .zip(&counts.endpoints)
            .filter(|(endpoint, _)| shard.takes(endpoint) && !tried.contains(&endpoint.instance))
            .collect();
        let sound =
            |count: &Count| (now.0 - count.failed_at.load(Ordering::Relaxed)).unsigned_abs() >= FAILED_MS;
        if candidates.iter().any(|(_, count)| sound(count)) {
            candidates.retain(|(_, count)| sound(count));
        }
        let live: Vec<_> = candidates.iter().map(|(_, count)| count.live.load(Ordering::Relaxed)).collect();
        let turn = counts.turn.fetch_add(1, Ordering::Relaxed);
        let (endpoint, count) = candidates[balance::pick(balance, &live, turn, rng)?];
        count.live.fetch_add(1, Ordering::Relaxed);
        Some(Chosen { endpoint, load: Load(Arc::clone(count)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_routing::fixture;

    #[test]
    fn whose_turn_it_is_outlives_a_snapshot() {
        let instance = "default/web/web-1".parse().unwrap();
        let first = Routes::new(&Arc::new(fixture::snapshot(&instance)), None);
        first.services[&instance.service].turn.store(5, Ordering::Relaxed);
        let second = Routes::new(&Arc::new(fixture::changed_snapshot(&instance)), Some(&first));
        assert_eq!(second.services[&instance.service].turn.load(Ordering::Relaxed), 5);
    }
}
