//! How many connects to a service may be tried again. Pure: what was opened and the time go in.
//!
//! Retries help when some endpoints fail and harm when all do, since they are what endpoints in trouble get on top. So a sidecar has
//! a budget for each service: every connection adds a share of a retry, time adds some more, and each retry takes
//! one. What is left over is saved up to a bound. An application's connection whose retry is not in the budget fails as if it
//! had been tried on every endpoint.
//!
//! Invariant: from any moment on, retries ≤ saved + share × connections + rate × time. [`crate::routes`] has one for each service.

use weft_model::traffic::ConnectPolicy;

/// For how much time retries are saved, in milliseconds: a burst of connections as some endpoints die comes at once.
const SAVED_MS: u64 = 10_000;

/// For how many connections their share is saved: what a busy sidecar opens in a second or less.
const SAVED_CONNECTIONS: u64 = 1_000;

/// A retry, in thousandths.
const RETRY: u64 = 1_000;

/// See the module's documentation. A new one has saved for as much time as it can.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    /// In thousandths of a retry.
    saved: u64,
    /// When it was asked last, in milliseconds; none if never.
    asked_at: Option<u64>,
}

impl Budget {
    /// Takes a retry, if there is one. `connections` is how many were begun since it was asked last.
    pub(crate) fn take(&mut self, policy: &ConnectPolicy, connections: u64, now: u64) -> bool {
        let passed = self.asked_at.map_or(SAVED_MS, |then| now.saturating_sub(then).min(SAVED_MS));
        self.asked_at = Some(now);
        // A retry each second is a thousandth each millisecond; one for each hundred connections ten thousandths each.
        let rate = u64::from(policy.budget_min_per_second);
        let share = u64::from(policy.budget_percent) * RETRY / 100;
        let most = SAVED_MS * rate + SAVED_CONNECTIONS * share;
        self.saved = self.saved.min(most) + passed * rate + connections.saturating_mul(share);
        let taken = self.saved >= RETRY;
        if taken {
            self.saved -= RETRY;
        }
        self.saved = self.saved.min(most);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn policy(budget_percent: u8, budget_min_per_second: u32) -> ConnectPolicy {
        ConnectPolicy { budget_percent, budget_min_per_second, ..ConnectPolicy::default() }
    }

    fn taken(budget: &mut Budget, policy: &ConnectPolicy, asked: usize, now: u64) -> usize {
        (0..asked).filter(|_| budget.take(policy, 0, now)).count()
    }

    #[test]
    fn ten_seconds_are_saved_and_then_it_is_the_rate() {
        let policy = policy(0, 5);
        let mut budget = Budget::default();
        assert_eq!(taken(&mut budget, &policy, 100, 7), 50);
        assert_eq!(taken(&mut budget, &policy, 100, 206), 0);
        assert_eq!(taken(&mut budget, &policy, 100, 207), 1);
        assert_eq!(taken(&mut budget, &policy, 100, 1_207), 5);
        assert_eq!(taken(&mut budget, &policy, 100, 9_999_999), 50);
    }

    #[test]
    fn a_fifth_of_the_connections_may_be_tried_again() {
        let policy = policy(20, 0);
        let mut budget = Budget::default();
        assert!(!budget.take(&policy, 4, 1));
        assert!(budget.take(&policy, 1, 1));
        assert_eq!((0..1_000).filter(|_| budget.take(&policy, 1, 2)).count(), 200);
        // A share that nobody used is kept for a thousand connections.
        assert!(budget.take(&policy, 1_000_000, 3));
        assert_eq!(taken(&mut budget, &policy, 1_000, 3), 200);
    }

    #[test]
    fn a_budget_of_nothing_allows_nothing() {
        assert!(!Budget::default().take(&policy(0, 0), u64::MAX, u64::MAX));
    }

    proptest! {
        #[test]
        fn there_are_never_more_than_the_invariant_says(
            asks in prop::collection::vec((0..50_u64, 0..3_000_u64), 1..300), percent in 0..=100_u8, rate in 0..50_u32,
        ) {
            let policy = policy(percent, rate);
            let mut budget = Budget::default();
            let (mut now, mut connections, mut retries, start) = (0, 0, 0, 0);
            for (opened, time) in asks {
                now += time;
                connections += opened;
                retries += u64::from(budget.take(&policy, opened, now));
                let saved = SAVED_MS * u64::from(rate) + SAVED_CONNECTIONS * 10 * u64::from(percent);
                let earned = connections * 10 * u64::from(percent) + (now - start) * u64::from(rate);
                prop_assert!(retries * RETRY <= saved + earned);
            }
        }
    }
}
