//! Accepts connections and finishes their TLS handshakes, so that the services see only peers whose names are proven.
//!
//! Handshakes run beside the accept loop, each under a time limit; how many may be under way is bounded, and the others wait
//! for their turn, in the order in which they came. A fleet that comes back at once is accepted at once: the kernel
//! would drop what its queue does not hold, and those would come again a second later. A finished connection carries its
//! [`Peer`](weft_api::caller::Peer), which tonic puts beside every request on it.
//!
//! Connections are bounded, too; who comes when all places are taken is cut off at once, so that it turns to another
//! controller. Those without a certificate are for joining and for health checks, a call or two each: they get a small
//! part of the places, each network a part of that, and end soon ([`places`]).

mod places;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use weft_api::caller::{Introduced, Peer};
use weft_identity::introduction::binding;
use weft_identity::tls::{HandshakeFault, peer_identity};

use places::{Place, Places};

/// How long a handshake may take. An honest one takes two round trips.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Handshakes under way. Each costs a signature, so more at once would only make all of them later.
const HANDSHAKES_MAX: usize = 256;
/// Finished connections that wait for the server to take them, which it does at once.
const READY_MAX: usize = 64;
/// How long a connection without a certificate may last: a join takes well under a second, and a client that waits for
/// the control plane makes a new connection as a matter of course.
const STRANGER_AGE_MAX: Duration = Duration::from_secs(30);
/// Connections that the kernel has made and that wait to be accepted; the most that Linux takes unless told otherwise.
const BACKLOG: u32 = 4_096;
/// Pause after the system refused to accept, for want of file descriptors as a rule.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// A listener that is bound and not yet running.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
}

impl Listener {
    /// Binds.
    ///
    /// # Errors
    /// What the system says, such as that the address is in use.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // As a listener's address is taken over from one that ended just now.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        Ok(Self { socket: socket.listen(BACKLOG)? })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Accepts until `drain`. The stream yields connections whose handshake is done, and ends with it.
    #[must_use]
    pub fn run(
        self,
        tasks: &mut JoinSet<()>,
        acceptor: TlsAcceptor,
        drain: CancellationToken,
    ) -> ReceiverStream<io::Result<Connection>> {
        let (ready, connections) = mpsc::channel(READY_MAX);
        tasks.spawn(async move {
            drain.run_until_cancelled(accept(self.socket, acceptor, ready)).await;
        });
        ReceiverStream::new(connections)
    }
}

async fn accept(socket: TcpListener, acceptor: TlsAcceptor, ready: mpsc::Sender<io::Result<Connection>>) {
    let handshaking = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let places = Places::new();
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        let (stream, address) = match socket.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Some(place) = places.take() else {
            count("full");
            continue;
        };
        let (acceptor, ready) = (acceptor.clone(), ready.clone());
        let turn = Arc::clone(&handshaking).acquire_owned();
        handshakes.spawn(async move {
            let Ok(_turn) = turn.await else { return };
            if let Some(connection) = handshake(&acceptor, stream, address, place).await {
                // Only a server that ends does not take it.
                let _ = ready.send(Ok(connection)).await;
            }
        });
    }
}

fn count(result: &'static str) {
    metrics::counter!("weft_controller_handshakes_total", "result" => result).increment(1);
}

async fn handshake(
    acceptor: &TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    mut place: Place,
) -> Option<Connection> {
    let refused = |reason| {
        count(reason);
        None
    };
    if stream.set_nodelay(true).is_err() {
        return refused("io");
    }
    let stream = match timeout(HANDSHAKE_MAX, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%address, %error, "TLS handshake failed");
            return refused(HandshakeFault::of_io(&error).as_str());
        }
        Err(_) => return refused("timeout"),
    };
    let session = stream.get_ref().1;
    // The verifier let it pass, so what is there reads back.
    let Ok(identity) = peer_identity(session.peer_certificates()) else {
        return refused("peer_untrusted");
    };
    let Ok(binding) = binding(session) else { return refused("protocol") };
    let peer = Peer { address, identity: identity.map(Arc::new), binding, introduced: Introduced::default() };
    let mut ends = None;
    if peer.identity.is_none() {
        if !place.be_stranger(peer.network()) {
            return refused("strangers_full");
        }
        ends = Some(Box::pin(sleep(STRANGER_AGE_MAX)));
    }
    count("ok");
    Some(Connection { stream, peer, ends, _place: place })
}

/// A connection whose peer is known.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    /// When a connection without a certificate is cut.
    ends: Option<Pin<Box<Sleep>>>,
    _place: Place,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // A server that has nothing else to do on a connection waits here.
        if let Some(ends) = &mut self.ends
            && ends.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
