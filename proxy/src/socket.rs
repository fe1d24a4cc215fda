//! Everything that is set on sockets: how listeners are shared among threads, keepalive, resets. All use of `socket2`
//! is here.
//!
//! A listener is one socket per data-plane thread on the same address (`SO_REUSEPORT`); the kernel spreads connections
//! over them. That option would also let *another* process listen on the address and take a share of its connections, so
//! the first socket is bound and listens without it, and is opened up to its siblings afterwards. Binding alone proves
//! nothing: with `SO_REUSEADDR` two sockets may both be bound until one listens. The address is held throughout.

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener};
use std::num::NonZeroUsize;
use std::time::Duration;
use tokio::net::TcpStream;

/// Connections that the kernel holds for a thread until it accepts them. Above what arrives while a thread is busy for
/// some milliseconds; the kernel cuts it to its own limit.
const BACKLOG: i32 = 4096;

/// When a quiet connection is asked whether it is alive, how often again, and how many unanswered questions end it: a
/// vanished peer is noticed within two minutes, and state in NAT boxes, which live five minutes or more, is kept.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// How long what was sent may stay unacknowledged: as long as a quiet peer has. The system's own limit is a quarter of an hour,
/// and while a peer has data to acknowledge it is not asked whether it is alive. It holds for a peer that lives and takes nothing, too:
/// the kernel counts its full window as unacknowledged.
const USER_TIMEOUT: Duration = Duration::from_secs(120);

/// An address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody listens there.
    #[error(
        "address {address} is already used; stop the process that listens there (`ss -ltnp 'sport = :{}'` shows it) or give another address",
        address.port()
    )]
    InUse {
        /// The address.
        address: SocketAddr,
    },
    /// The operating system refused for another reason.
    #[error("cannot listen on {address}")]
    Io {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// `count` listeners on the same address, for as many threads. Port 0 picks a free port, the same for all.
///
/// # Errors
/// If another process listens there, or the address is not this machine's.
pub(crate) fn listen(address: SocketAddr, count: NonZeroUsize) -> Result<Vec<TcpListener>, ListenError> {
    let error = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse { address },
        _ => ListenError::Io { address, source },
    };
    let listening = |address, shared| {
        let socket = bound(address, shared)?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    };
    let first = listening(address, false).map_err(error)?;
    let address = first.local_addr().map_err(error)?.as_socket().unwrap_or(address);
    let siblings = count.get() - 1;
    if siblings > 0 {
        first.set_reuse_port(true).map_err(error)?;
    }
    let mut sockets = vec![first.into()];
    for _ in 0..siblings {
        sockets.push(listening(address, true).map_err(error)?.into());
    }
    Ok(sockets)
}

/// Sockets that another process listened on, brought to `count` if they are fewer. More are all kept: connections wait in each of them.
///
/// # Errors
/// If a sibling is refused.
pub(crate) fn adopt(
    mut sockets: Vec<TcpListener>,
    count: NonZeroUsize,
) -> Result<Vec<TcpListener>, ListenError> {
    let Some(first) = sockets.first() else { return Ok(sockets) };
    let Ok(address) = first.local_addr() else { return Ok(sockets) };
    let error = |source| ListenError::Io { address, source };
    let missing = count.get().saturating_sub(sockets.len());
    if missing > 0 {
        SockRef::from(first).set_reuse_port(true).map_err(error)?;
    }
    for _ in 0..missing {
        let socket = bound(address, true).map_err(error)?;
        socket.listen(BACKLOG).map_err(error)?;
        sockets.push(socket.into());
    }
    Ok(sockets)
}

fn bound(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Connections of an earlier life that are still closing do not keep the address.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Prepares a connection of the data path with this peer: no delay for small writes, and a peer that vanished is noticed; one on this
/// machine cannot. What is set on a listener holds for the connections that it accepts.
pub(crate) fn prepare<'s>(socket: impl Into<SockRef<'s>>, peer: IpAddr) {
    let socket = socket.into();
    // All fail only on a socket that is broken already, which the next read says better.
    let _ = socket.set_tcp_nodelay(true);
    if !peer.is_loopback() {
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_PROBES);
        let _ = socket.set_tcp_keepalive(&keepalive);
        let _ = socket.set_tcp_user_timeout(Some(USER_TIMEOUT));
    }
}

