//! How fast a fleet comes back whose connections all broke at once, and what that costs.

use anyhow::Context as _;
use weft_bench::cpu;
use weft_fleet::Fleet;

use crate::{Bench, say};

/// A fleet's coming back; all in seconds.
#[derive(Clone, Copy, Default)]
struct Back {
    /// Until the last one is back.
    took: f64,
    /// CPU time of the controller.
    controller: f64,
    /// CPU time of the fleet.
    fleet: f64,
}

impl Back {
    /// The longer of two, with what that one cost.
    fn longer(self, other: Self) -> Self {
        if self.took >= other.took { self } else { other }
    }

    fn report(self, bench: &mut Bench, what: &str, key: &str) {
        let Self { took, controller, fleet } = self;
        say(&format!(
            "all back after {took:.2} s ({what}); CPU: controller {controller:.2} s, fleet {fleet:.2} s"
        ));
        bench.report.set_of(&format!("{what}_s"), key, took);
        bench.report.set_of(&format!("{what}_controller_cpu_s"), key, controller);
        bench.report.set_of(&format!("{what}_fleet_cpu_s"), key, fleet);
    }
}

/// Cuts all connections some times, and once more when the sidecars have nothing to resume, as if they came to a controller that
/// they never saw.
pub(super) async fn reconnect(
    bench: &mut Bench,
    fleet: &Fleet,
    key: &str,
    controller: u32,
) -> anyhow::Result<()> {
    let mut longest = Back::default();
    for _ in 0..bench.plan.of(3, 1) {
        longest = longest.longer(cut(fleet, controller).await?);
    }
    longest.report(bench, "reconnect", key);
    if key == "10000" {
        bench.report.set("reconnect_10000_s", longest.took);
    }
    fleet.forget_tickets();
    cut(fleet, controller).await?.report(bench, "reconnect_whole_handshakes", key);
    Ok(())
}

async fn cut(fleet: &Fleet, controller: u32) -> anyhow::Result<Back> {
    let cpu = || {
        let both = cpu::process_seconds(controller).zip(cpu::own_seconds());
        both.context("the CPU time of controller and fleet cannot be read")
    };
    let before = cpu()?;
    let took = fleet.cut(|_| {}).await?.as_secs_f64();
    let after = cpu()?;
    Ok(Back { took, controller: after.0 - before.0, fleet: after.1 - before.1 })
}
