//! How connections of this sidecar go, counted for whoever watches a rollout: what a canary meets with.

use std::sync::atomic::{AtomicU64, Ordering};
use weft_model::CloseReason;
use weft_model::rollout::Evidence;

/// Counts since the process began.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    connections: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    /// Established and not ended.
    live: AtomicU64,
}

impl Tally {
    /// A connection carries bytes.
    pub(crate) fn established(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.live.fetch_add(1, Ordering::Relaxed);
    }

    /// One does not any more, and is opened anew: it will be counted again.
    pub(crate) fn reopening(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
        self.live.fetch_sub(1, Ordering::Relaxed);
    }

    /// A policy forbids a live connection and spares it.
    pub(crate) fn forbidden(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// A connection ended, or never began. `told`: that a policy forbids it was counted before.
    pub(crate) fn ended(&self, reason: CloseReason, established: bool, told: bool) {
        if established {
            self.live.fetch_sub(1, Ordering::Relaxed);
        }
        let wrong = match fault(reason) {
            Some(Fault::Refused) if told => return,
            Some(Fault::Refused) => &self.refused,
            Some(Fault::Failed) if !established => &self.failed,
            // It came to its end, or somebody ended it for reasons that no policy has to do with.
            Some(Fault::Failed) | None => return,
        };
        wrong.fetch_add(1, Ordering::Relaxed);
        if !established {
            self.connections.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Connections that live now.
    pub(crate) fn live(&self) -> u64 {
        self.live.load(Ordering::Relaxed)
    }

    pub(crate) fn totals(&self) -> Evidence {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Evidence {
            connections: read(&self.connections),
            refused: read(&self.refused),
            failed: read(&self.failed),
        }
    }
}

enum Fault {
    /// A policy did it.
    Refused,
    /// Nobody was reached, if it happened before there was a connection.
    Failed,
}

const fn fault(reason: CloseReason) -> Option<Fault> {
    match reason {
        CloseReason::PolicyDenied | CloseReason::PolicyChanged | CloseReason::IdentityRevoked => {
            Some(Fault::Refused)
        }
        CloseReason::TlsFailed
        | CloseReason::CertExpired
        | CloseReason::ConnectTimeout
        | CloseReason::ConnectRefused
        | CloseReason::NoHealthyEndpoint
        | CloseReason::CircuitOpen
        | CloseReason::NoSnapshot
        | CloseReason::Overload
        | CloseReason::Internal => Some(Fault::Failed),
        CloseReason::ClientFin
        | CloseReason::ServerFin
        | CloseReason::ClientReset
        | CloseReason::ServerReset
        | CloseReason::IdleTimeout
        | CloseReason::MaxAge
        | CloseReason::EndpointRemoved
        | CloseReason::DrainDeadline
        | CloseReason::ProxyShutdown => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_connection_counts_once_and_what_went_wrong_with_it() {
        let tally = Tally::default();
        tally.established();
        tally.ended(CloseReason::ClientFin, true, false);
        tally.established();
        assert_eq!(tally.live(), 1);
        tally.ended(CloseReason::PolicyChanged, true, false);
        tally.ended(CloseReason::PolicyDenied, false, false);
        tally.ended(CloseReason::ConnectTimeout, false, false);
        // A client that went away before it was connected says nothing about policies.
        tally.ended(CloseReason::ClientReset, false, false);
        assert_eq!(tally.live(), 0);
        assert_eq!(tally.totals(), Evidence { connections: 4, refused: 2, failed: 1 });
    }

    #[test]
    fn a_connection_that_is_spared_counts_when_it_is_forbidden_and_not_again() {
        let tally = Tally::default();
        tally.established();
        tally.forbidden();
        assert_eq!(tally.totals(), Evidence { connections: 1, refused: 1, failed: 0 });
        tally.ended(CloseReason::PolicyChanged, true, true);
        assert_eq!(tally.totals(), Evidence { connections: 1, refused: 1, failed: 0 });
        assert_eq!(tally.live(), 0);
    }
}
