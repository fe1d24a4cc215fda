//! CPU time and memory, as Linux accounts for it; elsewhere there is none to tell.

use std::fs;

/// Ticks per second of what `/proc/*/stat` shows; fixed on every architecture that Weft runs on.
const TICKS_PER_SECOND: f64 = 100.0;
/// Fields of `/proc/*/stat`, counted from the one after the name.
const STATE_TO_PARENT: usize = 1;
const STATE_TO_UTIME: usize = 11;

/// Seconds of CPU time that this process has taken.
#[must_use]
pub fn own_seconds() -> Option<f64> {
    Some(ticks(&stat("self")?.1, 2) / TICKS_PER_SECOND)
}

/// Seconds of CPU time that one process has taken.
#[must_use]
pub fn process_seconds(process: u32) -> Option<f64> {
    Some(ticks(&stat(&process.to_string())?.1, 2) / TICKS_PER_SECOND)
}

/// Memory of a process that is resident, in KiB.
#[must_use]
pub fn resident_kib(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok())
}

/// Seconds that a server has taken: its first process, and its children that live and that have ended.
#[must_use]
pub fn server_seconds(postmaster: u32) -> Option<f64> {
    // The first process's own time and that of the children it has waited for.
    let mut total = ticks(&stat(&postmaster.to_string())?.1, 4);
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let name = entry.file_name();
        let Some((_, fields)) = name.to_str().and_then(stat) else { continue };
        if fields.get(STATE_TO_PARENT).is_some_and(|parent| *parent == postmaster.to_string()) {
            total += ticks(&fields, 2);
        }
    }
    Some(total / TICKS_PER_SECOND)
}

/// The parent of a process, if it runs here under this name.
#[must_use]
pub fn parent(process: u32, name: &str) -> Option<u32> {
    let (found, fields) = stat(&process.to_string())?;
    if found != name {
        return None;
    }
    fields.get(STATE_TO_PARENT)?.parse().ok()
}

/// What the machine is called and how many cores it has.
#[must_use]
pub fn machine() -> (String, usize) {
    let described = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = described.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (model.map_or("unknown", |(_, model)| model).to_owned(), cores)
}

/// A process's name and what follows it.
fn stat(process: &str) -> Option<(String, Vec<String>)> {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (before, after) = text.rsplit_once(") ")?;
    let (_, name) = before.split_once('(')?;
    Some((name.to_owned(), after.split_whitespace().map(str::to_owned).collect()))
}

/// The sum of so many times from the process's own on.
fn ticks(fields: &[String], count: usize) -> f64 {
    fields.iter().skip(STATE_TO_UTIME).take(count).filter_map(|field| field.parse::<f64>().ok()).sum()
}
