//! The measurements, one part of a run each. They put what they find into the report.

mod appends;
mod conflicts;
mod history;
mod latency;

pub(crate) use appends::{appends, batches};
pub(crate) use conflicts::conflicts;
pub(crate) use history::history;
pub(crate) use latency::latency;

use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use tokio::time::Instant;
use weft_bench::report::median;

/// Writes whose time is looked at.
const FSYNCS: usize = 100;

/// Milliseconds that a page takes to be durable, in the folder where a private server's data is. Disks that others use too
/// change from minute to minute, so it is asked at both ends of a run.
pub(crate) fn fsync_ms() -> anyhow::Result<f64> {
    let mut file = tempfile::tempfile()?;
    let page = [1; 8_192];
    file.write_all(&page)?;
    file.sync_all()?;
    let mut times = Vec::with_capacity(FSYNCS);
    for _ in 0..FSYNCS {
        let begun = Instant::now();
        file.write_all_at(&page, 0)?;
        file.sync_data()?;
        times.push(begun.elapsed().as_secs_f64() * 1_000.0);
    }
    Ok(median(&mut times))
}
