//! One outbound connection, top to bottom: the app's connection, an endpoint for it, the tunnel there, bytes.
//!
//! Not a byte of the app is read before a tunnel is open. So the server may speak first, and an attempt that fails may be
//! repeated on another endpoint: nothing that the app said was lost or said twice. If no attempt succeeds the app's
//! connection is reset, because a clean end would look like an empty answer. An endpoint that opens and then resets, before anybody has said
//! anything, failed as well.
//!
//! Called by [`crate::worker`] for each accepted connection.

use crate::connections::{Close, ClosedBy, Connection, Direction, Facts};
use crate::inbound;
use crate::lifetime;
use crate::metrics;
use crate::outlier::{Cause, Step};
use crate::routes::{Load, Near, Source, Unchosen, Way};
use crate::socket;
use crate::tls;
use crate::tunnel::Tunnel;
use crate::tunnel::copy::{self, Ended, Side};
use crate::tunnel::frame::{Frame, FrameError, Open, Refused};
use crate::tunnel::pool::Basis;
use crate::worker::Worker;
use rand::{Rng, RngExt};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use weft_identity::tls::TlsIdentity;
use weft_model::traffic::{Balance, ConnectPolicy, ConnectionPolicy, TrafficPolicy};
use weft_model::{CloseReason, InstanceId, Name, Port, ServiceName};

/// How long a tunnel that was used before may take to answer; then a new one is opened. Far above a round trip and an accept.
const REUSED_ANSWERS: Duration = Duration::from_millis(250);

/// What a local address leads to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Target {
    pub(crate) service: ServiceName,
    pub(crate) port: Port,
}

/// Serves a connection of the app until it ends.
pub(crate) async fn serve(worker: Arc<Worker>, app: TcpStream, source: SocketAddr, target: Arc<Target>) {
    let facts = Facts {
        connection_id: worker.connection_id(),
        source: Some(source),
        source_identity: worker.shared.tls.own_spiffe_id(),
        destination: Some(target.service.clone()),
        port: Some(target.port),
        ..Facts::default()
    };
    let connection = worker.shared.begin(Direction::Outbound, facts);
    let close = match worker.shared.connections.register(&connection) {
        Ok(_registered) => relay(&worker, &connection, app, &target).await.unwrap_or_else(|close| close),
        Err(close) => close,
    };
    connection.finish(close);
}

/// An open tunnel to an endpoint.
struct Opened {
    tunnel: Box<Tunnel>,
    basis: Basis,
    instance: InstanceId,
    address: SocketAddr,
    connect: ConnectPolicy,
    lifetime: ConnectionPolicy,
    /// Counts the connection as one of the endpoint's.
    load: Load,
}

/// Endpoints that failed for this connection.
#[derive(Default)]
struct Tried {
    names: Vec<Name>,
    /// How the last one of them did.
    last: Option<Close>,
}

impl Tried {
    /// One more has failed. Whether another is tried: the policy allows it, there is one, and it is in the budget.
    fn may_go_on(
        &mut self,
        worker: &Worker,
        failed: &InstanceId,
        connect: &ConnectPolicy,
        load: &Load,
    ) -> bool {
        self.names.push(failed.instance.clone());
        let routes = worker.shared.routes();
        let others = routes.as_ref().is_some_and(|routes| routes.has_untried(&failed.service, &self.names));
        if self.names.len() > connect.retries.into() || !others {
            return false;
        }
        let granted = load.service().may_retry(connect, crate::clock::uptime_ms());
        metrics::retry(if granted { "tried" } else { "over_budget" });
        granted
    }
}

