//! The DNS responder: what apps ask for the addresses of services, and everything else besides.
//!
//! `<service>.<namespace>.weft` is answered from the snapshot of the moment with the service's loopback address ([`answer`]); a name that
//! ends in `.weft` is never asked of anybody else, and nobody else's word is taken for one. Every other query goes to the
//! machine's nameservers and comes back as they answered it ([`forward`]), so it can be the only resolver that an app has.
//!
//! It serves the app, not the network. Who asks from elsewhere is not answered at all: an answer, even a refusal, would go to whoever
//! the query claims to come from. Bounded: queries under way, connections, and how long each may take.
//!
//! It runs on the control runtime, beside the other control tasks; a connection's hot path asks no names. Read `tests/sidecar/dns.rs`.

mod answer;
mod forward;

use crate::listeners::Reach;
use crate::metrics;
use crate::shared::Shared;
use crate::socket::{self, ListenError};
use crate::status::Status;
use crate::upgrade::inherited::Inherited;
use crate::upgrade::offers::{Offers, Way};
use answer::{Asked, Question};
use forward::Forwarder;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Connections at once. Resolvers use TCP for what does not fit into a datagram, which is rare, and for one query.
const CONNECTIONS_MAX: usize = 64;

/// How long a connection may take to bring its next query, and to take an answer: RFC 7766 lets a server be short with those that are idle.
const CONNECTION_IDLE: Duration = Duration::from_secs(10);

/// Largest message: a length is 16 bits.
const MESSAGE_MAX: usize = u16::MAX as usize;

/// Pause after a failed receive or accept: not to burn a core while file descriptors are short.
const FAILURE_PAUSE: Duration = Duration::from_millis(10);

/// How often another port is picked because the one that was free for TCP is not for UDP.
const PORTS_TRIED: usize = 16;

/// Where resolvers are listed.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The sockets of the responder, not yet serving.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) address: SocketAddr,
    udp: Arc<UdpSocket>,
    tcp: Arc<TcpListener>,
}

impl Bound {
    /// Lets the sockets be handed over.
    pub(crate) fn offer(&self, asked: SocketAddr, offers: &Offers) {
        offers.add(way(asked), &self.udp);
        offers.add(way(asked), &self.tcp);
    }
}

fn way(asked: SocketAddr) -> Way {
    Way { purpose: "dns".to_owned(), asked }
}

/// The sockets that were inherited; else binds UDP and TCP on one address. Port 0 picks a port that is free for both.
///
/// # Errors
/// If one of them is used, or the address is not this machine's.
pub(crate) fn bind(address: SocketAddr, inherited: &mut Inherited) -> Result<Bound, ListenError> {
    let way = way(address);
    if let (Some(udp), Some(tcp)) = (inherited.udp(&way).pop(), inherited.tcp(&way).pop()) {
        let error = |source| ListenError::Io { address, source };
        return ready(tcp, udp).map_err(error);
    }
    let mut tries = if address.port() == 0 { PORTS_TRIED } else { 1 };
    loop {
        tries -= 1;
        match bind_both(address) {
            Err(ListenError::InUse { .. }) if tries > 0 => {}
            done => return done,
        }
    }
}

fn bind_both(address: SocketAddr) -> Result<Bound, ListenError> {
    let error = |source| ListenError::Io { address, source };
    let tcp = socket::listen(address, NonZeroUsize::MIN)?.pop();
    let tcp = tcp.ok_or_else(|| error(io::ErrorKind::AddrNotAvailable.into()))?;
    let bound = tcp.local_addr().map_err(error)?;
    let udp = std::net::UdpSocket::bind(bound).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse { address: bound },
        _ => ListenError::Io { address: bound, source },
    })?;
    udp.set_nonblocking(true).map_err(error)?;
    ready(tcp, udp).map_err(error)
}

fn ready(tcp: std::net::TcpListener, udp: std::net::UdpSocket) -> io::Result<Bound> {
    let address = tcp.local_addr()?;
    let (udp, tcp) = (UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?);
    Ok(Bound { address, udp: Arc::new(udp), tcp: Arc::new(tcp) })
}

/// The nameservers to forward to: those given, else the machine's, the responder itself left out.
pub(crate) fn upstreams(given: &[SocketAddr], own: SocketAddr) -> Vec<SocketAddr> {
    if !given.is_empty() {
        return given.to_vec();
    }
    let found = forward::nameservers(Path::new(RESOLV_CONF), own).unwrap_or_else(|error| {
        tracing::warn!(%error, "{RESOLV_CONF} cannot be read");
        Vec::new()
    });
    if found.is_empty() {
        tracing::warn!(
            "no nameserver to forward to: only mesh names are answered; give one as --dns-upstream"
        );
    }
    found
}

/// See the module's documentation.
pub(crate) struct Responder {
    shared: Arc<Shared>,
    /// Which services' addresses cannot be listened on, if they have to be.
    status: Option<Arc<Status>>,
    reach: Reach,
    forwarder: Forwarder,
    own: SocketAddr,
}

/// How a query came.
#[derive(Clone, Copy)]
enum Transport {
    Udp,
    Tcp,
}

