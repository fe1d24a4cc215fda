//! A gRPC channel over mTLS to any of several controllers.

use crate::address::ControllerAddress;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;
use weft_identity::tls::ResumingClient;

/// What client and controller agree to speak inside TLS.
pub const ALPN: &[&[u8]] = &[b"h2"];

/// Longest that a controller's host may take to accept. Below a second, after which the first packet would be sent again: once a cut
/// network has healed, the next attempt finds out, and not the one that began before. With the longest
/// [`Backoff`](crate::Backoff) a sidecar is back within two seconds.
const ACCEPT_TIMEOUT: Duration = Duration::from_millis(750);
/// Longest that a controller may take for the handshake, where there is another one to turn to: a healthy one takes milliseconds, and one
/// that hangs shall not hide the next one for long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(4);
/// The same of the only one, or the last one to be tried. It may have a whole fleet before this caller, and keeps the order: who goes
/// away and comes back is last again.
const LAST_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a quiet connection is checked, and how long an answer may take: together they bound how long a controller that
/// hangs goes unnoticed.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// The same for the network, which the system checks: a cut is noticed within four seconds. In a shorter one, TCP itself sends what was
/// lost soon enough again, since it waits twice as long each time.
const PROBE_IDLE: Duration = Duration::from_secs(2);
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
const PROBES: u32 = 2;
/// How long sent bytes may wait for the other side to have them.
const UNSEEN_MAX: Duration = Duration::from_secs(4);

/// A channel to the first of `controllers` that answers, starting with the one that answered last. Nothing is
/// connected before the first call. `tls` says who the caller is and what a controller must be; its application
/// protocols must be [`ALPN`].
#[must_use]
pub fn channel(controllers: Vec<ControllerAddress>, tls: impl Into<Tls>) -> Channel {
    let connector = Arc::new(Connector::new(controllers, tls.into()));
    endpoint(Way::default()).connect_with_connector_lazy(service_fn(move |_| {
        let connector = Arc::clone(&connector);
        async move { connector.connect(Way::default(), |stream| stream).await.map(TokioIo::new) }
    }))
}

/// What is special about the connections of a program that plays many machines, or bad ones. Whatever is, IPv4 is used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Way {
    /// The address of this machine that they come from.
    pub from: Option<Ipv4Addr>,
    /// How much may have come and not be read, in bytes; the system rounds it up.
    pub receive_buffer_bytes: Option<u32>,
    /// They stay when the controller does not answer for long, or when its answers are not read.
    pub is_patient: bool,
}

/// How a caller shows who it is.
#[derive(Clone, Debug)]
pub enum Tls {
    /// By a whole handshake each time.
    Whole(Arc<ClientConfig>),
    /// By resuming, where it was before.
    Resuming(ResumingClient),
}

impl From<Arc<ClientConfig>> for Tls {
    fn from(config: Arc<ClientConfig>) -> Self {
        Self::Whole(config)
    }
}

impl From<ResumingClient> for Tls {
    fn from(client: ResumingClient) -> Self {
        Self::Resuming(client)
    }
}

/// How a connection is kept. The authority is never looked up: the connector knows where the controllers are.
pub(crate) fn endpoint(way: Way) -> Endpoint {
    let endpoint = Endpoint::from_static("http://controller.weft");
    if way.is_patient {
        return endpoint;
    }
    endpoint
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

pub(crate) struct Connector {
    controllers: Vec<ControllerAddress>,
    tls: Tls,
    last_good: AtomicUsize,
}

impl Connector {
    pub(crate) const fn new(controllers: Vec<ControllerAddress>, tls: Tls) -> Self {
        Self { controllers, tls, last_good: AtomicUsize::new(0) }
    }

    /// A connection to the first controller that answers, whose bytes go through what `through` makes of it.
    pub(crate) async fn connect<S>(
        &self,
        way: Way,
        through: impl Fn(TcpStream) -> S,
    ) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let first = self.last_good.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for step in 0..self.controllers.len() {
            let index = (first + step) % self.controllers.len();
            let address = &self.controllers[index];
            let is_last = step + 1 == self.controllers.len();
            let patience = if is_last { LAST_HANDSHAKE_TIMEOUT } else { HANDSHAKE_TIMEOUT };
            let connected = async {
                let stream = through(reach(address, way).await?);
                in_time(patience, self.shake_hands(address, stream)).await
            };
            match connected.await {
                Ok(stream) => {
                    self.last_good.store(index, Ordering::Relaxed);
                    return Ok(stream);
                }
                Err(error) => failures.push(format!("{address}: {error}")),
            }
        }
        Err(io::Error::new(io::ErrorKind::NotConnected, failures.join("; ")))
    }

    async fn shake_hands<S>(&self, address: &ControllerAddress, stream: S) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let connect = |config: &Arc<ClientConfig>| {
            TlsConnector::from(Arc::clone(config)).connect(address.server_name(), stream)
        };
        match &self.tls {
            Tls::Whole(config) => connect(config).await,
            Tls::Resuming(client) => {
                let attempt = client.attempt();
                let stream = connect(attempt.config()).await?;
                let admitted = client.admit(&attempt, stream.get_ref().1);
                admitted.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                Ok(stream)
            }
        }
    }
}

async fn reach(address: &ControllerAddress, way: Way) -> io::Result<TcpStream> {
    let stream = if way.from.is_some() || way.receive_buffer_bytes.is_some() {
        in_time(ACCEPT_TIMEOUT, connect_by(way, address)).await?
    } else {
        in_time(ACCEPT_TIMEOUT, TcpStream::connect(address.socket())).await?
    };
    stream.set_nodelay(true)?;
    let socket = SockRef::from(&stream);
    let probes = TcpKeepalive::new().with_time(PROBE_IDLE).with_interval(PROBE_INTERVAL);
    socket.set_tcp_keepalive(&probes.with_retries(PROBES))?;
    socket.set_tcp_user_timeout(Some(UNSEEN_MAX))?;
    Ok(stream)
}

async fn connect_by(way: Way, address: &ControllerAddress) -> io::Result<TcpStream> {
    let to = lookup_host(address.socket()).await?.find(SocketAddr::is_ipv4);
    let to = to.ok_or_else(|| io::Error::new(io::ErrorKind::AddrNotAvailable, "no IPv4 address"))?;
    let socket = TcpSocket::new_v4()?;
    if let Some(bytes) = way.receive_buffer_bytes {
        socket.set_recv_buffer_size(bytes)?;
    }
    if let Some(from) = way.from {
        socket.bind((from, 0).into())?;
    }
    socket.connect(to).await
}

async fn in_time<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}"));
    timeout(limit, work).await.map_err(late)?
}
