//! What refused requests cost those that are accepted.

use crate::closed_loop::closed_loop;
use crate::fleet::fleet;
use crate::store::{Load, Log};
use crate::{Bench, say};
use weft_bench::report::median;

/// Of a hundred requests so many expect a version that is past.
const PERCENT: u8 = 20;

/// Accepted appends per second with conflicts, against what would be left of the rate without any if a refusal cost as
/// much as an append: loss = 1 - accepted(20 % conflicting) / (0.8 x accepted(none conflicting)).
pub(crate) async fn conflicts(bench: &mut Bench) -> anyhow::Result<()> {
    let (plan, seed) = (bench.plan.clone(), bench.plan.seed);
    let callers = plan.callers[2];
    let database = bench.server.create("conflicts").await?;
    database.migrate().await?;
    let log = database.open_log().await?;
    let store = Log(log.appender());
    let mut fleet = fleet(seed)?;
    for lane in &mut fleet {
        store.append(lane.beginning()?).await?;
    }
    let (mut losses, mut refused) = (Vec::new(), Vec::new());
    for round in 1..=plan.rounds {
        let without = closed_loop(&store, &mut fleet, callers, Load::One, plan.times).await?;
        let with = closed_loop(&store, &mut fleet, callers, Load::Conflicting(PERCENT), plan.times).await?;
        say(&format!(
            "conflicts, round {round}: {:.0} appends/s without, {:.0} with, and {:.0} refused",
            without.events, with.events, with.refused
        ));
        let valid = 1.0 - f64::from(PERCENT) / 100.0;
        losses.push(1.0 - with.events / (valid * without.events).max(f64::MIN_POSITIVE));
        refused.push(with.refused);
    }
    bench.report.set("conflict_loss", median(&mut losses));
    bench.report.set("conflicts_refused_per_s", median(&mut refused));
    log.shutdown().await;
    bench.server.drop(&database).await
}
