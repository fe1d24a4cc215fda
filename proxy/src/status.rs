//! What the control tasks know about themselves, for the admin pages. Nothing decides by it.

use crate::metrics;
use crate::outbound::Target;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use weft_model::{ConfigVersion, Timestamp};

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Status(Mutex<Inner>);

/// The state at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inner {
    /// The newest version that a controller announced for this sidecar.
    pub(crate) wanted: Option<ConfigVersion>,
    /// The log's end, as announced.
    pub(crate) head: Option<ConfigVersion>,
    /// Whether a controller sends notices now.
    pub(crate) connected: bool,
    /// Since when no notice came for two heartbeats.
    pub(crate) stale_since: Option<Timestamp>,
    /// The last failure to reach or understand a controller; none once it worked again.
    pub(crate) control_error: Option<String>,
    /// Why the newest snapshot was refused.
    pub(crate) refused: Option<String>,
    /// What a controller said of a log that lost what this sidecar has seen.
    pub(crate) rewound: Option<String>,
    /// Explicit local addresses.
    pub(crate) listeners: BTreeMap<SocketAddr, Target>,
    /// Loopback addresses of services.
    pub(crate) loopback: BTreeMap<SocketAddr, Target>,
    /// Loopback addresses that cannot be listened on.
    pub(crate) failures: BTreeMap<SocketAddr, String>,
    /// Local addresses that follow from the snapshot were asked for, and the first snapshot's are not there yet.
    pub(crate) addresses_due: bool,
}

impl Status {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy.
    pub(crate) fn read(&self) -> Inner {
        self.lock().clone()
    }

    /// A notice came.
    pub(crate) fn notice(&self, wanted: Option<ConfigVersion>, head: Option<ConfigVersion>) {
        if let Some(wanted) = wanted {
            metrics::config("wanted", wanted);
        }
        metrics::controller(true);
        metrics::stale(false);
        let mut inner = self.lock();
        inner.wanted = wanted;
        inner.head = head;
        inner.connected = true;
        inner.control_error = None;
        if inner.stale_since.take().is_some() {
            tracing::info!("in touch with a controller again");
        }
    }

    /// The stream of notices ended, or could not be opened.
    pub(crate) fn disconnected(&self, error: &str) {
        metrics::controller(false);
        let mut inner = self.lock();
        let new = inner.connected || inner.control_error.is_none();
        inner.connected = false;
        inner.control_error = Some(error.to_owned());
        drop(inner);
        // Repeated attempts fail alike; the first failure and what is different is worth a line.
        if new {
            tracing::warn!(error, "no controller; serving from the last snapshot");
        } else {
            tracing::debug!(error, "still no controller");
        }
    }

    /// No notice came for two heartbeats.
    pub(crate) fn set_stale(&self, now: Timestamp) {
        metrics::stale(true);
        let mut inner = self.lock();
        if inner.stale_since.is_none() {
            inner.stale_since = Some(now);
            tracing::warn!("configuration may be stale: no notice for two heartbeats");
        }
    }

    /// Whether no notice came for two heartbeats.
    pub(crate) fn is_stale(&self) -> bool {
        self.lock().stale_since.is_some()
    }

    /// A controller says that the log lost what this sidecar, or another one, has seen.
    pub(crate) fn set_rewound(&self, error: &str) {
        metrics::log_rewound(true);
        if self.lock().rewound.replace(error.to_owned()).is_none() {
            tracing::error!(error, "LOG_REWOUND: serving from the last snapshot until an operator decides");
        }
    }

    /// A controller takes this sidecar's subscription.
    pub(crate) fn clear_rewound(&self) {
        metrics::log_rewound(false);
        if self.lock().rewound.take().is_some() {
            tracing::info!("the log is what this sidecar has seen again, or an operator decided");
        }
    }

    pub(crate) fn set_refused(&self, error: Option<String>) {
        self.lock().refused = error;
    }

    pub(crate) fn set_listeners(&self, listeners: BTreeMap<SocketAddr, Target>) {
        self.lock().listeners = listeners;
    }

    /// The sidecar is not ready before its loopback addresses were seen to.
    pub(crate) fn expect_loopback(&self) {
        self.lock().addresses_due = true;
    }

    /// What became of the loopback addresses of a snapshot.
    pub(crate) fn set_loopback(
        &self,
        loopback: BTreeMap<SocketAddr, Target>,
        failures: BTreeMap<SocketAddr, String>,
    ) {
        let mut inner = self.lock();
        inner.loopback = loopback;
        inner.failures = failures;
        inner.addresses_due = false;
    }

    /// Whether a service's loopback address cannot be listened on, on any of its ports.
    pub(crate) fn is_taken(&self, address: Ipv4Addr) -> bool {
        self.lock().failures.keys().any(|failed| failed.ip() == address)
    }

    pub(crate) fn listener_failures(&self) -> BTreeMap<SocketAddr, String> {
        self.lock().failures.clone()
    }
}