/// `app` is reset whenever it is dropped, its listener has seen to that.
async fn relay(
    worker: &Worker,
    connection: &Arc<Connection>,
    app: TcpStream,
    target: &Target,
) -> Result<Close, Close> {
    let mut tried = Tried::default();
    loop {
        // In a place of its own, which is given back: copying may go on for hours, and needs much less.
        let opened = Box::pin(connection.unless_cut(open(worker, connection, target, &mut tried))).await?;
        let Opened { mut tunnel, basis, instance, address, connect, lifetime, mut load } = opened;
        let opened_at = Instant::now();
        connection.established();
        worker.shared.recheck(connection)?;

        let counters = &connection.counters;
        let ended = {
            let copying = pin!(copy::copy(&app, Side::Downstream, &mut tunnel, counters, connection.started));
            let lasting = lifetime::within(&lifetime, counters, connection.started, copying);
            connection.unless_cut(lasting).await
        };
        let answered = counters.first_byte().is_some();
        match ended {
            Ok(ended @ Ended::Cleanly(_)) => {
                load.answered();
                socket::end_on_drop(&app);
                worker.tunnels.put(instance, address, tunnel, basis);
                return Ok(ended.into());
            }
            Ok(ended @ Ended::Broken(Side::Upstream, _)) if !answered => {
                socket::reset_on_drop(tunnel.socket());
                tell(load.failed(Cause::Reset), &instance);
                // Nobody has said anything, and the endpoint did not take long to say no: as if it had not opened.
                let in_time = opened_at.elapsed() < Duration::from_millis(connect.timeout_ms.into());
                let unsaid = counters.total() == 0 && !counters.half_open();
                if !unsaid || !in_time || !tried.may_go_on(worker, &instance, &connect, &load) {
                    return Ok(ended.into());
                }
                connection.reopening();
                tried.last = Some(ended.into());
            }
            ended => {
                if answered {
                    load.answered();
                }
                socket::reset_on_drop(tunnel.socket());
                return ended.map(Into::into);
            }
        }
    }
}

/// Opens a tunnel to one of the service's endpoints: another one for each attempt, within the policy's retries and their budget.
async fn open(
    worker: &Worker,
    connection: &Connection,
    target: &Target,
    tried: &mut Tried,
) -> Result<Opened, Close> {
    let shared = &worker.shared;
    if shared.demand.may_add(&target.service) && shared.lacks(&target.service) {
        shared.demand.wait(target, shared.subscribe()).await?;
    }
    loop {
        let mut attempt = choose(worker, connection, target, tried)?;
        let limit = Duration::from_millis(attempt.connect.timeout_ms.into());
        let result = timeout(limit, connect(worker, connection, target, &attempt)).await;
        let failed = match result {
            Ok(Ok((tunnel, basis))) => {
                metrics::attempt(None);
                tell(attempt.load.opened(), &attempt.instance);
                let Attempt { instance, address, connect, lifetime, load, .. } = attempt;
                return Ok(Opened { tunnel, basis, instance, address, connect, lifetime, load });
            }
            Ok(Err(failed)) => failed,
            Err(_) => Failed::other_may_do(Close::local(
                CloseReason::ConnectTimeout,
                format!("{} at {} did not answer within {limit:?}", attempt.instance, attempt.address),
            )),
        };
        metrics::attempt(Some(failed.close.reason));
        if let Some(cause) = Cause::of(failed.close.reason).filter(|_| failed.retry) {
            tell(attempt.load.failed(cause), &attempt.instance);
        }
        let connect = attempt.connect;
        if !failed.retry || !tried.may_go_on(worker, &attempt.instance, &connect, &attempt.load) {
            return Err(failed.close);
        }
        tried.last = Some(failed.close);
        // It is not one of the endpoint's connections any more, and the next one is not chosen yet.
        drop(attempt.load);
        tokio::time::sleep(worker.with_rng(|rng| backoff(&connect, tried.names.len(), rng))).await;
    }
}

/// How long a retry waits, `retry` counted from 1: any time up to the policy's, which doubles with each, up to ten times.
fn backoff(connect: &ConnectPolicy, retry: usize, rng: &mut impl Rng) -> Duration {
    let doubled = 1_u64 << (retry - 1).min(4);
    let most = u64::from(connect.backoff_ms) * 1_000 * doubled.min(10);
    Duration::from_micros(rng.random_range(0..=most))
}

