//! What an endpoint costs whose health flaps, in simulated time: the code that controllers decide, count and fold with.

use std::time::Duration;
use weft_routing::fixture::flaps::{Figures, flapper as simulate};

use crate::{Bench, say};

/// Endpoints of its service.
const ENDPOINTS: usize = 10;

/// Once a second for ten minutes.
pub(crate) fn flapper(bench: &mut Bench) {
    if !bench.plan.wants(&["flapper"]) {
        return;
    }
    let Figures { raw, changes, events, released_after } =
        simulate(ENDPOINTS, Duration::from_secs(1), Duration::from_secs(600));
    say(&format!(
        "a flapper that changes {raw} times in ten minutes, let go {released_after:?} after it calmed down"
    ));
    bench.report.set_of("flapper", "changes", changes);
    bench.report.set_of("flapper", "events", events);
}
