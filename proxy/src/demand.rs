//! Upstreams on demand: services that the app may come to need, and of which this sidecar holds nothing until it does.
//!
//! Their local addresses are listened on from the start. The first connection asks a controller to add the service to the instance's
//! upstreams, which is an event like every other, and waits until a snapshot has it; from then on it is an upstream like every other,
//! also after a restart. Which services there are, and whether a policy lets this one connect, is the controller's to say: who may not
//! connect to a service does not learn where it is.
//!
//! Bounded: so many connections wait, and so long. Without a controller they are refused when that is over; what was added before
//! goes on (I5).
//!
//! Called by [`crate::outbound`] for a service that the snapshot lacks. Read `tests/sidecar/demand.rs`.

use crate::config::Upstream;
use crate::connections::Close;
use crate::discovery::Sessions;
use crate::metrics;
use crate::outbound::Target;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout_at};
use weft_client::{CallError, command};
use weft_model::{CloseReason, InstanceId, ServiceName};
use weft_proto::v1;
use weft_proto::v1::mesh_client::MeshClient;
use weft_routing::Snapshot;

/// How long a connection waits for its service. An append, its publication and a pull take some ten milliseconds; a new leader among
/// the controllers takes two seconds.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(5);
/// Connections that wait at once; each holds a socket and little else. More would be an app that retries without end.
const WAITING_MAX: usize = 256;
/// Pause before a controller that could not answer is asked again.
const RETRY: Duration = Duration::from_millis(100);

/// What connections ask.
pub(crate) struct Demand {
    services: BTreeSet<ServiceName>,
    waiting: Semaphore,
    asks: mpsc::Sender<Ask>,
}

struct Ask {
    target: Target,
    /// Told only if the service is refused; whoever is not waits for the snapshot.
    refused: oneshot::Sender<Close>,
}

/// Asks a controller, on behalf of connections.
pub(crate) struct Asker {
    asks: mpsc::Receiver<Ask>,
}

/// For the services that may become upstreams.
pub(crate) fn channel(on_demand: &[Upstream]) -> (Demand, Asker) {
    // Whoever waits has a place, so there is always room.
    let (sender, asks) = mpsc::channel(WAITING_MAX);
    let services = on_demand.iter().map(|upstream| upstream.service.clone()).collect();
    (Demand { services, waiting: Semaphore::new(WAITING_MAX), asks: sender }, Asker { asks })
}

impl Demand {
    /// Whether the service may become an upstream.
    pub(crate) fn may_add(&self, service: &ServiceName) -> bool {
        self.services.contains(service)
    }

    /// Waits until a snapshot has the service.
    ///
    /// # Errors
    /// If it is refused, or does not come in time; or too many wait.
    pub(crate) async fn wait(
        &self,
        target: &Target,
        mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    ) -> Result<(), Close> {
        let Ok(_place) = self.waiting.try_acquire() else {
            let detail = format!("{WAITING_MAX} connections wait for upstreams already");
            return Err(Close::local(CloseReason::Overload, detail));
        };
        let until = Instant::now() + WAIT_MAX;
        let (refused, refusal) = oneshot::channel();
        if self.asks.try_send(Ask { target: target.clone(), refused }).is_err() {
            return Err(Close::local(CloseReason::ProxyShutdown, "this sidecar is stopping"));
        }
        let refusal = async {
            match refusal.await {
                Ok(close) => close,
                // It was added, or nobody could say: the snapshot tells.
                Err(_) => std::future::pending().await,
            }
        };
        let has_it = |snapshot: &Option<Arc<Snapshot>>| {
            snapshot.as_ref().is_some_and(|snapshot| snapshot.endpoints.contains_key(&target.service))
        };
        tokio::select! {
            _ = snapshots.wait_for(has_it) => Ok(()),
            close = refusal => Err(close),
            () = tokio::time::sleep_until(until) => {
                let detail = format!("{} was asked for as an upstream, and is not there after {WAIT_MAX:?}", target.service);
                Err(Close::local(CloseReason::NoSnapshot, detail))
            }
        }
    }
}

impl Asker {
    /// Asks for whatever connections ask for, one service after the other.
    pub(crate) async fn run(mut self, own: InstanceId, mut sessions: Sessions) {
        while let Some(first) = self.asks.recv().await {
            let mut waiting: BTreeMap<Target, Vec<oneshot::Sender<Close>>> = BTreeMap::new();
            let mut next = Some(first);
            // Whoever waits for the same is answered with it.
            while let Some(Ask { target, refused }) = next {
                waiting.entry(target).or_default().push(refused);
                next = self.asks.try_recv().ok();
            }
            for (target, refused) in waiting {
                let Some(close) = ask(&own, &target, &mut sessions).await else { continue };
                for refused in refused {
                    // Who waits no more need not know.
                    let _ = refused.send(close.clone());
                }
            }
        }
    }
}

/// Has a service added. Says why it is refused, if it is.
async fn ask(own: &InstanceId, target: &Target, sessions: &mut Sessions) -> Option<Close> {
    let until = Instant::now() + WAIT_MAX;
    let request = v1::AddUpstreamRequest {
        // Once for all attempts: if an answer is lost, the next attempt gets it.
        meta: Some(command("the app connects to it for the first time")),
        instance: own.to_string(),
        service: target.service.to_string(),
        port: target.port.number().into(),
    };
    loop {
        match timeout_at(until, add(&request, sessions)).await {
            Ok(Ok(())) => {
                metrics::upstream_added("added");
                tracing::info!(service = %target.service, port = %target.port, "an upstream was added");
                return None;
            }
            Ok(Err(error)) => match refusal(target, &error) {
                Some(close) => {
                    metrics::upstream_added("refused");
                    tracing::warn!(service = %target.service, port = %target.port, %error, "not added as an upstream");
                    return Some(close);
                }
                None => tracing::debug!(service = %target.service, %error, "cannot add an upstream now"),
            },
            Err(_) => {
                metrics::upstream_added("failed");
                tracing::warn!(service = %target.service, "no controller adds an upstream within {WAIT_MAX:?}");
                return None;
            }
        }
        sleep(RETRY).await;
    }
}

async fn add(request: &v1::AddUpstreamRequest, sessions: &mut Sessions) -> Result<(), CallError> {
    let session = sessions.wait_for(Option::is_some).await.ok().and_then(|session| session.clone());
    // The sender lives as long as the control tasks, of which this is one.
    let Some(session) = session else { return std::future::pending().await };
    MeshClient::new(session.channel).add_upstream(request.clone()).await?;
    Ok(())
}

/// Why a service is refused for good; none if asking again may help.
fn refusal(target: &Target, error: &CallError) -> Option<Close> {
    match error {
        CallError::Rejected { rule, message, .. } if !rule.is_empty() => {
            Some(Close::local(CloseReason::PolicyDenied, message.clone()).with_rule(rule.to_string()))
        }
        CallError::Rejected { message, .. }
        | CallError::Invalid { message, .. }
        | CallError::NotFound(message)
        | CallError::Denied(message) => {
            let detail = format!("{} cannot become an upstream: {message}", target.service);
            Some(Close::local(CloseReason::NoSnapshot, detail))
        }
        CallError::Unreachable(_)
        | CallError::Conflict { .. }
        | CallError::Overloaded(_)
        | CallError::Unavailable(_)
        | CallError::Other { .. } => None,
    }
}