/// Tells operators what became of an endpoint, and what that rests on.
fn tell(step: Option<Step>, instance: &InstanceId) {
    let Some(step) = step else { return };
    metrics::outlier(&step);
    match step {
        Step::Ejected { from, cause, in_a_row, ejections, length_ms, until: _, share } => {
            let (from, cause) = (from.as_str(), cause.as_str());
            let (ejected, endpoints) =
                share.map_or((None, None), |share| (Some(share.ejected), Some(share.endpoints)));
            tracing::warn!(%instance, cause, in_a_row, from, ejections, length_ms, ejected, endpoints, "an endpoint is ejected: it is passed over while there are others");
        }
        Step::Kept { cause, in_a_row, share } => {
            let (cause, ejected, endpoints) = (cause.as_str(), share.ejected, share.endpoints);
            tracing::debug!(%instance, cause, in_a_row, ejected, endpoints, "an endpoint fails and is not ejected: too many are");
        }
        Step::Returned { from, ejections } => {
            tracing::info!(%instance, from = from.as_str(), ejections, "an endpoint that was ejected works again");
        }
    }
}

/// One attempt: an endpoint, and how it is to be connected to.
struct Attempt {
    instance: InstanceId,
    address: SocketAddr,
    balance: Balance,
    connect: ConnectPolicy,
    lifetime: ConnectionPolicy,
    load: Load,
}

/// Chooses an endpoint from the snapshot of the moment, or says why there is none.
fn choose(
    worker: &Worker,
    connection: &Connection,
    target: &Target,
    tried: &mut Tried,
) -> Result<Attempt, Close> {
    let routes = worker.shared.routes();
    let Some(routes) = routes.as_ref() else {
        return Err(Close::local(CloseReason::NoSnapshot, "this sidecar has no snapshot yet"));
    };
    let mut facts = connection.facts();
    facts.config_version = Some(routes.snapshot.version);
    let Some(shard) = routes.snapshot.endpoints.get(&target.service) else {
        let detail =
            format!("the snapshot has no service {}; is it declared, and an upstream?", target.service);
        return Err(Close::local(CloseReason::NoSnapshot, detail));
    };
    if !shard.has_port(target.port) {
        let detail = format!("{} declares no port {}", target.service, target.port);
        return Err(Close::local(CloseReason::NoSnapshot, detail));
    }
    let own = &worker.shared.own;
    let (policy, _) = shard.traffic_for(&own.service);
    let address = facts.source.map_or(Ipv4Addr::LOCALHOST.into(), |source| source.ip());
    let source = Source { address, own };
    let chosen = worker.with_rng(|rng| routes.choose(&target.service, policy, source, &tried.names, rng));
    let chosen = match chosen {
        Ok(chosen) => chosen,
        // Every endpoint was tried, or there is none.
        Err(Unchosen::NoneLeft) => return Err(tried.last.take().unwrap_or_else(|| no_endpoint(target))),
        Err(Unchosen::Full(limit)) => {
            metrics::circuit_open(limit);
            let detail = format!("{limit} of the traffic policy for {} is reached", target.service);
            return Err(Close::local(CloseReason::CircuitOpen, detail));
        }
    };
    let instance = InstanceId { service: target.service.clone(), instance: chosen.endpoint.instance.clone() };
    facts.endpoint = Some(chosen.endpoint.address);
    facts.endpoint_identity = Some(instance.clone());
    facts.subset = chosen.subset.cloned();
    facts.locality = chosen.near.map(Near::as_str);
    if let Some(near) = chosen.near {
        metrics::locality_pick(near.as_str());
    }
    facts.pick = Some(pick_word(policy.balance, chosen.way, shard.panic, tried));
    if shard.panic {
        metrics::panic_pick();
    }
    facts.attempts += 1;
    // What a former attempt got to know of its endpoint.
    (facts.protocol, facts.tls, facts.key_exchange, facts.tunnel_reused) = (None, None, None, None);
    let TrafficPolicy { balance, connect, connection: lifetime, .. } = *policy;
    let (address, load) = (chosen.endpoint.address, chosen.load);
    Ok(Attempt { instance, address, balance, connect, lifetime, load })
}

