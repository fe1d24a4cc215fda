//! Accepts connections and finishes their TLS handshakes, so that the services see only peers whose names are proven.
//!
//! Handshakes run beside the accept loop, each under a time limit; how many may be under way is bounded, and the others wait
//! for their turn, in the order in which they came. A fleet that comes back at once is accepted at once: the kernel
//! would drop what its queue does not hold, and those would come again a second later. No work is done for whoever hung up
//! meanwhile. A finished connection carries its [`Peer`](weft_api::caller::Peer), which tonic puts beside every request on it.
//!
//! Nobody is kept who takes nothing: what a connection may leave unread is bounded in bytes and in time, and while it is full,
//! streams on it are told nothing ([`Outlet`]).
//!
//! Connections are bounded, too; whose turn comes when all places are taken is cut off, so that it turns to another
//! controller. Those that wait have no place yet: a fleet that comes back finds its old ones still taken. Those without a
//! certificate are for joining and for health checks, a call or two each: they get a small part of the places, each network
//! a part of that, and end soon ([`places`]).

mod places;

use futures_util::FutureExt as _;
use socket2::SockRef;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::HandshakeKind;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use weft_api::caller::{Introduced, Peer};
use weft_api::outlet::Outlet;
use weft_identity::introduction::binding;
use weft_identity::tls::{HandshakeFault, ResumingServer};

use places::{Place, Places};

/// How long a handshake may take. An honest one takes two round trips.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Handshakes under way. Each costs a signature, so more at once would only make all of them later.
const HANDSHAKES_MAX: usize = 256;
/// Connections that wait for their turn: as many as there are places, a whole fleet's. Each is a socket and a small task.
const WAITING_MAX: usize = places::CONNECTIONS_MAX;
/// Finished connections that wait for the server to take them, which it does at once.
const READY_MAX: usize = 64;
/// How long a connection without a certificate may last: a join takes well under a second, and a client that waits for
/// the control plane makes a new connection as a matter of course.
const STRANGER_AGE_MAX: Duration = Duration::from_secs(30);
/// Connections that the kernel has made and that wait to be accepted; the most that Linux takes unless told otherwise.
const BACKLOG: u32 = 4_096;
/// Above so many bytes that were written and could not be sent yet, a connection takes nothing more: some ten notices. The peer's own system
/// has as many as it is willing to hold by then.
const UNSENT_MAX: u32 = 1 << 10;
/// How long a peer may leave all of that unread, or its network unacknowledged, until it is cut off. Longer than a keepalive goes
/// unanswered: to greet somebody again costs more than to keep it.
const UNREAD_MAX: Duration = Duration::from_secs(30);
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
        tls: ResumingServer,
        drain: CancellationToken,
    ) -> ReceiverStream<io::Result<Connection>> {
        let (ready, connections) = mpsc::channel(READY_MAX);
        tasks.spawn(async move {
            drain.run_until_cancelled(accept(self.socket, tls, ready)).await;
        });
        ReceiverStream::new(connections)
    }
}

async fn accept(socket: TcpListener, tls: ResumingServer, ready: mpsc::Sender<io::Result<Connection>>) {
    let (waiting, handshaking) =
        (Arc::new(Semaphore::new(WAITING_MAX)), Arc::new(Semaphore::new(HANDSHAKES_MAX)));
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
        let Ok(wait) = Arc::clone(&waiting).try_acquire_owned() else {
            count("full");
            continue;
        };
        let (tls, ready, places) = (tls.clone(), ready.clone(), places.clone());
        let turn = Arc::clone(&handshaking).acquire_owned();
        handshakes.spawn(async move {
            let Ok(_turn) = turn.await else { return };
            drop(wait);
            if has_hung_up(&stream) {
                count("hung_up");
                return;
            }
            let Some(place) = places.take() else {
                count("full");
                return;
            };
            if let Some(connection) = handshake(&tls, stream, address, place).await {
                // Only a server that ends does not take it.
                let _ = ready.send(Ok(connection)).await;
            }
        });
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_notsent_lowat(UNSENT_MAX)?;
    socket.set_tcp_user_timeout(Some(UNREAD_MAX))
}

/// Whether whoever waited so long has gone.
fn has_hung_up(stream: &TcpStream) -> bool {
    let readable = stream.ready(Interest::READABLE).now_or_never();
    readable.is_some_and(|ready| ready.is_ok_and(Ready::is_read_closed))
}

fn count(result: &'static str) {
    metrics::counter!("weft_controller_handshakes_total", "result" => result).increment(1);
}

