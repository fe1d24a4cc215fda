//! How a change spreads: when each interested sidecar ran it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::member::Member;

/// What every sidecar runs, and the changes that are spreading.
#[derive(Debug)]
pub(crate) struct Tracker {
    /// Who is interested.
    interested: Vec<bool>,
    /// The log's position of what each sidecar runs.
    applied: Vec<AtomicU64>,
    spreading: Mutex<Vec<Arc<Spreading>>>,
}

/// A change that is spreading.
#[derive(Debug)]
pub(crate) struct Spreading {
    position: u64,
    began: Instant,
    acknowledged: Instant,
    of: usize,
    /// When each sidecar ran it, in the order in which they did.
    arrived: Mutex<Vec<Duration>>,
    all: Notify,
}

/// How a change spread.
#[derive(Clone, Debug)]
pub struct Convergence {
    /// From asking for the change to its acknowledgement.
    pub append: Duration,
    /// From the acknowledgement to each interested sidecar's running it, ascending.
    pub applied: Vec<Duration>,
}

/// Percentiles of many durations, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Spread {
    /// The median.
    pub p50_ms: f64,
    /// The 99th percentile.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Spread {
    /// Of these; zeros if there are none.
    #[must_use]
    pub fn of(durations: impl IntoIterator<Item = Duration>) -> Self {
        let mut durations: Vec<Duration> = durations.into_iter().collect();
        durations.sort_unstable();
        // The nearest rank.
        let at = |percent: usize| {
            let rank = (durations.len() * percent).div_ceil(100).max(1);
            durations.get(rank - 1).map_or(0.0, |duration| duration.as_secs_f64() * 1_000.0)
        };
        Self { p50_ms: at(50), p99_ms: at(99), max_ms: at(100) }
    }
}

impl Tracker {
    pub(crate) fn new(members: &[Arc<Member>]) -> Self {
        Self {
            interested: members.iter().map(|member| member.interested).collect(),
            applied: members.iter().map(|_| AtomicU64::new(0)).collect(),
            spreading: Mutex::default(),
        }
    }

    /// A sidecar runs something newer.
    pub(crate) fn applied(&self, member: &Member, position: u64) {
        let spreading = self.spreading.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.applied[member.index].swap(position, Ordering::Relaxed);
        if !member.interested {
            return;
        }
        for change in spreading.iter() {
            if before < change.position && change.position <= position {
                change.arrive(change.acknowledged.elapsed());
            }
        }
    }

    /// A change has been acknowledged. Who runs it already did so before.
    pub(crate) fn open(&self, position: u64, began: Instant) -> Arc<Spreading> {
        let mut spreading = self.spreading.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.applied.iter().zip(&self.interested).filter(|(_, interested)| **interested);
        let change = Arc::new(Spreading {
            position,
            began,
            acknowledged: Instant::now(),
            of: all.clone().count(),
            arrived: Mutex::default(),
            all: Notify::new(),
        });
        for (applied, _) in all {
            if applied.load(Ordering::Relaxed) >= position {
                change.arrive(Duration::ZERO);
            }
        }
        spreading.retain(|change| !change.is_done());
        spreading.push(Arc::clone(&change));
        change
    }

    /// It turned out that there is nothing to spread.
    pub(crate) fn forget(&self, change: &Arc<Spreading>) {
        let mut spreading = self.spreading.lock().unwrap_or_else(PoisonError::into_inner);
        spreading.retain(|other| !Arc::ptr_eq(other, change));
    }
}

impl Spreading {
    fn arrive(&self, after: Duration) {
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        arrived.push(after);
        if arrived.len() == self.of {
            self.all.notify_one();
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(crate) const fn of(&self) -> usize {
        self.of
    }

    fn is_done(&self) -> bool {
        self.count() >= self.of
    }

    pub(crate) async fn done(&self) {
        while !self.is_done() {
            self.all.notified().await;
        }
    }

    pub(crate) fn convergence(&self) -> Convergence {
        let mut applied = self.arrived.lock().unwrap_or_else(PoisonError::into_inner).clone();
        applied.sort_unstable();
        Convergence { append: self.acknowledged.duration_since(self.began), applied }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let spread = Spread::of((1..=200).rev().map(Duration::from_millis));
        assert_eq!(spread, Spread { p50_ms: 100.0, p99_ms: 198.0, max_ms: 200.0 });
        assert_eq!(Spread::of([]), Spread::default());
        assert_eq!(Spread::of([Duration::from_millis(7)]).p99_ms, 7.0);
    }
}
