//! What is measured, and how large.

use weft_bench::run;

/// The figures, and how much is done for each.
#[derive(Debug)]
pub(crate) struct Plan {
    quick: bool,
    only: Vec<String>,
}

/// All figures that can be asked for.
const KEYS: &[&str] = &[
    "convergence_p50_ms",
    "convergence_p99_ms",
    "bytes_per_endpoint_change",
    "shards_rebuilt_per_change",
    "cpu_per_change_ratio_1000_vs_10_services",
    "reconnect_10000_s",
    "memory_kib_per_sidecar",
    "slow_readers_p99_ratio",
    "slow_readers_memory_kib_each",
    "leader_kill_to_publish_p99_s",
    "flapper",
    "unused_services_bytes",
];

impl Plan {
    pub(crate) fn new(quick: bool, only: Vec<String>) -> anyhow::Result<Self> {
        run::check_known(&only, KEYS)?;
        Ok(Self { quick, only })
    }

    pub(crate) const fn scale(&self) -> &'static str {
        if self.quick { "quick" } else { "whole" }
    }

    /// The figures that are to be measured.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'static str> {
        KEYS.iter().copied().filter(|key| self.wants(&[key]))
    }

    /// Whether any of these figures is asked for.
    pub(crate) fn wants(&self, keys: &[&str]) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| keys.contains(&only.as_str()))
    }

    /// A number, or less of it.
    pub(crate) const fn of(&self, whole: usize, quick: usize) -> usize {
        if self.quick { quick } else { whole }
    }
}
