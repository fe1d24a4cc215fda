//! `cargo xtask fuzz`: the targets that every test run tries for a moment, for as long as wanted.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::cargo::{cargo, must, run};
use crate::say;

/// Cases between two looks at the clock: some seconds.
const CASES: &str = "20000";

#[derive(Debug, clap::Args)]
pub(crate) struct Fuzz {
    /// What is parsed
    #[arg(value_enum, default_value_t = Target::All)]
    target: Target,
    /// For how long
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    secs: u64,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Target {
    /// What a peer's sidecar sends: messages, and streams
    Frames,
    /// Queries of DNS
    Names,
    /// Both
    All,
}

impl Fuzz {
    #[expect(clippy::disallowed_methods, reason = "nothing but the end of the run depends on this clock")]
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        must(&mut cargo(["test", "--package", "weft-proxy", "--lib", "--no-run"]))?;
        let end = Instant::now() + Duration::from_secs(self.secs);
        let mut rounds = 0_u64;
        while rounds == 0 || Instant::now() < end {
            let mut command = cargo(["test", "--quiet", "--package", "weft-proxy", "--lib", "fuzz::", "--"]);
            // Every round begins somewhere else.
            command.env("PROPTEST_CASES", CASES).args(self.target.others());
            if !run(&mut command)?.success() {
                say("a case was found; it is printed above, and kept in proxy/proptest-regressions");
                return Ok(ExitCode::FAILURE);
            }
            rounds += 1;
        }
        println!("{rounds} rounds of {CASES} cases for each target, none failed");
        Ok(ExitCode::SUCCESS)
    }
}

impl Target {
    /// Which targets are not meant, as the runner of tests is told.
    const fn others(self) -> &'static [&'static str] {
        match self {
            Self::Frames => &["--skip", "dns::"],
            Self::Names => &["--skip", "tunnel::"],
            Self::All => &[],
        }
    }
}