async fn handshake(
    tls: &ResumingServer,
    stream: TcpStream,
    address: SocketAddr,
    mut place: Place,
) -> Option<Connection> {
    let refused = |reason| {
        count(reason);
        None
    };
    if prepare(&stream).is_err() {
        return refused("io");
    }
    let acceptor = TlsAcceptor::from(Arc::clone(tls.config()));
    let stream = match timeout(HANDSHAKE_MAX, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%address, %error, "TLS handshake failed");
            return refused(HandshakeFault::of_io(&error).as_str());
        }
        Err(_) => return refused("timeout"),
    };
    let session = stream.get_ref().1;
    let identity = match tls.admit(session) {
        Ok(identity) => identity,
        Err(error) => {
            tracing::debug!(%address, %error, "a resumed session is refused");
            return refused(HandshakeFault::of_rustls(&error).as_str());
        }
    };
    let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
    let Ok(binding) = binding(session) else { return refused("protocol") };
    let peer = Peer {
        address,
        identity: identity.map(Arc::new),
        binding,
        introduced: Introduced::default(),
        outlet: Outlet::default(),
    };
    let mut ends = None;
    if peer.identity.is_none() {
        if !place.be_stranger(peer.network()) {
            return refused("strangers_full");
        }
        ends = Some(Box::pin(sleep(STRANGER_AGE_MAX)));
    }
    count(if resumed { "resumed" } else { "ok" });
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

impl Connection {
    /// Notes whether the other end takes what is written. TLS holds a little before it says so; a flush, which follows every write, does.
    fn noted<T>(&self, written: Poll<T>) -> Poll<T> {
        self.peer.outlet.set_blocked(written.is_pending());
        written
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.noted(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.noted(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, buffers);
        self.noted(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clock, renewal};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::TlsConnector;
    use tokio_stream::StreamExt;
    use weft_identity::ca::CertificateAuthority;
    use weft_identity::spiffe::Subject;
    use weft_identity::tls::{ClientAuth, ExpectedPeer, TlsIdentity};

    #[tokio::test]
    async fn who_hung_up_is_told_from_who_waits() {
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.socket.accept().await.unwrap();
        client.write_all(b"hello").await.unwrap();
        stream.readable().await.unwrap();
        assert!(!has_hung_up(&stream));
        drop(client);
        // What it said before is still there to be read.
        while !has_hung_up(&stream) {
            tokio::task::yield_now().await;
        }
    }

    /// A connection with somebody whose system takes little that is not read.
    async fn connect(tasks: &mut JoinSet<()>) -> (tokio_rustls::client::TlsStream<TcpStream>, Connection) {
        let authority = CertificateAuthority::create(&"weft.test".parse().unwrap(), clock::now()).unwrap();
        let own = TlsIdentity::new(renewal::own_credential(&authority, &"c1".parse().unwrap()).unwrap());
        let tls = own.resuming_server(ClientAuth::Optional, ExpectedPeer::Any, &[b"h2"]).unwrap();
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let mut connections = listener.run(tasks, tls, CancellationToken::new());

        let web = Subject::Instance("default/web/web-1".parse().unwrap());
        let leaf = authority.issue_credential(&web, clock::now(), Duration::from_secs(3_600)).unwrap();
        let tls = TlsIdentity::new(leaf).client_config(ExpectedPeer::Controller, &[b"h2"]);
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(1 << 10).unwrap();
        let stream = socket.connect(address).await.unwrap();
        let stream = TlsConnector::from(tls).connect("127.0.0.1".try_into().unwrap(), stream).await.unwrap();
        (stream, connections.next().await.unwrap().unwrap())
    }

    #[tokio::test]
    async fn what_is_not_read_is_bounded_and_seen() {
        let mut tasks = JoinSet::new();
        let (mut client, mut connection) = connect(&mut tasks).await;
        let outlet = connection.connect_info().outlet;
        outlet.open().await;
        // Until nothing has moved for a good while of the runtime's time.
        let (mut written, mut stuck) = (0, 0);
        while stuck < 1_000 {
            let some = async {
                let some = connection.write(&[7; 4_096]).await.unwrap();
                written += some;
                connection.flush().await.unwrap();
            };
            stuck = if some.now_or_never().is_some() { 0 } else { stuck + 1 };
            tokio::task::yield_now().await;
        }
        // What TLS holds, the system, and the client's system.
        assert!(written < 256 << 10, "{written}");
        assert!(outlet.open().now_or_never().is_none());

        let mut read = vec![0; written];
        let (read, flushed) = tokio::join!(client.read_exact(&mut read), connection.flush());
        read.unwrap();
        flushed.unwrap();
        outlet.open().await;
    }
}
