//! What a sidecar has to hand over: every socket that it listens on at the moment. It does not keep them open.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What a socket is for, and the address that was asked for, whose port may be 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Way {
    pub(crate) purpose: String,
    pub(crate) asked: SocketAddr,
}

/// A socket, of whichever kind.
type AnySocket = dyn AsFd + Send + Sync;

/// See the module's documentation.
#[derive(Default)]
pub(crate) struct Offers(Mutex<Vec<(Way, Weak<AnySocket>)>>);

/// A socket, kept open while it is handed over.
pub(crate) struct Offered {
    pub(crate) way: Way,
    pub(crate) socket: Arc<AnySocket>,
}

impl Offers {
    /// Remembers a socket as long as it is open.
    pub(crate) fn add<S: AsFd + Send + Sync + 'static>(&self, way: Way, socket: &Arc<S>) {
        let socket: Weak<S> = Arc::downgrade(socket);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(_, socket)| socket.strong_count() > 0);
        all.push((way, socket));
    }

    /// Those that are open.
    pub(crate) fn live(&self) -> Vec<Offered> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let open = |(way, socket): &(Way, Weak<AnySocket>)| {
            Some(Offered { way: way.clone(), socket: socket.upgrade()? })
        };
        all.iter().filter_map(open).collect()
    }
}

impl fmt::Debug for Offers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.live().iter().map(|offered| &offered.way)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn what_is_closed_is_not_offered() {
        let offers = Offers::default();
        let sockets: Vec<_> = (0..2).map(|_| Arc::new(TcpListener::bind("127.0.0.1:0").unwrap())).collect();
        let addresses: Vec<_> = sockets.iter().map(|socket| socket.local_addr().unwrap()).collect();
        for (socket, asked) in sockets.iter().zip(&addresses) {
            offers.add(Way { purpose: "inbound".to_owned(), asked: *asked }, socket);
        }
        assert_eq!(offers.live().len(), 2);
        drop(sockets);
        assert!(offers.live().is_empty(), "{offers:?}");
        // Not kept open by having been offered.
        assert!(TcpListener::bind(addresses[0]).is_ok() && TcpListener::bind(addresses[1]).is_ok());
    }
}
