//! How long an append takes at a fixed rate.

use crate::fleet::fleet;
use crate::open_loop::open_loop;
use crate::store::Log;
use crate::{Bench, say};
use weft_bench::report::median;

/// 5,000 requests of one event per second, due at fixed times.
pub(crate) async fn latency(bench: &mut Bench) -> anyhow::Result<()> {
    let (plan, seed) = (bench.plan.clone(), bench.plan.seed);
    let database = bench.server.create("latency").await?;
    database.migrate().await?;
    let log = database.open_log().await?;
    let store = Log(log.appender());
    let mut fleet = fleet(seed)?;
    let quantiles = [("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)];
    let mut seen: [Vec<f64>; 4] = Default::default();
    for round in 1..=plan.rounds {
        let latencies = open_loop(&store, &mut fleet, plan.rate, plan.latency_times).await?;
        for ((_, quantile), seen) in quantiles.iter().zip(&mut seen) {
            seen.push(latencies.at(*quantile).as_secs_f64() * 1_000.0);
        }
        say(&format!(
            "{} requests/s, round {round}: p50 {:.2} ms, p99 {:.2} ms",
            plan.rate,
            seen[0].last().copied().unwrap_or_default(),
            seen[1].last().copied().unwrap_or_default(),
        ));
    }
    for ((name, _), seen) in quantiles.iter().zip(&mut seen) {
        bench.report.set(&format!("{name}_ms_at_5000"), median(seen));
    }
    log.shutdown().await;
    bench.server.drop(&database).await
}
