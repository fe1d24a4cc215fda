//! A network of a test's own, for what names ports or changes rules of the kernel.

use anyhow::{Context, ensure};
use nix::sched::{CloneFlags, unshare};

use crate::weft::{program, run};

/// Leaves the machine's network for a new, empty one: this thread and those that it starts, so before there is a runtime.
///
/// # Errors
///
/// That needs root.
pub fn leave() -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)
        .context("this test makes a network namespace, which needs root (CAP_SYS_ADMIN): run it with sudo")
}

/// Gives the new network its loopback addresses and a way out, at whose end is nobody.
///
/// # Errors
///
/// `ip` is absent, or fails.
pub async fn with_a_way_out() -> anyhow::Result<()> {
    for line in [
        "link set lo up",
        "link add weft-out type veth peer name weft-end",
        "link set weft-end up",
        "addr add 192.0.2.10/24 dev weft-out",
        "link set weft-out up",
        "route add default dev weft-out",
    ] {
        let mut ip = program("ip");
        ip.args(line.split(' '));
        let said = run(ip).await.context("`ip` (iproute2) is needed")?;
        ensure!(said.status == Some(0), "{said}");
    }
    Ok(())
}
