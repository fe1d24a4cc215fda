//! A limit on joins that fail. The secret in a token cannot be guessed at any rate; the limit keeps whoever tries from
//! taking the controller's time and filling its log.
//!
//! Each network has a bucket of its own, so that who fails is stopped and nobody else. One for all stands behind it,
//! for somebody with many networks; it is larger, and reached by nothing less.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Failures of one network: a rollout from behind one address whose tokens all expired.
const NETWORK: Limit = Limit { burst: 256.0, per_second: 32.0 };
/// Failures of all together: eight such rollouts. A failed join costs about a millisecond.
const ALL: Limit = Limit { burst: 2_048.0, per_second: 256.0 };
/// Networks that are remembered. More would need more failures in eight seconds, in which a network is forgiven
/// everything, than are let through; should they come all the same, the ones that failed least are forgotten.
const NETWORKS_MAX: usize = 4_096;

#[derive(Clone, Copy, Debug)]
struct Limit {
    /// Failures that may come at once.
    burst: f64,
    /// Failures per second after that.
    per_second: f64,
}

/// Failures that are still allowed, as of a moment.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn full(limit: Limit, now: Instant) -> Self {
        Self { left: limit.burst, at: now }
    }

    fn left(self, limit: Limit, now: Instant) -> f64 {
        (self.left + now.duration_since(self.at).as_secs_f64() * limit.per_second).min(limit.burst)
    }

    fn take(&mut self, limit: Limit, now: Instant) {
        *self = Self { left: (self.left(limit, now) - 1.0).max(0.0), at: now };
    }

    /// How long until another failure is allowed.
    fn wait(self, limit: Limit, now: Instant) -> Duration {
        Duration::from_secs_f64((1.0 - self.left(limit, now)).max(0.0) / limit.per_second)
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct FailedJoins {
    buckets: Mutex<Buckets>,
}

#[derive(Debug)]
struct Buckets {
    all: Bucket,
    /// Networks that failed. Who is not here has its whole burst.
    networks: BTreeMap<IpAddr, Bucket>,
}

impl FailedJoins {
    pub(crate) fn new() -> Self {
        let all = Bucket::full(ALL, Instant::now());
        Self { buckets: Mutex::new(Buckets { all, networks: BTreeMap::new() }) }
    }

    /// Whether this network may try another join; if not, when.
    pub(crate) fn admit(&self, network: IpAddr) -> Result<(), Duration> {
        let (buckets, now) = (self.lock(), Instant::now());
        let own = buckets.networks.get(&network).map_or(Duration::ZERO, |own| own.wait(NETWORK, now));
        let wait = own.max(buckets.all.wait(ALL, now));
        if wait.is_zero() { Ok(()) } else { Err(wait) }
    }

    /// A join of this network failed.
    pub(crate) fn count(&self, network: IpAddr) {
        let (mut buckets, now) = (self.lock(), Instant::now());
        buckets.all.take(ALL, now);
        if !buckets.networks.contains_key(&network) {
            buckets.make_room(now);
        }
        buckets.networks.entry(network).or_insert_with(|| Bucket::full(NETWORK, now)).take(NETWORK, now);
    }

    fn lock(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buckets {
    fn make_room(&mut self, now: Instant) {
        if self.networks.len() < NETWORKS_MAX {
            return;
        }
        self.networks.retain(|_, bucket| bucket.left(NETWORK, now) < NETWORK.burst);
        if self.networks.len() >= NETWORKS_MAX {
            let left = |bucket: &Bucket| bucket.left(NETWORK, now);
            let mildest = self.networks.iter().max_by(|a, b| left(a.1).total_cmp(&left(b.1)));
            let mildest = mildest.map(|(network, _)| *network);
            mildest.and_then(|network| self.networks.remove(&network));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(n: u32) -> IpAddr {
        std::net::Ipv4Addr::from_bits(n).into()
    }

    fn fail_until_refused(joins: &FailedJoins, network: IpAddr) -> usize {
        let mut admitted = 0;
        while joins.admit(network).is_ok() {
            joins.count(network);
            admitted += 1;
        }
        admitted
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_limited_and_forgiven_and_are_nobody_elses() {
        let (joins, guilty, other) = (FailedJoins::new(), network(1), network(2));
        assert_eq!(fail_until_refused(&joins, guilty), 256);
        assert!(joins.admit(other).is_ok());
        let wait = joins.admit(guilty).unwrap_err();
        tokio::time::advance(wait + Duration::from_millis(1)).await;
        assert!(joins.admit(guilty).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn many_networks_together_are_limited_and_no_more_than_so_many_remembered() {
        let joins = FailedJoins::new();
        let admitted: usize = (0..100).map(|n| fail_until_refused(&joins, network(n))).sum();
        assert_eq!(admitted, 2_048);

        for n in 0..10_000 {
            joins.count(network(n));
        }
        assert_eq!(joins.lock().networks.len(), NETWORKS_MAX);
        assert!(joins.admit(network(0)).is_err(), "who failed most is remembered");
    }
}
