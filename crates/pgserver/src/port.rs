//! Free loopback ports.

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};

/// Picks a TCP port on 127.0.0.1 that nothing listens on, and that the kernel will not hand to anyone else for the next
/// minute, so that a child process can bind it.
///
/// The port is left in TIME_WAIT: the kernel skips such ports when it chooses one for a bind to port 0, while a
/// listener that asks for it by number with `SO_REUSEADDR` (tokio, std and PostgreSQL all set it) gets it.
///
/// # Errors
///
/// Fails when the loopback interface has no free port.
pub fn reserve_loopback_port() -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let client = TcpStream::connect(address)?;
    let (accepted, _) = listener.accept()?;
    // The side that closes first keeps the TIME_WAIT, and it has to be the one whose local port this is.
    drop(accepted);
    drop(client);
    Ok(address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_port_can_be_bound_by_number_and_is_not_handed_out_again() {
        let port = reserve_loopback_port().unwrap();
        let others: Vec<u16> = (0..200).map(|_| reserve_loopback_port().unwrap()).collect();
        assert!(!others.contains(&port));
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    }
}
