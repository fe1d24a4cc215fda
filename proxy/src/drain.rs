//! Stopping: withdraw first, then drain, then cut, under one deadline.
//!
//! 1. The controller is told that the instance drains, and peers get a moment to hear of it, while connections are still
//!    accepted: nobody is refused because the news travels.
//! 2. The inbound address is closed, and tunnels that wait for a stream are. The app may still connect out while it finishes what came in.
//! 3. When nothing inbound is left, the local addresses are closed too. What is still live at the deadline is cut,
//!    what is accepted later is refused.
//! 4. The instance leaves the mesh.
//!
//! A process whose place another one has taken ([`crate::upgrade`]) only drains: all its addresses are closed at once, since the other
//! one accepts on the same sockets, and the mesh is told nothing.

use crate::app::Stops;
use crate::connections::Close;
use crate::discovery::Sessions;
use crate::shared::Shared;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use weft_client::{CallError, command};
use weft_model::CloseReason;
use weft_proto::v1;
use weft_proto::v1::mesh_client::MeshClient;

/// How long peers may take to hear that the instance drains: the mesh's default propagation bound.
const WITHDRAWAL: Duration = Duration::from_secs(1);

/// Longest that a call to a controller may take while the sidecar stops. A dead controller shall not hold it up.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);

/// How long connections may take to notice that they are cut. They do nothing else first.
const CUT_TIMEOUT: Duration = Duration::from_secs(1);

/// How often it is looked whether connections are left.
const POLL: Duration = Duration::from_millis(20);

/// What is left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// The instance leaves.
    Mesh,
    /// Another process is the instance's sidecar.
    Place,
}

/// Stops taking connections, lets the live ones end, and cuts those that do not.
pub(crate) async fn drain(
    shared: &Shared,
    sessions: &Sessions,
    stops: &Stops,
    limit: Duration,
    leaving: Leaving,
) {
    let deadline = Instant::now() + limit;
    shared.start_draining();
    tracing::info!(live = shared.connections.live(), ?limit, "stopping");
    match leaving {
        Leaving::Mesh => {
            let withdrawn = timeout_at(deadline, withdraw(shared, sessions)).await.unwrap_or(false);
            if withdrawn && !shared.apps.is_empty() {
                // Without an app nobody was ever sent here.
                sleep(WITHDRAWAL.min(limit / 2)).await;
            }
        }
        Leaving::Place => {
            stops.pages.cancel();
            stops.outbound.cancel();
        }
    }
    stops.inbound.cancel();
    shared.retire.cancel();
    let _ = timeout_at(deadline, until(|| shared.connections.live_inbound() == 0)).await;
    stops.outbound.cancel();
    let _ = timeout_at(deadline, until(|| shared.connections.live() == 0)).await;
    let late = format!("still open {limit:?} after the stop began");
    let cut = shared.connections.close(&Close::local(CloseReason::DrainDeadline, late));
    // Before it leaves: a peer shall see the cut, not an endpoint that vanished.
    let _ = timeout(CUT_TIMEOUT, until(|| shared.connections.live() == 0)).await;
    if leaving == Leaving::Mesh {
        leave(shared, sessions).await;
    }
    tracing::info!(cut, "stopped");
}

async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        sleep(POLL).await;
    }
}

/// Tells the controller that the instance takes no new connections. False if it could not be told.
async fn withdraw(shared: &Shared, sessions: &Sessions) -> bool {
    let Some(session) = sessions.borrow().clone() else { return false };
    let request = v1::DrainInstanceRequest {
        meta: Some(command("the sidecar stops")),
        expected: None,
        instance: shared.own.to_string(),
    };
    let answer = timeout(CALL_TIMEOUT, MeshClient::new(session.channel).drain_instance(request)).await;
    told("drain", answer.map(|answer| answer.map(drop)))
}

async fn leave(shared: &Shared, sessions: &Sessions) {
    let Some(session) = sessions.borrow().clone() else { return };
    let request = v1::DeregisterInstanceRequest {
        meta: Some(command("the sidecar stopped")),
        expected: None,
        instance: shared.own.to_string(),
    };
    let answer = timeout(CALL_TIMEOUT, MeshClient::new(session.channel).deregister_instance(request)).await;
    told("leave", answer.map(|answer| answer.map(drop)));
}

fn told(what: &str, answer: Result<Result<(), tonic::Status>, tokio::time::error::Elapsed>) -> bool {
    match answer {
        Ok(Ok(())) => return true,
        Ok(Err(status)) => tracing::warn!(error = %CallError::from(status), "the mesh was not told: {what}"),
        Err(_) => tracing::warn!("the mesh was not told: {what}: no answer within {CALL_TIMEOUT:?}"),
    }
    false
}
