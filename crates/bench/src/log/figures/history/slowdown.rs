//! Whether appends get slower as the log grows.

use crate::closed_loop::closed_loop;
use crate::fleet::{Fleet, fleet};
use crate::store::{Load, Log};
use crate::{Bench, say};
use weft_bench::report::median;
use weft_bench::server::Database;

/// Appends to a log that is long and to an empty one, in turns. Every round has an empty log of its own, and each log is open
/// only while it is measured; the warm-up is long enough for the long log's appender to learn where its scopes are.
pub(super) async fn slowdown(
    bench: &mut Bench,
    long: &Database,
    long_fleet: &mut Fleet,
    of: &str,
) -> anyhow::Result<()> {
    let (plan, seed) = (bench.plan.clone(), bench.plan.seed);
    let callers = plan.callers[2];
    let (mut losses, mut rates) = (Vec::new(), Vec::new());
    for round in 1..=plan.rounds {
        let empty = bench.server.create("empty").await?;
        empty.migrate().await?;
        let mut seen = [0.0, 0.0];
        // Who comes first changes, since what is written back of one round slows the next.
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for which in order {
            let mut new_fleet = fleet(seed)?;
            let (database, fleet) =
                if which == 0 { (&empty, &mut new_fleet) } else { (long, &mut *long_fleet) };
            let log = database.open_log().await?;
            let store = Log(log.appender());
            seen[which] = closed_loop(&store, fleet, callers, Load::One, plan.times).await?.events;
            log.shutdown().await;
        }
        bench.server.drop(&empty).await?;
        say(&format!(
            "slowdown, round {round}: {:.0} appends/s on an empty log, {:.0} on the long one",
            seen[0], seen[1]
        ));
        losses.push(1.0 - seen[1] / seen[0].max(f64::MIN_POSITIVE));
        rates.push(seen[1]);
    }
    bench.report.set_of("slowdown", of, median(&mut losses));
    bench.report.set_of("long_log_appends_per_s", of, median(&mut rates));
    Ok(())
}
