//! Processes whose owner was killed: found by what it wrote down, proven to be ours, and stopped.
//!
//! A process number may be anybody's by the time it is looked at. Together with the start time and the machine's boot
//! it names one process for ever; where the system does not tell those, nothing is signalled.

use crate::home::{Home, write_json};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

/// How often is looked whether a process ended.
const POLL: Duration = Duration::from_millis(20);
/// Ten seconds for a process to end by itself: a sidecar's drain in a local mesh, and room.
const POLLS_MAX: u32 = 500;

/// One process, recognizable for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recorded {
    name: String,
    pid: u32,
    /// In clock ticks after the boot; none where the system does not tell.
    started: Option<u64>,
}

/// What `processes.json` says: which boot of the machine, whose processes, and which, in the order of their start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Records {
    boot: String,
    owner: u32,
    owner_started: Option<u64>,
    pub(crate) processes: Vec<Recorded>,
}

impl Records {
    /// Records of this process.
    pub(crate) fn own() -> Self {
        let owner = std::process::id();
        Self { boot: boot_id(), owner, owner_started: start_time(owner), processes: Vec::new() }
    }

    pub(crate) fn add(&mut self, name: &str, pid: u32) {
        self.processes.push(Recorded { name: name.to_owned(), pid, started: start_time(pid) });
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.processes.retain(|process| process.name != name);
    }

    pub(crate) fn save(&self, home: &Home) -> io::Result<()> {
        write_json(&home.processes(), self)
    }

    fn load(home: &Home) -> Option<Self> {
        serde_json::from_slice(&fs::read(home.processes()).ok()?).ok()
    }
}

/// Stops what an earlier owner of the home left. Returns the names of what was stopped. Blocks.
pub fn stop_all(home: &Home) -> Vec<String> {
    Records::load(home).map(|records| stop(&records)).unwrap_or_default()
}

/// Asks all to end, the last started first, and ends what does not. PostgreSQL is stopped by its own watchdog at the same
/// time, so there is no order in which everybody could end well, and waiting for one after another would gain nothing.
fn stop(records: &Records) -> Vec<String> {
    if records.boot != boot_id() {
        return Vec::new();
    }
    let mut left: Vec<&Recorded> = records.processes.iter().rev().filter(|process| lives(process)).collect();
    let names = left.iter().map(|process| process.name.clone()).collect();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        for process in &left {
            let _ = kill(Pid::from_raw(process.pid.cast_signed()), signal);
        }
        let mut polls = 0..POLLS_MAX;
        while !left.is_empty() && polls.next().is_some() {
            thread::sleep(POLL);
            left.retain(|process| lives(process));
        }
    }
    names
}

/// Whether the recorded process still runs. One that ended and waits to be reaped does not.
fn lives(process: &Recorded) -> bool {
    process.started.is_some() && start_time(process.pid) == process.started
}

/// When a running process started; none if it does not run, or the system does not tell.
fn start_time(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in brackets and may hold anything, so fields count from its end.
    let (_, fields) = text.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    let state = fields.next()?;
    // Field 22 of proc_pid_stat(5), of which the state is the third.
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// A process that stops the mesh's processes when the owner is gone without having done so. It holds the other end of a
/// pipe: a word means that all is well, the end without one that the owner was killed.
#[derive(Debug)]
pub(crate) struct Watchdog {
    process: Child,
}

impl Watchdog {
    /// Starts it; `weft` is the program that [`watch`] runs in.
    pub(crate) fn start(weft: &Path, home: &Home) -> io::Result<Self> {
        let process = Command::new(weft)
            .arg("watchdog")
            .arg("--home")
            .arg(home.dir())
            .arg("--owner")
            .arg(std::process::id().to_string())
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Out of reach of the terminal's Ctrl-C.
            .process_group(0)
            .spawn()?;
        Ok(Self { process })
    }

    /// Ends it without its doing anything.
    pub(crate) fn dismiss(mut self) {
        if let Some(mut pipe) = self.process.stdin.take() {
            // It can only fail if the watchdog is gone already.
            let _ = pipe.write_all(b"done\n");
        }
        let _ = self.process.wait();
    }
}

/// What the watchdog does: waits for a word of its owner, or for the owner's end. Blocks.
///
/// # Errors
/// Standard input cannot be read.
pub fn watch(home: &Home, owner: u32) -> io::Result<()> {
    let mut word = String::new();
    io::stdin().lock().read_to_string(&mut word)?;
    if word.trim() == "done" {
        return Ok(());
    }
    // A new owner may have come meanwhile, cleaned up and started anew: those processes are not ours to stop.
    match Records::load(home) {
        Some(records) if records.owner == owner => {
            stop(&records);
        }
        Some(_) | None => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("600").spawn().unwrap()
    }

    #[test]
    fn a_recorded_process_is_stopped() {
        let mut child = sleeper();
        let mut records = Records::own();
        records.add("sleeper", child.id());
        // Reaped here while it is waited for, as init would.
        let reaper = thread::spawn(move || child.wait().unwrap());
        assert_eq!(stop(&records), ["sleeper"]);
        assert!(!reaper.join().unwrap().success());
        assert_eq!(stop(&records), Vec::<String>::new());
    }

    #[test]
    fn a_number_that_is_someone_elses_now_is_left_alone() {
        let mut child = sleeper();
        let mut records = Records::own();
        records.add("sleeper", child.id());
        let genuine = records.clone();
        records.processes[0].started = records.processes[0].started.map(|ticks| ticks + 1);
        assert_eq!(stop(&records), Vec::<String>::new());
        let mut rebooted = genuine.clone();
        rebooted.boot = "another boot".into();
        assert_eq!(stop(&rebooted), Vec::<String>::new());
        let mut untold = genuine;
        untold.processes[0].started = None;
        assert_eq!(stop(&untold), Vec::<String>::new());
        assert_eq!(child.try_wait().unwrap(), None);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn records_survive_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        let mut records = Records::own();
        records.add("self", std::process::id());
        records.save(&home).unwrap();
        assert_eq!(Records::load(&home), Some(records));
        assert!(stop_all(&Home::at(dir.path().join("absent"))).is_empty());
    }
}