/// Makes the connection end with a reset whenever and for whatever reason it is dropped, a panic and the end of the
/// process included, so that the other end cannot take it for a clean end of the stream (I9). On a listener, for every connection that
/// it accepts.
pub(crate) fn reset_on_drop<'s>(socket: impl Into<SockRef<'s>>) {
    let _ = socket.into().set_linger(Some(Duration::ZERO));
}

/// Everything was said: what is on its way is delivered, and the end is clean.
pub(crate) fn end_on_drop(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(None);
}

/// No more is said on this connection; the other end may go on.
///
/// # Errors
/// If the connection broke.
pub(crate) fn end_sending(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).shutdown(Shutdown::Write)
}

/// Where a connection was meant to go before the kernel redirected it; where it came, if the kernel tracks it and did not.
///
/// # Errors
/// If the kernel does not know.
pub(crate) fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let address =
        if stream.local_addr()?.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    address?.as_socket().ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: NonZeroUsize = NonZeroUsize::new(2).unwrap();

    #[test]
    fn threads_share_an_address_and_strangers_are_told() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listeners = listen(any, TWO).unwrap();
        let address = listeners[0].local_addr().unwrap();
        assert_eq!(listeners[1].local_addr().unwrap(), address);

        let error = listen(address, TWO).unwrap_err();
        assert!(error.to_string().starts_with(&format!("address {address} is already used; ")), "{error}");
        drop(listeners);
        assert!(listen(address, TWO).is_ok());
    }

    #[test]
    fn adopted_sockets_are_enough_for_every_thread_and_none_is_closed() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        for (had, want, get) in [(1, 3, 3), (3, 1, 3), (2, 2, 2)] {
            let old = listen(any, NonZeroUsize::new(had).unwrap()).unwrap();
            let address = old[0].local_addr().unwrap();
            let adopted = adopt(old, NonZeroUsize::new(want).unwrap()).unwrap();
            assert_eq!(adopted.len(), get);
            assert!(adopted.iter().all(|socket| socket.local_addr().unwrap() == address));
        }
    }

    #[test]
    fn of_many_who_want_an_address_at_once_one_gets_it() {
        let free = || listen(SocketAddr::from(([127, 0, 0, 1], 0)), TWO).unwrap()[0].local_addr().unwrap();
        for _ in 0..200 {
            let address = free();
            let start = std::sync::Barrier::new(2);
            let got: Vec<_> = std::thread::scope(|scope| {
                let race = || {
                    start.wait();
                    listen(address, TWO)
                };
                let racers = [scope.spawn(race), scope.spawn(race)];
                racers.into_iter().filter_map(|racer| racer.join().unwrap().ok()).collect()
            });
            assert!(got.len() <= 1, "two have {address}");
        }
    }

    #[test]
    fn every_listener_of_an_address_gets_connections() {
        let listeners = listen(SocketAddr::from(([127, 0, 0, 1], 0)), TWO).unwrap();
        let address = listeners[0].local_addr().unwrap();
        let accepted = |listener: &TcpListener| listener.accept().is_ok();
        let mut seen = [false; 2];
        // Which listener the kernel picks depends on the client's port; 2^-200 is never.
        for _ in 0..200 {
            let _client = std::net::TcpStream::connect(address).unwrap();
            for (seen, listener) in seen.iter_mut().zip(&listeners) {
                *seen |= accepted(listener);
            }
        }
        assert_eq!(seen, [true; 2]);
    }

    #[tokio::test]
    async fn a_vanished_peer_is_noticed_on_connections_of_both_ways() {
        let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0)), TWO).unwrap().remove(0);
        let far = IpAddr::from([192, 0, 2, 1]);
        prepare(&listener, far);
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let connected = TcpStream::connect(listener.local_addr().unwrap());
        let (accepted, connected) = tokio::join!(listener.accept(), connected);
        let (accepted, connected) = (accepted.unwrap().0, connected.unwrap());
        prepare(&connected, far);
        for socket in [SockRef::from(&accepted), SockRef::from(&connected)] {
            assert!(socket.keepalive().unwrap() && socket.tcp_nodelay().unwrap());
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(USER_TIMEOUT));
            let asked = KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_PROBES;
            assert_eq!(asked, USER_TIMEOUT, "else the one would end what the other still asks about");
        }
    }

    #[test]
    fn an_address_of_another_machine_is_refused_as_such() {
        let error = listen(SocketAddr::from(([192, 0, 2, 1], 1)), TWO).unwrap_err();
        assert!(matches!(error, ListenError::Io { .. }), "{error}");
    }
}