/// Why an endpoint was chosen, for the record.
const fn pick_word(balance: Balance, way: Way, panic: bool, tried: &Tried) -> &'static str {
    match (way, tried.names.is_empty(), panic) {
        (Way::Trial, ..) => "trial",
        (Way::LastResort, ..) => "last_resort",
        (Way::Balanced, true, true) => "panic",
        (Way::Balanced, true, false) => balance.as_str(),
        (Way::Balanced, false, _) => "retry",
    }
}

fn no_endpoint(target: &Target) -> Close {
    Close::local(
        CloseReason::NoHealthyEndpoint,
        format!("no instance of {} is ready and healthy", target.service),
    )
}

/// An attempt that failed, and whether another endpoint may do better.
struct Failed {
    close: Close,
    retry: bool,
}

impl Failed {
    const fn other_may_do(close: Close) -> Self {
        Self { close, retry: true }
    }

    const fn for_good(close: Close) -> Self {
        Self { close, retry: false }
    }
}

/// A tunnel to exactly the chosen instance, one that waits or a new one; then OPEN and its answer.
async fn connect(
    worker: &Worker,
    connection: &Connection,
    target: &Target,
    attempt: &Attempt,
) -> Result<(Box<Tunnel>, Basis), Failed> {
    let identity = worker.shared.tls.identity().ok_or_else(|| Failed::for_good(tls::no_identity()))?;
    check_own_leaf(identity).map_err(Failed::for_good)?;
    let now = crate::clock::now();
    let waiting = worker.tunnels.take(&attempt.instance, attempt.address, &identity.current(), now);
    if let Some((mut tunnel, basis)) = waiting {
        let asked = ask(connection, target, attempt, &mut tunnel, &basis, true);
        let limit = REUSED_ANSWERS.min(Duration::from_millis(attempt.connect.timeout_ms.into()) / 3);
        // Otherwise the other end had closed it, is gone, or still has a former stream's bytes to give to an app that does not read
        // them: nobody's fault, and a new one tells more.
        if let Ok(Ok(answer @ (Frame::Opened | Frame::Refused(_)))) = timeout(limit, asked).await {
            return answered(worker, attempt, tunnel, basis, answer);
        }
    }
    let (mut tunnel, basis) = new_tunnel(worker, identity, attempt).await?;
    match ask(connection, target, attempt, &mut tunnel, &basis, false).await {
        Ok(answer) => answered(worker, attempt, tunnel, basis, answer),
        Err(FrameError::Io(error)) => {
            Err(Failed::other_may_do(tls::handshake_failed(Direction::Outbound, &error)))
        }
        Err(error) => Err(nonsense(&error.to_string())),
    }
}

/// What becomes of a tunnel on which OPEN was answered: one that was refused is free for another stream.
fn answered(
    worker: &Worker,
    attempt: &Attempt,
    tunnel: Box<Tunnel>,
    basis: Basis,
    answer: Frame,
) -> Result<(Box<Tunnel>, Basis), Failed> {
    match answer {
        Frame::Opened => Ok((tunnel, basis)),
        Frame::Refused(refused) => {
            worker.tunnels.put(attempt.instance.clone(), attempt.address, tunnel, basis);
            Err(refused_by_peer(worker, refused))
        }
        Frame::Open(_) => Err(nonsense("the peer answered with OPEN")),
    }
}

