//! What a mesh leaves on the machine: its processes and the ports that they listen on, as the kernel tells (Linux).
//!
//! Everything that descends from this process, or runs in the mesh's home or names it on its command line, is seen,
//! whatever the mesh itself believes to have started. A process is its number *and* its start time, so a number that is
//! given to somebody else later is not taken for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// Processes and listening sockets that were seen.
#[derive(Clone, Debug)]
pub struct Footprint {
    home: PathBuf,
    processes: BTreeMap<ProcessId, String>,
    /// As in `/proc/net/tcp`: address and port in hexadecimal.
    listening: BTreeSet<String>,
}

/// One process for ever, until the machine restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct ProcessId {
    pid: u32,
    start: u64,
}

struct Stat {
    parent: u32,
    start: u64,
}

impl Footprint {
    /// Nothing seen yet of the mesh in `home`.
    pub fn of(home: &Path) -> Self {
        Self { home: home.to_owned(), processes: BTreeMap::new(), listening: BTreeSet::new() }
    }

    /// Adds what there is now.
    ///
    /// # Errors
    ///
    /// The system does not tell.
    pub fn look(&mut self) -> anyhow::Result<()> {
        let seen = processes(&self.home)?;
        let listeners = listeners()?;
        let inodes = seen.keys().flat_map(|process| sockets(process.pid));
        self.listening.extend(inodes.filter_map(|inode| listeners.get(&inode).cloned()));
        self.processes.extend(seen);
        Ok(())
    }

    /// How many processes were seen so far.
    pub fn processes(&self) -> usize {
        self.processes.len()
    }

    /// How many listening sockets were seen so far.
    pub fn listeners(&self) -> usize {
        self.listening.len()
    }

    /// What is still there, in words; empty if nothing is.
    ///
    /// # Errors
    ///
    /// The system does not tell.
    pub fn left(&self) -> anyhow::Result<Vec<String>> {
        let mut left = BTreeMap::new();
        for (process, command) in self.processes.iter().chain(&processes(&self.home)?) {
            if stat(process.pid).is_some_and(|stat| stat.start == process.start) {
                left.insert(*process, format!("process {} ({command})", process.pid));
            }
        }
        let mut left: Vec<String> = left.into_values().collect();
        let open: BTreeSet<String> = listeners()?.into_values().collect();
        left.extend(self.listening.intersection(&open).map(|address| format!("listener {address}")));
        Ok(left)
    }
}

/// Descendants of this process, and whatever runs in the home or names it.
fn processes(home: &Path) -> anyhow::Result<BTreeMap<ProcessId, String>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("the processes of this system cannot be seen: no /proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if let Some(stat) = stat(pid) {
            all.insert(pid, stat);
        }
    }
    let own = std::process::id();
    let descends = |pid: u32| {
        // A chain cannot be longer than there are processes; numbers that are given anew while we look may make a ring.
        let ancestors = std::iter::successors(Some(pid), |pid| all.get(pid).map(|stat| stat.parent));
        ancestors.take(all.len()).skip(1).any(|ancestor| ancestor == own)
    };
    let ours = all.iter().filter(|(pid, _)| **pid != own && (descends(**pid) || concerns(**pid, home)));
    Ok(ours.map(|(pid, stat)| (ProcessId { pid: *pid, start: stat.start }, command(*pid))).collect())
}

fn concerns(pid: u32, home: &Path) -> bool {
    fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|dir| dir.starts_with(home))
        || command(pid).contains(&*home.to_string_lossy())
}

fn command(pid: u32) -> String {
    let text = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&text).trim_end_matches('\0').replace('\0', " ")
}

/// None if it does not run. One that ended and waits to be reaped does not.
fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Fields 3, 4 and 22 of proc_pid_stat(5). The second is the program's name in brackets and may hold anything.
    let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    Some(Stat { parent: fields.get(1)?.parse().ok()?, start: fields.get(19)?.parse().ok()? })
}

/// The inodes of a process's sockets.
fn sockets(pid: u32) -> Vec<u64> {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let links = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    links
        .filter_map(|link| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok())
        .collect()
}

/// Every listening TCP socket of the machine, by inode.
fn listeners() -> anyhow::Result<BTreeMap<u64, String>> {
    let mut text =
        fs::read_to_string("/proc/net/tcp").context("the sockets of this system cannot be seen")?;
    text.push_str(&fs::read_to_string("/proc/net/tcp6").unwrap_or_default());
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // Local address, state and inode; state 0A is LISTEN.
        if let [_, address, _, "0A", _, _, _, _, _, inode, ..] = fields.as_slice()
            && let Ok(inode) = inode.parse()
        {
            found.insert(inode, (*address).to_owned());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn children_are_seen_while_they_run_and_not_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let mut footprint = Footprint::of(dir.path());
        let mut child = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
        footprint.look().unwrap();
        let said = format!("process {} (sleep 600)", child.id());
        assert!(footprint.left().unwrap().contains(&said), "{:?}", footprint.left());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!footprint.left().unwrap().contains(&said));
    }

    #[test]
    fn a_listener_is_found_by_its_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = format!(":{:04X}", listener.local_addr().unwrap().port());
        let known = listeners().unwrap();
        let own: Vec<&String> =
            sockets(std::process::id()).iter().filter_map(|inode| known.get(inode)).collect();
        assert!(own.iter().any(|address| address.ends_with(&port)), "{own:?}");
    }
}
