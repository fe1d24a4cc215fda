//! Sidecars that go and come while connections are opened.

use anyhow::ensure;
use weft_tests::restarts::{self, Plan};

#[tokio::test(flavor = "multi_thread")]
async fn no_connection_fails_while_sidecars_are_restarted_drained_and_upgraded() -> anyhow::Result<()> {
    let plan = Plan { restarts: 1, drains: 1, upgrades: 2, rate: 50, seed: 2 };
    let outcome = restarts::run(plan).await?;
    ensure!(outcome.passed > 0 && outcome.failed == 0, "{outcome:?}");
    ensure!(outcome.drained > 0 && outcome.cut_early == 0, "{outcome:?}");
    Ok(())
}
