//! Walking the whole log: with the fold behind, without, and to verify it.

use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use std::pin::pin;
use tokio::time::Instant;
use weft_eventlog::{Reader, verify};
use weft_model::Position;
use weft_projector::{FoldFrom, fold_to};

use crate::{Bench, say};
use weft_bench::cpu;
use weft_bench::report::median;
use weft_bench::server::Database;

/// What a walk took.
struct Walk {
    seconds: f64,
    own_cpu_s: Option<f64>,
    server_cpu_s: Option<f64>,
}

/// Replays and folds everything up to `end`, on one thread; from `source`, which is `rows` or `sealed`.
pub(super) async fn replay(
    bench: &mut Bench,
    database: &Database,
    end: Position,
    source: &str,
) -> anyhow::Result<()> {
    let (mut rates, mut own, mut servers, mut reads) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let events = end.0 as f64;
    for round in 1..=bench.plan.rounds {
        let folded = alone(bench, database, move |reader| async move {
            fold_to(&reader, end, FoldFrom::FirstEvent, |_| ()).await.context("the log cannot be folded")?;
            Ok(())
        })
        .await?;
        let read = alone(bench, database, move |reader| async move {
            let mut pages = pin!(reader.replay(Position::ZERO, end));
            let mut seen = 0;
            while let Some(page) = pages.try_next().await? {
                seen += page.events().count() as u64;
            }
            anyhow::ensure!(seen == end.0, "{seen} events were read, of {end}");
            Ok(())
        })
        .await?;
        let (folded_per_s, read_per_s) = (events / folded.seconds, events / read.seconds);
        say(&format!(
            "replay from {source}, round {round}: {folded_per_s:.0} events/s with the fold, {read_per_s:.0} without"
        ));
        rates.push(folded_per_s);
        reads.push(read_per_s);
        own.extend(folded.own_cpu_s);
        servers.extend(folded.server_cpu_s);
    }
    let report = &mut bench.report;
    report.set(&format!("replay_{source}_events_per_s"), median(&mut rates));
    report.set(&format!("read_{source}_events_per_s"), median(&mut reads));
    for (whose, mut seconds) in [("own", own), ("postgres", servers)] {
        if !seconds.is_empty() {
            report.set_of(&format!("replay_{source}_cpu_s"), whose, median(&mut seconds));
        }
    }
    Ok(())
}

/// Events that are verified per second: on all cores, as `weft verify` does it.
pub(super) async fn verified(
    bench: &Bench,
    database: &Database,
    end: Position,
    source: &str,
) -> anyhow::Result<f64> {
    let mut rates = Vec::new();
    for round in 1..=bench.plan.rounds {
        let begun = Instant::now();
        let report = verify(&database.reader(), |_| ()).await.context("the log is not sound")?;
        anyhow::ensure!(report.events >= end.0, "{} events were verified, of {end}", report.events);
        let rate = report.events as f64 / begun.elapsed().as_secs_f64();
        say(&format!("verify from {source}, round {round}: {rate:.0} events/s"));
        rates.push(rate);
    }
    Ok(median(&mut rates))
}

/// Runs work on a thread of its own that is its only one.
async fn alone<F, W>(bench: &Bench, database: &Database, work: F) -> anyhow::Result<Walk>
where
    F: FnOnce(Reader) -> W + Send + 'static,
    W: Future<Output = anyhow::Result<()>>,
{
    let (postmaster, reader) = (bench.server.process().await?, database.reader());
    let walk = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let cpu = || (cpu::own_seconds(), postmaster.and_then(cpu::server_seconds));
        let (own, server) = cpu();
        let begun = Instant::now();
        runtime.block_on(work(reader))?;
        let seconds = begun.elapsed().as_secs_f64();
        // Its connection ends with it, so that the server has counted its process.
        drop(runtime);
        let (own_after, server_after) = cpu();
        let spent = |before: Option<f64>, after: Option<f64>| Some(after? - before?);
        let (own_cpu_s, server_cpu_s) = (spent(own, own_after), spent(server, server_after));
        anyhow::Ok(Walk { seconds, own_cpu_s, server_cpu_s })
    });
    walk.await.context("a walk ended")?
}
