//! The smoke run, as a newcomer starts it.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use weft_tests::programs;
use weft_tests::weft::program;

/// Far above what it takes, which is about a minute; each of its steps is bounded.
const RUN_LIMIT: Duration = Duration::from_secs(240);

#[tokio::test]
async fn every_step_is_ok() -> anyhow::Result<()> {
    let mut command = program(programs::built_one("weft-smoke")?);
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(RUN_LIMIT, command.output()).await.context("it does not end")??;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    eprint!("{}", String::from_utf8_lossy(&output.stderr));

    let steps: Vec<&str> = text.lines().collect();
    let (last, steps) = steps.split_last().context("it prints nothing")?;
    ensure!(steps.iter().all(|step| step.starts_with("ok ")), "a step is not ok");
    ensure!(*last == format!("smoke: {0}/{0} ok", steps.len()), "the last line is {last:?}");
    ensure!(output.status.success(), "all is ok, but the exit status is {}", output.status);
    Ok(())
}
