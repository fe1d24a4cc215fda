//! Where a controller is.

use rustls_pki_types::ServerName;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// A controller's address: a host name or IP address, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerAddress {
    host: String,
    port: u16,
    name: ServerName<'static>,
}

/// A text is not a controller's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a controller's address; write HOST:PORT, for example 127.0.0.1:7400")]
pub struct AddressError(String);

impl ControllerAddress {
    /// Whether it is an IPv4 address of this machine that only this machine has.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.host.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback())
    }

    /// For `TcpStream::connect`.
    pub(crate) fn socket(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    /// What is sent as SNI, if it is a name. It proves nothing: a controller is known by its SPIFFE id.
    pub(crate) fn server_name(&self) -> ServerName<'static> {
        self.name.clone()
    }
}

impl FromStr for ControllerAddress {
    type Err = AddressError;

    fn from_str(s: &str) -> Result<Self, AddressError> {
        let error = || AddressError(s.chars().take(80).collect());
        let (host, port) = s.rsplit_once(':').ok_or_else(error)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(error)?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let name = ServerName::try_from(host.to_owned()).map_err(|_| error())?;
        Ok(Self { host: host.to_owned(), port, name })
    }
}

impl fmt::Display for ControllerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_addresses_round_trip() {
        for text in ["127.0.0.1:7400", "[::1]:7400", "controller.internal:443", "localhost:1"] {
            assert_eq!(text.parse::<ControllerAddress>().unwrap().to_string(), text);
        }
        for bad in
            ["", "localhost", "localhost:", ":7400", "localhost:0", "localhost:70000", "a b:1", "http://a:1"]
        {
            assert!(bad.parse::<ControllerAddress>().is_err(), "{bad}");
        }
    }
}
