//! What is told at the end: a table for people, a line of JSON for machines.

use comfy_table::Table;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

use crate::journal::Verdict;
use crate::phase::Findings;

/// All phases of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    seed: u64,
    long: bool,
    sound: bool,
    #[serde(flatten)]
    verdict: Verdict,
    acknowledged: u64,
    repeats: u64,
    events: u64,
    seconds: u64,
    phases: BTreeMap<String, Findings>,
    #[serde(skip)]
    rows: Vec<[String; 8]>,
}

impl Report {
    pub(crate) fn new(seed: u64, long: bool) -> Self {
        Self {
            seed,
            long,
            sound: true,
            verdict: Verdict::default(),
            acknowledged: 0,
            repeats: 0,
            events: 0,
            seconds: 0,
            phases: BTreeMap::new(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, phase: &str, findings: Findings, took: Duration) {
        let done: Vec<String> = findings.done.iter().map(|(what, count)| format!("{count} {what}")).collect();
        let times = findings.times.iter().map(|(what, times)| format!("{what}: {times}"));
        let done: Vec<String> = done.into_iter().chain(times).collect();
        let verdict = &findings.verdict;
        self.rows.push([
            phase.to_owned(),
            done.join("\n"),
            findings.events.to_string(),
            findings.acknowledged.to_string(),
            findings.repeats.to_string(),
            format!("{}/{}/{}/{}", verdict.lost, verdict.doubled, verdict.gaps, verdict.skipped),
            (verdict.wrong_outcomes + findings.complaints.len() as u64).to_string(),
            format!("{} s", took.as_secs()),
        ]);
        self.sound &= findings.is_sound();
        self.verdict += findings.verdict.clone();
        self.acknowledged += findings.acknowledged;
        self.repeats += findings.repeats;
        self.events += findings.events;
        self.phases.insert(phase.to_owned(), findings);
    }

    pub(crate) const fn is_sound(&self) -> bool {
        self.sound
    }

    pub(crate) fn print(&mut self, took: Duration) -> anyhow::Result<()> {
        self.seconds = took.as_secs();
        let mut table = Table::new();
        table.set_header([
            "phase",
            "what was done",
            "events",
            "acknowledged",
            "repeats",
            "lost/doubled/gaps/skipped",
            "wrong",
            "took",
        ]);
        table.add_rows(self.rows.iter());
        println!("{table}");
        println!("{}", serde_json::to_string(self)?);
        Ok(())
    }
}
