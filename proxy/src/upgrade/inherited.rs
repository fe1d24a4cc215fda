//! The sockets that a new process was given. What it needs it takes from here, and opens the rest; what nobody takes is closed.

use super::offers::Way;
use socket2::{Socket, Type};
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

/// A socket that was handed over.
#[derive(Debug)]
struct Handed<S> {
    way: Way,
    bound: SocketAddr,
    socket: S,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    tcp: Vec<Handed<TcpListener>>,
    udp: Vec<Handed<UdpSocket>>,
}

impl Inherited {
    /// Takes a socket in.
    ///
    /// # Errors
    /// If it is none that is listened on.
    pub(crate) fn add(&mut self, way: Way, fd: OwnedFd) -> io::Result<()> {
        let socket = Socket::from(fd);
        socket.set_nonblocking(true)?;
        let bound = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        if socket.r#type()? == Type::STREAM && socket.is_listener()? {
            self.tcp.push(Handed { way, bound, socket: socket.into() });
        } else if socket.r#type()? == Type::DGRAM {
            self.udp.push(Handed { way, bound, socket: socket.into() });
        } else {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(())
    }

    /// The listening sockets for an address; for port 0, those that had been asked for in the same words.
    pub(crate) fn tcp(&mut self, way: &Way) -> Vec<TcpListener> {
        take(&mut self.tcp, way)
    }

    /// The same for datagrams.
    pub(crate) fn udp(&mut self, way: &Way) -> Vec<UdpSocket> {
        take(&mut self.udp, way)
    }
}

fn take<S>(all: &mut Vec<Handed<S>>, wanted: &Way) -> Vec<S> {
    // All on one address: two upstreams may have been asked for in the same words.
    let fits = |handed: &Handed<S>| {
        if wanted.asked.port() == 0 { handed.way == *wanted } else { handed.bound == wanted.asked }
    };
    let Some(address) = all.iter().find(|handed| fits(handed)).map(|handed| handed.bound) else {
        return Vec::new();
    };
    let (taken, left) = std::mem::take(all).into_iter().partition(|handed| handed.bound == address);
    *all = left;
    let taken: Vec<Handed<S>> = taken;
    taken.into_iter().map(|handed| handed.socket).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(purpose: &str, asked: SocketAddr) -> Way {
        Way { purpose: purpose.to_owned(), asked }
    }

    #[test]
    fn each_gets_its_own_and_once() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut inherited = Inherited::default();
        let mut addresses = Vec::new();
        for purpose in ["inbound", "admin"] {
            let listener = TcpListener::bind(any).unwrap();
            addresses.push(listener.local_addr().unwrap());
            inherited.add(way(purpose, any), listener.into()).unwrap();
        }
        let udp = UdpSocket::bind(any).unwrap();
        let dns = udp.local_addr().unwrap();
        inherited.add(way("dns", any), udp.into()).unwrap();

        let got = inherited.tcp(&way("admin", any));
        assert_eq!(got[0].local_addr().unwrap(), addresses[1]);
        assert!(inherited.tcp(&way("admin", any)).is_empty());
        // By the address, whatever it was for.
        assert_eq!(inherited.tcp(&way("redirect", addresses[0])).len(), 1);
        assert_eq!(inherited.udp(&way("dns", dns)).len(), 1);
    }

    #[test]
    fn what_is_not_listened_on_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let connected = std::net::TcpStream::connect(address).unwrap();
        assert!(Inherited::default().add(way("inbound", address), connected.into()).is_err());
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Inherited::default().add(way("inbound", address), file.into()).is_err());
    }
}
