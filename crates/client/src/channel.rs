//! A gRPC channel over mTLS to any of several controllers.

use crate::address::ControllerAddress;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
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

/// Longest that TCP and TLS may take to one controller. A healthy one answers in milliseconds; a host that is gone
/// shall not hide the next one for long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a quiet connection is checked, and how long an answer may take: together they bound how long a dead
/// controller goes unnoticed.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

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
            match timeout(CONNECT_TIMEOUT, self.connect_to(address)).await {
                Ok(Ok(stream)) => {
                    self.last_good.store(index, Ordering::Relaxed);
                    return Ok(stream);
                }
                Ok(Err(error)) => failures.push(format!("{address}: {error}")),
                Err(_) => failures.push(format!("{address}: no answer within {CONNECT_TIMEOUT:?}")),
            }
        }
        Err(io::Error::new(io::ErrorKind::NotConnected, failures.join("; ")))
    }

    async fn connect_to(&self, address: &ControllerAddress) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(address.socket()).await?;
        stream.set_nodelay(true)?;
        self.tls.connect(address.server_name(), stream).await
    }
}
