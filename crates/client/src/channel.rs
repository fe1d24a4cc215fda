//! A gRPC channel over mTLS to any of several controllers.

use crate::address::ControllerAddress;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// What client and controller agree to speak inside TLS.
pub const ALPN: &[&[u8]] = &[b"h2"];

/// Longest that a controller's host may take to accept. Below a second, after which the first packet would be sent again: once a cut
/// network has healed, the next attempt finds out, and not the one that began before. With the longest
/// [`Backoff`](crate::Backoff) a sidecar is back within two seconds.
const ACCEPT_TIMEOUT: Duration = Duration::from_millis(750);
/// Longest that a controller may take for the handshake. A healthy one takes milliseconds, one to which a whole fleet comes back
/// a second or two; one that is gone shall not hide the next one for long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(4);
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
pub fn channel(controllers: Vec<ControllerAddress>, tls: Arc<ClientConfig>) -> Channel {
    let connector = Arc::new(Connector::new(controllers, tls));
    endpoint().connect_with_connector_lazy(service_fn(move |_| {
        let connector = Arc::clone(&connector);
        async move { connector.connect().await.map(TokioIo::new) }
    }))
}

/// How a connection is kept. The authority is never looked up: the connector knows where the controllers are.
pub(crate) fn endpoint() -> Endpoint {
    Endpoint::from_static("http://controller.weft")
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

pub(crate) struct Connector {
    controllers: Vec<ControllerAddress>,
    tls: TlsConnector,
    last_good: AtomicUsize,
}

impl Connector {
    pub(crate) fn new(controllers: Vec<ControllerAddress>, tls: Arc<ClientConfig>) -> Self {
        Self { controllers, tls: tls.into(), last_good: AtomicUsize::new(0) }
    }

    /// A connection to the first controller that answers.
    pub(crate) async fn connect(&self) -> io::Result<TlsStream<TcpStream>> {
        let first = self.last_good.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for step in 0..self.controllers.len() {
            let index = (first + step) % self.controllers.len();
            let address = &self.controllers[index];
            match self.connect_to(address).await {
                Ok(stream) => {
                    self.last_good.store(index, Ordering::Relaxed);
                    return Ok(stream);
                }
                Err(error) => failures.push(format!("{address}: {error}")),
            }
        }
        Err(io::Error::new(io::ErrorKind::NotConnected, failures.join("; ")))
    }

    async fn connect_to(&self, address: &ControllerAddress) -> io::Result<TlsStream<TcpStream>> {
        let stream = in_time(ACCEPT_TIMEOUT, TcpStream::connect(address.socket())).await?;
        stream.set_nodelay(true)?;
        let socket = SockRef::from(&stream);
        let probes = TcpKeepalive::new().with_time(PROBE_IDLE).with_interval(PROBE_INTERVAL);
        socket.set_tcp_keepalive(&probes.with_retries(PROBES))?;
        socket.set_tcp_user_timeout(Some(UNSEEN_MAX))?;
        in_time(HANDSHAKE_TIMEOUT, self.tls.connect(address.server_name(), stream)).await
    }
}

async fn in_time<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}"));
    timeout(limit, work).await.map_err(late)?
}