/// TCP and TLS.
async fn new_tunnel(
    worker: &Worker,
    identity: &TlsIdentity,
    attempt: &Attempt,
) -> Result<(Box<Tunnel>, Basis), Failed> {
    let socket = TcpStream::connect(attempt.address).await.map_err(|error| {
        let detail = format!("{} at {}: {error}", attempt.instance, attempt.address);
        let (reason, by) = match error.kind() {
            // This machine's shortage, which another endpoint may not meet: local ports are counted for each.
            io::ErrorKind::AddrNotAvailable | io::ErrorKind::OutOfMemory => {
                (CloseReason::Overload, ClosedBy::Local)
            }
            io::ErrorKind::TimedOut => (CloseReason::ConnectTimeout, ClosedBy::Server),
            _ => (CloseReason::ConnectRefused, ClosedBy::Server),
        };
        Failed::other_may_do(Close::new(reason, by, detail))
    })?;
    socket::prepare(&socket, attempt.address.ip());
    let connected = worker.connectors.connect(identity, &attempt.instance, socket).await;
    let (tunnel, basis, _) = connected.map_err(Failed::other_may_do)?;
    Ok((tunnel, basis))
}

/// Sends OPEN, and reads what the server's sidecar says to it.
async fn ask(
    connection: &Connection,
    target: &Target,
    attempt: &Attempt,
    tunnel: &mut Tunnel,
    basis: &Basis,
    reused: bool,
) -> Result<Frame, FrameError> {
    let open = {
        let mut facts = connection.facts();
        facts.protocol = Some(inbound::TUNNEL);
        facts.tls = basis.tls;
        facts.key_exchange = basis.key_exchange;
        facts.tunnel_reused = Some(reused);
        Frame::Open(Open {
            service: target.service.clone(),
            port: target.port,
            source: facts.source.unwrap_or(attempt.address),
            connection_id: facts.connection_id,
            version: facts.config_version.unwrap_or_default(),
        })
    };
    let asked = (attempt.balance == Balance::PeakEwma).then(Instant::now);
    tunnel.write(&open).await?;
    let answer = tunnel.read().await?;
    if let (Some(asked), Frame::Opened) = (asked, &answer) {
        attempt.load.measured(asked.elapsed());
    }
    Ok(answer)
}

/// The peer's refusal becomes this end's reason, so that both records say the same.
fn refused_by_peer(worker: &Worker, refused: Refused) -> Failed {
    if let Some(version) = refused.version {
        worker.shared.peer_runs(version);
    }
    let Refused { reason, rule, detail, .. } = refused;
    // A peer refuses, or it ends what was never opened; it cannot say how this end's connection ended.
    let reason = match reason {
        CloseReason::PolicyDenied
        | CloseReason::PolicyChanged
        | CloseReason::IdentityRevoked
        | CloseReason::CertExpired
        | CloseReason::ConnectTimeout
        | CloseReason::ConnectRefused
        | CloseReason::CircuitOpen
        | CloseReason::EndpointRemoved
        | CloseReason::DrainDeadline
        | CloseReason::ProxyShutdown
        | CloseReason::NoSnapshot
        | CloseReason::Overload
        | CloseReason::Internal => reason,
        CloseReason::ClientFin
        | CloseReason::ServerFin
        | CloseReason::ClientReset
        | CloseReason::ServerReset
        | CloseReason::IdleTimeout
        | CloseReason::MaxAge
        | CloseReason::TlsFailed
        | CloseReason::NoHealthyEndpoint => CloseReason::Internal,
    };
    // A policy speaks for the whole service; everything else is about the one endpoint.
    let retry = !matches!(reason, CloseReason::PolicyDenied | CloseReason::PolicyChanged);
    Failed { close: Close { reason, by: ClosedBy::Server, rule, detail }, retry }
}

fn nonsense(detail: &str) -> Failed {
    Failed::other_may_do(Close::new(CloseReason::TlsFailed, ClosedBy::Server, detail))
}

/// No peer would take an expired leaf; saying so at once tells the reason better than their alert.
fn check_own_leaf(identity: &TlsIdentity) -> Result<(), Close> {
    let expires = identity.current().expires_at();
    if crate::clock::now() > expires {
        let detail = format!("this sidecar's leaf expired at {}", crate::clock::rfc3339(expires));
        return Err(Close::local(CloseReason::CertExpired, detail));
    }
    Ok(())
}
