//! What an app is told of a connection before its first byte: a header of the PROXY protocol, version 2
//! (<https://www.haproxy.org/download/1.8/doc/proxy-protocol.txt>). Off unless asked for, since an app that does not expect it takes it for data.
//!
//! It says where the application that connected really is, as its own sidecar saw it, and who it is: its SPIFFE id, in the field that other
//! meshes use for it too. The first is a claim of the peer's sidecar, the second is proved by its leaf.

use ppp::v2::{Addresses, Builder, Command, IPv4, IPv6, Protocol, Version};
use std::io;
use std::net::{IpAddr, SocketAddr};

/// The field for the SPIFFE id. From the range that the protocol leaves to those who use it; Istio's ztunnel has it there.
const SPIFFE_ID: u8 = 0xd0;

/// The header of a connection from `source`, which is `identity`, to the app at `app`.
///
/// # Errors
/// The id is longer than a field may be, which no leaf's is.
pub(crate) fn proxied(source: SocketAddr, app: SocketAddr, identity: &str) -> io::Result<Vec<u8>> {
    let addresses = match (source.ip(), app.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => Addresses::IPv4(IPv4::new(from, to, source.port(), app.port())),
        (from, to) => Addresses::IPv6(IPv6::new(mapped(from), mapped(to), source.port(), app.port())),
    };
    Builder::with_addresses(Version::Two | Command::Proxy, Protocol::Stream, addresses)
        .write_tlv(SPIFFE_ID, identity.as_bytes())?
        .build()
}

/// The header of a connection that is the sidecar's own: a probe.
///
/// # Errors
/// None that can be: it has no fields.
pub(crate) fn own() -> io::Result<Vec<u8>> {
    Builder::with_addresses(Version::Two | Command::Local, Protocol::Unspecified, Addresses::Unspecified)
        .build()
}

const fn mapped(address: IpAddr) -> std::net::Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ppp::v2::Header;

    const ID: &str = "spiffe://weft.test/ns/default/svc/web/inst/web-1";

    #[test]
    fn an_app_learns_who_connects_and_from_where() {
        let bytes = proxied("10.0.0.7:4000".parse().unwrap(), "127.0.0.1:5432".parse().unwrap(), ID).unwrap();
        // Signature, version 2 and PROXY, TCP over IPv4, length, addresses, ports: as the document has them.
        assert_eq!(&bytes[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x3f");
        assert_eq!(bytes[16..28], [10, 0, 0, 7, 127, 0, 0, 1, 0x0f, 0xa0, 0x15, 0x38]);
        assert_eq!(bytes[28..31], [SPIFFE_ID, 0, 48]);
        assert_eq!(&bytes[31..], ID.as_bytes());
        assert!(Header::try_from(bytes.as_slice()).is_ok());
    }

    #[test]
    fn two_families_become_one() {
        let bytes = proxied("[2001:db8::1]:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap(), ID).unwrap();
        assert_eq!(bytes[13], 0x21);
        assert_eq!(bytes[32..48], std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets());
    }

    #[test]
    fn a_probe_says_that_it_is_nobodys() {
        assert_eq!(own().unwrap(), b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0");
    }
}
