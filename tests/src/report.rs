//! What the smoke run prints: one line per step on standard output, and the sum.
//!
//! ```text
//! ok   start to ready                          5127 ms  12 processes, …
//! FAIL sql through two sidecars                  31 ms  psql ended with 2: …; logs are in /tmp/weft-smoke-x/.weft/logs
//! smoke: 1/2 ok
//! ```

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, timeout};

/// Longest that one step may take. Steps wait on conditions with bounds of their own; this one only keeps a step that
/// hangs from hanging the run.
const STEP_LIMIT: Duration = Duration::from_secs(120);
/// Room for the names of steps.
const NAME_WIDTH: usize = 38;

/// What was tried so far.
#[derive(Debug)]
pub struct Report {
    logs: PathBuf,
    steps: u32,
    ok: u32,
}

impl Report {
    /// An empty one; a failure refers to `logs`.
    pub fn new(logs: PathBuf) -> Self {
        Self { logs, steps: 0, ok: 0 }
    }

    /// Tries one step, and returns whether it succeeded. What a step returns is what was seen.
    pub fn step(
        &mut self,
        name: &str,
        trying: impl Future<Output = anyhow::Result<String>>,
    ) -> impl Future<Output = bool> {
        // Boxed first: steps are large, and a run holds a future of each.
        let trying = timeout(STEP_LIMIT, Box::pin(trying));
        async move {
            let start = Instant::now();
            let outcome = trying.await.unwrap_or_else(|_| {
                Err(anyhow::anyhow!("given up after {} s without an answer", STEP_LIMIT.as_secs()))
            });
            self.add(name, start.elapsed(), &outcome)
        }
    }

    /// Counts a step that could not be tried as failed.
    pub fn cannot(&mut self, name: &str, why: &str) {
        self.add(name, Duration::ZERO, &Err(anyhow::anyhow!("not tried: {why}")));
    }

    fn add(&mut self, name: &str, took: Duration, outcome: &anyhow::Result<String>) -> bool {
        self.steps += 1;
        self.ok += u32::from(outcome.is_ok());
        println!("{}", line(name, took, outcome, &self.logs.display().to_string()));
        outcome.is_ok()
    }

    /// Whether every step succeeded.
    pub fn all_ok(&self) -> bool {
        self.steps > 0 && self.ok == self.steps
    }

    /// `smoke: 17/17 ok`.
    pub fn sum(&self) -> String {
        format!("smoke: {}/{} ok", self.ok, self.steps)
    }
}

fn line(name: &str, took: Duration, outcome: &anyhow::Result<String>, logs: &str) -> String {
    let (word, seen) = match outcome {
        Ok(seen) => ("ok  ", seen.clone()),
        Err(why) => ("FAIL", format!("{why:#}; logs are in {logs}")),
    };
    // One step is one line; what a program said on several is told on several, below it.
    let seen = seen.trim().replace('\n', "\n       ");
    format!("{word} {name:NAME_WIDTH$} {:>6} ms  {seen}", took.as_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_failed_and_a_hanging_step_count_and_the_others_are_still_tried() {
        let mut report = Report::new("/logs".into());
        assert!(!report.all_ok());
        assert!(report.step("one", async { Ok("seen".into()) }).await);
        assert!(report.all_ok());
        assert!(!report.step("two", async { Err(anyhow::anyhow!("no")) }).await);
        assert!(!report.step("three", std::future::pending()).await);
        assert!(report.step("four", async { Ok("seen".into()) }).await);
        report.cannot("five", "there is no mesh");
        assert_eq!(report.sum(), "smoke: 2/5 ok");
        assert!(!report.all_ok());
    }

    #[test]
    fn a_failure_says_why_and_where_the_logs_are() {
        let outcome = Err(anyhow::anyhow!("two\nlines").context("cause"));
        let line = line("name", Duration::from_millis(12), &outcome, "/logs");
        assert!(line.starts_with("FAIL name "), "{line}");
        assert!(line.ends_with(" 12 ms  cause: two\n       lines; logs are in /logs"), "{line}");
    }
}
