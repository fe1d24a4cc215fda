//! How long and how much is measured, and which figures are wanted.

use std::time::Duration;

use weft_bench::run;

use crate::closed_loop::Times;

/// Figures of the report, each with the part of the run that it comes from.
const KEYS: &[(&str, Part)] = &[
    ("appends_per_s", Part::Appends),
    ("baseline_appends_per_s", Part::Appends),
    ("baseline_many_categories_appends_per_s", Part::Appends),
    ("baseline_ratio_256", Part::Appends),
    ("batch100_events_per_s", Part::Batches),
    ("batch100_one_scope_events_per_s", Part::Batches),
    ("p50_ms_at_5000", Part::Latency),
    ("p99_ms_at_5000", Part::Latency),
    ("conflict_loss", Part::Conflicts),
    ("slowdown", Part::History),
    ("replay_rows_events_per_s", Part::History),
    ("replay_sealed_events_per_s", Part::History),
    ("verify_events_per_s", Part::History),
    ("cold_start_1m_s", Part::History),
    ("bytes_per_event", Part::History),
];

/// Parts of a run: each has its own databases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Appends,
    Batches,
    Latency,
    Conflicts,
    /// A long log: what it costs to have one.
    History,
}

/// How much is done.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Word for it in the report.
    pub(crate) scale: &'static str,
    /// Rounds of each measurement, taking turns; the median is reported.
    pub(crate) rounds: usize,
    /// Of a closed loop.
    pub(crate) times: Times,
    /// Callers of the closed loops.
    pub(crate) callers: [usize; 3],
    /// Requests per second of the open loop.
    pub(crate) rate: u32,
    /// Of the open loop.
    pub(crate) latency_times: Times,
    /// Events of the long log. Above a whole range of positions, so that one can be sealed.
    pub(crate) history: u64,
    /// Positions in a range of it, if not the log's own choice.
    pub(crate) range: Option<u32>,
    /// Events of the log that is longer still.
    pub(crate) long_history: Option<u64>,
    /// What the load is made from.
    pub(crate) seed: u64,
    /// Figures that were asked for; all if none.
    only: Vec<String>,
}

impl Plan {
    pub(crate) fn new(quick: bool, full: bool, only: Vec<String>, seed: u64) -> anyhow::Result<Self> {
        let known: Vec<&str> = KEYS.iter().map(|(key, _)| *key).collect();
        run::check_known(&only, &known)?;
        let seconds = |warm_up: f64, measure: f64| Times {
            warm_up: Duration::from_secs_f64(warm_up),
            measure: Duration::from_secs_f64(measure),
        };
        let callers = [1, 16, 256];
        Ok(if quick {
            Self {
                scale: "quick",
                rounds: 1,
                times: seconds(0.1, 0.2),
                callers,
                rate: 5_000,
                latency_times: seconds(0.1, 0.3),
                history: 22_000,
                range: Some(20_000),
                long_history: full.then_some(44_000),
                seed,
                only,
            }
        } else {
            Self {
                scale: if full { "full" } else { "default" },
                rounds: 3,
                times: seconds(1.0, 5.0),
                callers,
                rate: 5_000,
                latency_times: seconds(1.0, 10.0),
                history: 1_050_000,
                range: None,
                long_history: full.then_some(10_000_000),
                seed,
                only,
            }
        })
    }

    /// The figures that are to be measured.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'static str> {
        KEYS.iter().map(|(key, _)| *key).filter(|key| self.wants(key))
    }

    /// Whether a figure is to be measured.
    pub(crate) fn wants(&self, key: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|wanted| wanted == key)
    }

    /// Whether a part of the run is to be done.
    pub(crate) fn needs(&self, part: Part) -> bool {
        KEYS.iter().any(|(key, of)| *of == part && self.wants(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_decides_what_is_done() {
        let all = Plan::new(true, false, Vec::new(), 1).unwrap();
        assert!(all.wants("slowdown") && all.needs(Part::Appends) && all.needs(Part::History));
        let some = Plan::new(false, true, vec!["conflict_loss".into()], 1).unwrap();
        assert!(some.needs(Part::Conflicts) && !some.needs(Part::History) && !some.wants("slowdown"));
        assert!(Plan::new(false, false, vec!["speed".into()], 1).is_err());
    }
}