impl Transport {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

impl Responder {
    /// Serves until `close`, and then what was asked before. `status` tells which addresses are somebody else's; none if connections to them are redirected and
    /// it does not matter.
    pub(crate) async fn run(
        shared: Arc<Shared>,
        status: Option<Arc<Status>>,
        reach: Reach,
        upstreams: Vec<SocketAddr>,
        bound: Bound,
        close: CancellationToken,
    ) {
        let Bound { address: own, udp, tcp } = bound;
        tracing::info!(address = %own, ?upstreams, "answering DNS queries");
        let responder = Arc::new(Self { shared, status, reach, forwarder: Forwarder::new(upstreams), own });
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        // Ended with this future, however it ends.
        let mut work = JoinSet::new();
        let mut buffer = vec![0; MESSAGE_MAX];
        loop {
            tokio::select! {
                () = close.cancelled() => break,
                Some(_) = work.join_next() => {}
                received = udp.recv_from(&mut buffer) => match received {
                    Ok((length, client)) => responder.datagram(&buffer[..length], client, &udp, &mut work),
                    Err(error) => failed(&error).await,
                },
                accepted = tcp.accept() => match accepted {
                    Ok((stream, client)) => responder.connection(stream, client, &places, &mut work),
                    Err(error) => failed(&error).await,
                },
            }
        }
        drop(tcp);
        while work.join_next().await.is_some() {}
    }

    /// Whether a client is on this machine. Who can reach a loopback address is; and the kernel lets nobody else use this machine's own
    /// addresses.
    fn serves(&self, client: SocketAddr) -> bool {
        self.own.ip().is_loopback() || client.ip().is_loopback() || client.ip() == self.own.ip()
    }

    fn datagram(
        self: &Arc<Self>,
        query: &[u8],
        client: SocketAddr,
        udp: &Arc<UdpSocket>,
        work: &mut JoinSet<()>,
    ) {
        if !self.serves(client) {
            metrics::dns_query(Transport::Udp.as_str(), "stranger");
            return;
        }
        // A client that takes no answer asks again; nobody waits for it.
        let question = match self.ask(query) {
            Asked::Nothing(result) => return metrics::dns_query(Transport::Udp.as_str(), result),
            Asked::Answer(answer, result) => {
                metrics::dns_query(Transport::Udp.as_str(), result);
                let _ = udp.try_send_to(&answer, client);
                return;
            }
            Asked::Forward(question) => question,
        };
        let Some(place) = self.place(Transport::Udp) else {
            let _ = udp.try_send_to(&question.failure(), client);
            return;
        };
        let (responder, udp) = (Arc::clone(self), Arc::clone(udp));
        work.spawn(async move {
            let answer = responder.forwarder.by_udp(&question).await;
            let answer = told(answer, &question, Transport::Udp);
            drop(place);
            let _ = udp.send_to(&answer, client).await;
        });
    }

    fn connection(
        self: &Arc<Self>,
        stream: TcpStream,
        client: SocketAddr,
        places: &Arc<Semaphore>,
        work: &mut JoinSet<()>,
    ) {
        if !self.serves(client) {
            return metrics::dns_query(Transport::Tcp.as_str(), "stranger");
        }
        let Ok(place) = Arc::clone(places).try_acquire_owned() else {
            return metrics::dns_query(Transport::Tcp.as_str(), "overload");
        };
        let responder = Arc::clone(self);
        work.spawn(async move {
            // A client that breaks off, or is too slow, has itself to tell.
            let _ = responder.queries(stream).await;
            drop(place);
        });
    }

    /// The queries of a connection, one after the other.
    async fn queries(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let Some(query) = timeout(CONNECTION_IDLE, read_message(&mut stream)).await?? else {
                return Ok(());
            };
            let answer = match self.ask(&query) {
                Asked::Nothing(result) => {
                    metrics::dns_query(Transport::Tcp.as_str(), result);
                    return Ok(());
                }
                Asked::Answer(answer, result) => {
                    metrics::dns_query(Transport::Tcp.as_str(), result);
                    answer
                }
                Asked::Forward(question) => match self.place(Transport::Tcp) {
                    Some(_place) => told(self.forwarder.by_tcp(&question).await, &question, Transport::Tcp),
                    None => question.failure(),
                },
            };
            timeout(CONNECTION_IDLE, write_message(&mut stream, &answer)).await??;
        }
    }

    fn ask(&self, query: &[u8]) -> Asked {
        let taken = |address| self.status.as_ref().is_some_and(|status| status.is_taken(address));
        answer::answer(query, self.shared.snapshot().as_deref(), &self.reach, taken)
    }

    /// Room for a query that is forwarded, if there is.
    fn place(&self, transport: Transport) -> Option<OwnedSemaphorePermit> {
        let place = self.forwarder.place();
        if place.is_none() {
            metrics::dns_query(transport.as_str(), "overload");
        }
        place
    }
}

/// The nameserver's answer, or that there is none.
fn told(answer: Option<Vec<u8>>, question: &Question, transport: Transport) -> Vec<u8> {
    let result = if answer.is_some() { "forwarded" } else { "unanswered" };
    metrics::dns_query(transport.as_str(), result);
    answer.unwrap_or_else(|| question.failure())
}

async fn failed(error: &io::Error) {
    tracing::debug!(%error, "a DNS query cannot be taken");
    sleep(FAILURE_PAUSE).await;
}

/// A message with its length before it; none at the end of the stream.
async fn read_message(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

/// In one piece, as some clients expect it.
async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut bytes = Vec::with_capacity(message.len() + 2);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(message);
    stream.write_all(&bytes).await
}
