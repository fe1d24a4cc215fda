//! What a long log costs: to append to, to replay, to verify, to start on, to store.
//!
//! The order matters. What reads the log comes first, while it holds what was filled in; then appends are measured on it;
//! at last it is sealed, and read again up to where it is.

mod cold_start;
mod fill;
mod reading;
mod slowdown;

use anyhow::Context as _;
use weft_eventlog::{ArchiveConfig, archive};
use weft_model::Position;

use crate::fleet::{Fleet, fleet};
use crate::{Bench, say};
use weft_bench::server::Database;

/// The figure that says a million in its name is of so many, or with `--quick` of few.
const MILLION: &str = "1000000";
const TEN_MILLION: &str = "10000000";

/// Everything about a log of a million events, and with `--full` the slowdown with ten.
pub(crate) async fn history(bench: &mut Bench) -> anyhow::Result<()> {
    let (plan, seed) = (bench.plan.clone(), bench.plan.seed);
    let database = bench.server.create("history").await?;
    let mut fleet = fleet(seed)?;
    let filled = fill::fill(&database, &mut fleet, plan.history, plan.range).await?;
    bench.report.set("history_events", filled.events);
    bench.report.set("payload_bytes_average", filled.payload_bytes_average);
    bench.report.set("fill_events_per_s", filled.events_per_s);
    let end = Position(filled.events);

    if plan.wants("bytes_per_event") {
        bench.report.set_of(
            "bytes_per_event",
            "rows",
            bytes_of_rows(&database).await? / filled.events as f64,
        );
    }
    if plan.wants("replay_rows_events_per_s") {
        reading::replay(bench, &database, end, "rows").await?;
    }
    if plan.wants("verify_events_per_s") {
        let verified = reading::verified(bench, &database, end, "rows").await?;
        bench.report.set("verify_events_per_s", verified);
    }
    if plan.wants("cold_start_1m_s") {
        cold_start::cold_start(bench, &database).await?;
    }
    if plan.wants("slowdown") {
        slowdown::slowdown(bench, &database, &mut fleet, MILLION).await?;
    }
    if ["replay_sealed_events_per_s", "bytes_per_event"].iter().any(|key| plan.wants(key)) {
        sealed(bench, &database).await?;
    }
    bench.server.drop(&database).await?;
    match plan.long_history {
        Some(events) if plan.wants("slowdown") => long_history(bench, seed, events).await,
        _ => Ok(()),
    }
}

/// The log once its full ranges are sealed.
async fn sealed(bench: &mut Bench, database: &Database) -> anyhow::Result<()> {
    say("sealing");
    let connect = database.config.clone();
    // Nobody repeats a command here, so nothing has to be three days old.
    let config = ArchiveConfig { connect, older_than: std::time::Duration::ZERO, forget_outcomes: true };
    let begun = tokio::time::Instant::now();
    let report = archive(&config, |_| ()).await.context("the log cannot be sealed")?;
    let end = report.sealed;
    anyhow::ensure!(end > Position::ZERO, "the log has no full range that could be sealed");
    bench.report.set("sealed_events", report.events);
    bench.report.set("seal_events_per_s", report.events as f64 / begun.elapsed().as_secs_f64());
    if bench.plan.wants("bytes_per_event") {
        let bytes = database.number("select pg_total_relation_size('weft.log_segment')").await?;
        bench.report.set_of("bytes_per_event", "sealed", bytes as f64 / end.0 as f64);
    }
    if bench.plan.wants("replay_sealed_events_per_s") {
        reading::replay(bench, database, end, "sealed").await?;
    }
    if bench.plan.wants("verify_events_per_s") {
        let head = database.reader().head().await?.position;
        let verified = reading::verified(bench, database, head, "sealed").await?;
        bench.report.set("verify_sealed_events_per_s", verified);
    }
    Ok(())
}

/// A log of ten million, for the slowdown alone.
async fn long_history(bench: &mut Bench, seed: u64, events: u64) -> anyhow::Result<()> {
    let database = bench.server.create("long_history").await?;
    let mut fleet: Fleet = fleet(seed)?;
    let filled = fill::fill(&database, &mut fleet, events, bench.plan.range).await?;
    bench.report.set("long_history_events", filled.events);
    slowdown::slowdown(bench, &database, &mut fleet, TEN_MILLION).await?;
    bench.server.drop(&database).await
}

/// Events, their indexes, and the batches beside them.
async fn bytes_of_rows(database: &Database) -> anyhow::Result<f64> {
    const SQL: &str = "select (pg_total_relation_size('weft.log_batch') + coalesce(sum(pg_total_relation_size(relid)), 0))::bigint \
                       from pg_partition_tree('weft.event') where isleaf";
    Ok(database.number(SQL).await? as f64)
}
