//! Durable appends in closed loops: ours, and the baseline's in turns with them.

use crate::baseline::{Baseline, Categories};
use crate::closed_loop::closed_loop;
use crate::fleet::fleet;
use crate::store::{Load, Log};
use crate::{Bench, say};
use weft_bench::report::median;
use weft_bench::server::Database;

/// Connections of the baseline. More callers share them: each connection is a process of the server, and beyond this they
/// only wait for one another.
const CONNECTIONS_MAX: usize = 64;
/// Events per request of the batches.
const BATCH: usize = 100;

/// One event per request, with few and many callers.
pub(crate) async fn appends(bench: &mut Bench) -> anyhow::Result<()> {
    let (plan, seed) = (bench.plan.clone(), bench.plan.seed);
    let ratio = plan.wants("baseline_ratio_256");
    let ours = ratio || plan.wants("appends_per_s");
    let theirs = ratio || plan.wants("baseline_appends_per_s");
    let many = plan.wants("baseline_many_categories_appends_per_s");
    let database = bench.server.create("appends").await?;
    database.migrate().await?;
    Baseline::create(&database).await?;
    let log = database.open_log().await?;
    let store = Log(log.appender());
    // Each store has its own fleet, since versions are the store's.
    let (mut our_fleet, mut one_fleet, mut many_fleet) = (fleet(seed)?, fleet(seed)?, fleet(seed)?);
    for callers in plan.callers {
        let connections = callers.min(CONNECTIONS_MAX);
        let one = Baseline::connect(&database, Categories::One, connections).await?;
        let (mut our_rates, mut one_rates, mut many_rates) = (Vec::new(), Vec::new(), Vec::new());
        let before = commits(&database).await?;
        for round in 1..=plan.rounds {
            if ours {
                let rates = closed_loop(&store, &mut our_fleet, callers, Load::One, plan.times).await?;
                say(&format!("{callers} callers, round {round}: {:.0} appends/s", rates.events));
                our_rates.push(rates.events);
            }
            if theirs {
                let rates = closed_loop(&one, &mut one_fleet, callers, Load::One, plan.times).await?;
                say(&format!(
                    "{callers} callers, round {round}: {:.0} appends/s in the baseline",
                    rates.events
                ));
                one_rates.push(rates.events);
            }
            if many {
                let store = one.with(Categories::PerService);
                let rates = closed_loop(&store, &mut many_fleet, callers, Load::One, plan.times).await?;
                say(&format!(
                    "{callers} callers, round {round}: {:.0} appends/s in the baseline, many categories",
                    rates.events
                ));
                many_rates.push(rates.events);
            }
        }
        let report = &mut bench.report;
        let (our_rate, their_rate) = (median(&mut our_rates), median(&mut one_rates));
        if ours {
            report.set_of("appends_per_s", callers, our_rate);
        }
        if theirs {
            report.set_of("baseline_appends_per_s", callers, their_rate);
            report.set_of("baseline_connections", callers, connections);
        }
        if many {
            let many_rate = median(&mut many_rates);
            report.set_of("baseline_many_categories_appends_per_s", callers, many_rate);
            if ours && callers == plan.callers[2] {
                report.set("baseline_many_categories_ratio_256", our_rate / many_rate.max(f64::MIN_POSITIVE));
            }
        }
        if ratio && callers == plan.callers[2] {
            report.set("baseline_ratio_256", our_rate / their_rate.max(f64::MIN_POSITIVE));
        }
        if ours {
            let after = commits(&database).await?;
            let events_per_commit = (after.0 - before.0) as f64 / ((after.1 - before.1).max(1)) as f64;
            bench.report.set_of("events_per_commit", callers, events_per_commit);
        }
    }
    log.shutdown().await;
    bench.server.drop(&database).await
}

/// A hundred events per request.
pub(crate) async fn batches(bench: &mut Bench) -> anyhow::Result<()> {
    let (plan, seed) = (bench.plan.clone(), bench.plan.seed);
    let database = bench.server.create("batches").await?;
    database.migrate().await?;
    let log = database.open_log().await?;
    let store = Log(log.appender());
    let mut fleet = fleet(seed)?;
    let loads = [
        ("batch100_events_per_s", Load::Many(BATCH)),
        ("batch100_one_scope_events_per_s", Load::ManyInOneScope(BATCH)),
    ];
    for callers in plan.callers.into_iter().rev() {
        for (key, load) in loads.into_iter().filter(|(key, _)| plan.wants(key)) {
            let mut rates = Vec::new();
            for round in 1..=plan.rounds {
                let seen = closed_loop(&store, &mut fleet, callers, load, plan.times).await?;
                say(&format!("{callers} callers, {load:?}, round {round}: {:.0} events/s", seen.events));
                rates.push(seen.events);
            }
            let rate = median(&mut rates);
            if callers == plan.callers[2] {
                bench.report.set(key, rate);
            }
            bench.report.set_of(&format!("{key}_by_callers"), callers, rate);
        }
    }
    log.shutdown().await;
    bench.server.drop(&database).await
}

/// Events and commits of a log.
async fn commits(database: &Database) -> anyhow::Result<(i64, i64)> {
    let events = database.number("select coalesce(max(last_position), 0) from weft.log_batch").await?;
    Ok((events, database.number("select count(*) from weft.log_batch").await?))
}
