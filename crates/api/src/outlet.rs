//! Whether a connection takes what is written to it. A listener sees that, and whoever has news for the other end waits until it
//! does: what came meanwhile is then one notice. So a reader that does not keep up has nothing queued for it, however much happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::Notify;

/// A connection's. Clones are of the same one; a new one is open.
#[derive(Clone, Debug, Default)]
pub struct Outlet(Arc<State>);

#[derive(Debug, Default)]
struct State {
    blocked: AtomicBool,
    opened: Notify,
}

impl Outlet {
    /// The connection takes nothing now, or something again.
    pub fn set_blocked(&self, blocked: bool) {
        // As a rule nothing changes, and then nothing is written that others would have to read anew.
        if self.0.blocked.load(Ordering::Acquire) == blocked {
            return;
        }
        self.0.blocked.store(blocked, Ordering::Release);
        if !blocked {
            self.0.opened.notify_waiters();
        }
    }

    /// Until the connection takes something.
    pub async fn open(&self) {
        loop {
            let opened = self.0.opened.notified();
            if !self.0.blocked.load(Ordering::Acquire) {
                return;
            }
            opened.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn whoever_waits_goes_on_when_it_opens() {
        let outlet = Outlet::default();
        outlet.open().await;
        outlet.set_blocked(true);
        let (mut first, mut second) = (Box::pin(outlet.open()), Box::pin(outlet.open()));
        assert!(first.as_mut().now_or_never().is_none() && second.as_mut().now_or_never().is_none());
        outlet.clone().set_blocked(false);
        first.await;
        // It closed again before this one looked.
        outlet.set_blocked(true);
        assert!(second.as_mut().now_or_never().is_none());
        outlet.set_blocked(false);
        second.await;
    }
}
