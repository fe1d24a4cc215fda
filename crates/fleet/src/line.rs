//! The connection that some sidecars share; or the one of a single sidecar.
//!
//! It is opened by whoever needs it first, with that one's leaf, and again by whoever first finds it broken.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::Mutex;
use weft_client::{CallError, ControllerAddress, Introduced, Relay, Way};

use crate::Mesh;
use crate::member::Identity;
use crate::reader::{Read, Reader};

#[derive(Debug)]
pub(crate) struct Line {
    mesh: Mesh,
    way: Way,
    reader: Arc<Reader>,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    /// How often it was opened.
    number: u64,
    relay: Option<Relay>,
    /// Whose leaf it was opened with.
    owner: usize,
    /// Whether somebody on it has got as far as the newest version.
    settled: Arc<AtomicBool>,
}

/// A sidecar's share of a line.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    /// Which opening of the line it is of.
    pub(crate) number: u64,
    pub(crate) channel: Introduced,
    settled: Arc<AtomicBool>,
}

impl Session {
    /// It has had what it was opened for.
    pub(crate) fn settle(&self) {
        self.settled.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }
}

impl Line {
    /// A line of the machine that has this address, if that is one of this machine's as well, as all of 127.0.0.0/8 are to a
    /// controller there. Ten thousand connections from one address would look for a free port longer than for anything else.
    pub(crate) fn new(mesh: &Mesh, address: Ipv4Addr, reader: &Arc<Reader>) -> Self {
        let from = mesh.controllers.iter().all(ControllerAddress::is_loopback).then_some(address);
        let way = Way { from, ..reader.way() };
        Self { mesh: mesh.clone(), way, reader: Arc::clone(reader), open: Mutex::default() }
    }

    /// A session of the sidecar `index`, on an opening of the line after number `after`.
    pub(crate) async fn session(
        &self,
        index: usize,
        identity: &Identity,
        after: u64,
    ) -> Result<Session, CallError> {
        let (relay, number, owner, settled) = {
            let mut open = self.open.lock().await;
            if open.number <= after || open.relay.is_none() {
                open.relay = None;
                let (controllers, tls) = (self.mesh.controllers.clone(), identity.client.clone());
                let settled = Arc::new(AtomicBool::new(false));
                let read = |stream| Read::new(stream, Arc::clone(&self.reader), Arc::clone(&settled));
                let relay = Relay::connect_through(controllers, tls, self.way, read).await?;
                *open = Open { number: open.number + 1, relay: Some(relay), owner: index, settled };
            }
            // It was put there, or was there.
            (open.relay.clone(), open.number, open.owner, Arc::clone(&open.settled))
        };
        let relay = relay.ok_or_else(|| CallError::Unreachable("the line is not open".into()))?;
        let channel =
            if owner == index { relay.own() } else { relay.introduce(&identity.tls.current()).await? };
        Ok(Session { number, channel, settled })
    }

    /// Ends its connection, with the last session on it.
    pub(crate) async fn close(&self) {
        self.open.lock().await.relay = None;
    }
}
