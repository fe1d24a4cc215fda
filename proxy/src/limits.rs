//! File descriptors: as many as the system gives this process, and how many connections they are for.
//!
//! A connection takes two, a tunnel that waits one. Some are kept back: for the control channel, the logs and the listeners, which come
//! first, and to accept one connection more only to refuse it, because a client that is refused can go elsewhere and one that is left
//! waiting cannot.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Kept back: the event queues, the admin pages, the controller, logs, files that are replaced, and a burst of connections that are refused.
const RESERVED: usize = 256;

/// Fewest connections that are served, whatever the limit: a sidecar that serves none would only look alive.
const CONNECTIONS_MIN: usize = 16;

/// Most live connections of a sidecar, however many files it may open: far above what one app holds. A quiet one holds some 6 KiB here,
/// 600 MiB for all; one whose receivers take nothing up to 300 KiB more ([`crate::tunnel::copy`]) and the kernel's buffers.
const CONNECTIONS_MAX: usize = 100_000;

/// Raises the limit of open files of this process to what the system allows.
pub fn raise_open_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, hard, "the limit of open files cannot be raised");
    }
}

/// How many files this process may open.
pub(crate) fn open_files() -> usize {
    // POSIX's least that a system may give, if it does not tell.
    getrlimit(Resource::RLIMIT_NOFILE).map_or(20, |(soft, _)| usize::try_from(soft).unwrap_or(usize::MAX))
}

/// What a sidecar holds at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Live connections.
    pub(crate) connections: usize,
    /// Tunnels that wait for their next stream, in each direction.
    pub(crate) idle_tunnels: usize,
}

impl Limits {
    /// Of a process that may open so many files, has so many listening sockets and would keep so many tunnels.
    pub(crate) fn new(open_files: usize, listeners: usize, idle_tunnels: usize) -> Self {
        let free = open_files.saturating_sub(RESERVED).saturating_sub(listeners);
        // Both directions together get a quarter at most: connections come first.
        let idle_tunnels = idle_tunnels.min(free / 8);
        let connections = ((free - 2 * idle_tunnels) / 2).clamp(CONNECTIONS_MIN, CONNECTIONS_MAX);
        Self { connections, idle_tunnels }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_and_everything_else_fit() {
        for (open_files, idle, connections, idle_tunnels) in [
            (20_000, 1024, 8_843, 1024),
            (1024, 1024, 285, 94),
            (1024, 0, 379, 0),
            (256, 1024, CONNECTIONS_MIN, 0),
            (usize::MAX, 1024, CONNECTIONS_MAX, 1024),
        ] {
            let expected = Limits { connections, idle_tunnels };
            assert_eq!(Limits::new(open_files, 10, idle), expected, "{open_files}");
        }
    }
}
