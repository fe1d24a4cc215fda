//! How long a controller takes from its start until it serves.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use weft_bench::controller::Process;
use weft_bench::server::Database;

use crate::{Bench, say};
use weft_bench::report::median;

/// Pause between two questions.
const POLL: Duration = Duration::from_millis(100);
/// A checkpoint that is not there by then is not coming soon: the next start folds everything, and the figure says so.
const CHECKPOINT_MAX: Duration = Duration::from_secs(60);

/// Starts a controller on the log once, so that it projects everything and leaves a checkpoint of its fold where it keeps
/// them; then measures further starts.
pub(super) async fn cold_start(bench: &mut Bench, database: &Database) -> anyhow::Result<()> {
    let state = tempfile::tempdir()?;
    let url = database.url(&bench.url)?;
    let controller = Process::start(&bench.controller, "controller-1", state.path(), &url).await?;
    let first = controller.took.as_secs_f64();
    database.projected(POLL).await?;
    if let Some(position) = checkpointed(database).await? {
        bench.report.set("cold_start_checkpoint", position);
    }
    controller.end().await?;
    let mut starts = Vec::new();
    for _ in 0..bench.plan.rounds {
        let controller = Process::start(&bench.controller, "controller-1", state.path(), &url).await?;
        let seconds = controller.took.as_secs_f64();
        say(&format!(
            "a controller serves {seconds:.3} s after its start; the first time it was {first:.3} s"
        ));
        starts.push(seconds);
        controller.end().await?;
    }
    bench.report.set("first_start_1m_s", first);
    bench.report.set("cold_start_1m_s", median(&mut starts));
    Ok(())
}

/// Waits until a checkpoint of the fold is stored, and says of which position. None if this schema has no place for them.
async fn checkpointed(database: &Database) -> anyhow::Result<Option<i64>> {
    const PLACE_SQL: &str = "select count(to_regclass('weft.fold_checkpoint'))";
    const SQL: &str = "select coalesce(max(position), 0) from weft.fold_checkpoint";
    if database.number(PLACE_SQL).await? == 0 {
        return Ok(None);
    }
    let begun = Instant::now();
    loop {
        let position = database.number(SQL).await?;
        if position > 0 || begun.elapsed() > CHECKPOINT_MAX {
            return Ok(Some(position));
        }
        sleep(POLL).await;
    }
}
