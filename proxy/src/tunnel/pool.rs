//! Tunnels that have carried a stream and wait for the next one: it begins without a handshake. Each thread has its own.
//!
//! A tunnel is taken again only by the identity that opened it: a renewed leaf or other roots retire it, and so does the end of the
//! peer's leaf, so that no stream begins on what a new handshake would refuse. If the other end has closed it, that is
//! seen before it is used; what else became of the other end meanwhile is found out by using it: nothing of the application is sent before
//! the answer to OPEN, so a tunnel that turns out to be dead, or does not answer at once, costs a new one.

use super::Tunnel;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use weft_identity::credential::Credential;
use weft_model::{InstanceId, Timestamp};

/// Longest that a tunnel waits. Below what the other end waits, so that it is seldom the other end that closes.
pub(crate) const IDLE_MAX: Duration = Duration::from_secs(60);

/// How often those that waited too long are closed. A thread that has a timer so near is not woken for each connect timeout that
/// begins: a system call less for every connection.
pub(crate) const SWEEP: Duration = Duration::from_secs(1);

/// Where a tunnel leads.
type Peer = (InstanceId, SocketAddr);

/// What a tunnel rests on, for as long as it lives.
#[derive(Clone, Debug)]
pub(crate) struct Basis {
    /// What this end has shown.
    pub(crate) own: Arc<Credential>,
    /// When what the other end has shown expires.
    pub(crate) peer_expires: Timestamp,
    /// The version of TLS.
    pub(crate) tls: Option<&'static str>,
    pub(crate) key_exchange: Option<&'static str>,
}

impl Basis {
    /// Whether a new handshake would rest on the same.
    pub(crate) fn holds(&self, own: &Arc<Credential>, now: Timestamp) -> bool {
        Arc::ptr_eq(&self.own, own) && now <= self.peer_expires
    }
}

struct Idle {
    tunnel: Box<Tunnel>,
    basis: Basis,
    since: Instant,
}

/// See the module's documentation.
pub(crate) struct Pool {
    idle: Mutex<Waiting>,
    most: usize,
}

#[derive(Default)]
struct Waiting {
    /// The latest at the end.
    tunnels: BTreeMap<Peer, Vec<Idle>>,
    count: usize,
}

impl Waiting {
    fn close_oldest(&mut self) {
        let oldest = self.tunnels.iter().filter_map(|(peer, idle)| Some((idle.first()?.since, peer)));
        let Some(peer) = oldest.min_by_key(|(since, _)| *since).map(|(_, peer)| peer.clone()) else { return };
        if let Some(idle) = self.tunnels.get_mut(&peer) {
            idle.remove(0);
            self.count -= 1;
            if idle.is_empty() {
                self.tunnels.remove(&peer);
            }
        }
    }
}

impl Pool {
    /// Keeps at most this many.
    pub(crate) fn new(most: usize) -> Self {
        Self { idle: Mutex::default(), most }
    }

    /// The tunnel to a peer that was used last, if one waits that may be used.
    pub(crate) fn take(
        &self,
        peer: &InstanceId,
        address: SocketAddr,
        own: &Arc<Credential>,
        now: Timestamp,
    ) -> Option<(Box<Tunnel>, Basis)> {
        let mut waiting = self.lock();
        // The key is made only if there is something to find.
        if waiting.count == 0 {
            return None;
        }
        let key = (peer.clone(), address);
        let found = loop {
            let Some(Idle { tunnel, basis, .. }) = waiting.tunnels.get_mut(&key).and_then(Vec::pop) else {
                break None;
            };
            waiting.count -= 1;
            if basis.holds(own, now) && tunnel.is_quiet() {
                break Some((tunnel, basis));
            }
        };
        if waiting.tunnels.get(&key).is_some_and(Vec::is_empty) {
            waiting.tunnels.remove(&key);
        }
        found
    }

    /// Keeps a tunnel whose stream ended cleanly. If there are too many already, the one that has waited longest is closed.
    pub(crate) fn put(&self, peer: InstanceId, address: SocketAddr, tunnel: Box<Tunnel>, basis: Basis) {
        if self.most == 0 {
            return;
        }
        let mut waiting = self.lock();
        if waiting.count >= self.most {
            waiting.close_oldest();
        }
        waiting.count += 1;
        let idle = Idle { tunnel, basis, since: Instant::now() };
        waiting.tunnels.entry((peer, address)).or_default().push(idle);
    }

    /// Closes what waited too long, and what the other end closed.
    pub(crate) fn sweep(&self) {
        let mut waiting = self.lock();
        let Waiting { tunnels, count } = &mut *waiting;
        tunnels.retain(|_, idle| {
            idle.retain(|idle| idle.since.elapsed() < IDLE_MAX && idle.tunnel.is_quiet());
            !idle.is_empty()
        });
        *count = tunnels.values().map(Vec::len).sum();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
