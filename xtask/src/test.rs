//! `cargo xtask test`: every test there is, on a real PostgreSQL, with the counts at the end.
//!
//! One private server serves the whole run; each test makes its own database on it. The tests run as many at a time as
//! there are cores; `.config/nextest.toml` says which do not run beside each other. At the end the benches run for some
//! seconds, to see that they do, and the log is tortured for a minute or two.

use std::process::ExitCode;

use anyhow::Context;
use weft_pgserver::{Cluster, Server};

use crate::cargo::{Stream, cargo, has, must, run_seeing};
use crate::{Database, bench, postgres, say, tools, torture};

#[derive(Debug, clap::Args)]
pub(crate) struct Test {
    #[command(flatten)]
    database: Database,
    /// Run only the tests whose names contain this
    filter: Option<String>,
}

impl Test {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        tools::provide()?;
        tools::provide_servers();
        let (own_server, url) = match self.database.given() {
            Some(url) => (None, url.to_owned()),
            None => {
                let server = start_server()?;
                let url = server.url("postgres");
                (Some(server), url)
            }
        };

        // The end-to-end tests run the programs, which building the tests alone does not build.
        must(cargo(["build", "--workspace", "--bins"]).env("WEFT_DATABASE_URL", &url))?;
        let filter = self.filter.as_deref();
        let (tests_passed, tests) = run_tests(&url, filter)?;
        let (doctests_passed, doctests) = run_doctests(&url, filter)?;
        let bench_ran = filter.is_some() || bench::runs(&url)?;
        let unbroken = filter.is_some() || torture::passes()?;
        if let Some(server) = own_server {
            server.stop().context("stopping the private PostgreSQL failed")?;
        }

        // A run of nothing is no success: a filter may be misspelt, a runner may report in a way not understood here.
        anyhow::ensure!(tests.ran() + doctests.ran() > 0, "no test ran{}", misspelt(filter));
        let passed = tests_passed && doctests_passed && bench_ran && unbroken;
        println!("tests:    {tests}");
        println!("doctests: {doctests}");
        println!("{}", if passed { "all passed" } else { "FAIL: see the failures above" });
        Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn misspelt(filter: Option<&str>) -> String {
    filter.map(|filter| format!("; no test's name contains `{filter}`")).unwrap_or_default()
}

fn start_server() -> anyhow::Result<Server> {
    let cluster = Cluster::open_scratch(postgres()?, &mut say)?;
    let server = cluster.start(&mut say)?;
    say(&format!("PostgreSQL listens on port {} until the tests are done", server.port()));
    Ok(server)
}

fn run_tests(url: &str, filter: Option<&str>) -> anyhow::Result<(bool, Counts)> {
    let mut counts = Counts::default();
    let status = if has("nextest") {
        let mut command = cargo(["nextest", "run", "--workspace", "--no-fail-fast", "--color=never"]);
        // A filter that matches only doctests is no failure.
        command.args(["--no-tests=pass"]).args(filter).env("WEFT_DATABASE_URL", url);
        run_seeing(&mut command, Stream::Err, |line| counts.see_nextest(line))?
    } else {
        let mut command = cargo(["test", "--workspace", "--no-fail-fast", "--all-targets"]);
        command.args(filter).env("WEFT_DATABASE_URL", url);
        run_seeing(&mut command, Stream::Out, |line| counts.see_libtest(line))?
    };
    Ok((status.success(), counts))
}

fn run_doctests(url: &str, filter: Option<&str>) -> anyhow::Result<(bool, Counts)> {
    let mut counts = Counts::default();
    let mut command = cargo(["test", "--workspace", "--no-fail-fast", "--doc"]);
    command.args(filter).env("WEFT_DATABASE_URL", url);
    let status = run_seeing(&mut command, Stream::Out, |line| counts.see_libtest(line))?;
    Ok((status.success(), counts))
}

/// What the runners report, added up.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    not_run: u64,
}

impl Counts {
    fn ran(&self) -> u64 {
        self.passed + self.failed
    }

    /// `test result: ok. 4 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.50s`
    fn see_libtest(&mut self, line: &str) {
        if let Some((_, counts)) =
            line.split_once("test result: ").and_then(|(_, rest)| rest.split_once(". "))
        {
            self.add(counts, ';');
        }
    }

    /// `Summary [   5.516s] 4 tests run: 3 passed (1 slow), 1 failed, 2 skipped`
    fn see_nextest(&mut self, line: &str) {
        if let Some((_, counts)) =
            line.trim_start().strip_prefix("Summary [").and_then(|rest| rest.split_once(": "))
        {
            self.add(counts, ',');
        }
    }

    fn add(&mut self, counts: &str, separator: char) {
        for part in counts.split(separator) {
            let mut words = part.split_whitespace();
            let (Some(Ok(number)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) else {
                continue;
            };
            match what {
                "passed" => self.passed += number,
                "failed" | "timed" => self.failed += number,
                "ignored" | "skipped" => self.not_run += number,
                _ => {}
            }
        }
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} not run", self.passed, self.failed, self.not_run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_runners_reports_are_added_up() {
        let mut counts = Counts::default();
        counts.see_nextest("     Summary [   5.516s] 9 tests run: 5 passed (1 slow, 1 flaky), 3 failed, 1 timed out, 2 skipped\n");
        counts.see_nextest("        PASS [   0.012s] (1/4) weft-testkit a_test\n");
        assert_eq!(counts, Counts { passed: 5, failed: 4, not_run: 2 });
        counts.see_libtest("test result: FAILED. 4 passed; 1 failed; 1 ignored; 0 measured; 7 filtered out; finished in 1.50s\n");
        counts.see_libtest("test a_test ... ok\n");
        assert_eq!(counts, Counts { passed: 9, failed: 5, not_run: 3 });
    }
}
