//! Which port is whose. Chosen at the first start, remembered in the home, checked at every start.

use crate::error::StartError;
use crate::home::{Home, write_json};
use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, TcpListener};

/// The first of the ports that a local mesh uses unless told otherwise; the controller's.
pub const BASE_PORT: u16 = 7400;
/// How many ports after the base are for the mesh: room for the fixed ones and a dozen instances.
const PORTS_MAX: u16 = 100;

/// How ports are chosen at the first start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortChoice {
    /// Those of the earlier start, else from [`BASE_PORT`] on.
    Remembered,
    /// From this port on, whatever was used before.
    From(u16),
    /// Those of the earlier start, else free ones, for tests that run beside each other.
    Free,
}

/// The ports of a mesh, by what they are for.
#[derive(Clone, Debug)]
pub(crate) struct Ports {
    home: Home,
    /// Where the next one comes from; free ones if none.
    base: Option<u16>,
    ports: BTreeMap<String, u16>,
}

impl Ports {
    pub(crate) fn choose(home: &Home, choice: PortChoice) -> Result<Self, StartError> {
        let remembered: Option<BTreeMap<String, u16>> =
            std::fs::read(home.ports()).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let (base, ports) = match (choice, remembered) {
            (PortChoice::From(base), Some(ports)) if ports.get("controller") == Some(&base) => {
                (Some(base), ports)
            }
            (PortChoice::From(base), _) => (Some(base), BTreeMap::new()),
            (PortChoice::Remembered, Some(ports)) => {
                (ports.get("controller").copied().or(Some(BASE_PORT)), ports)
            }
            (PortChoice::Remembered, None) => (Some(BASE_PORT), BTreeMap::new()),
            (PortChoice::Free, ports) => (None, ports.unwrap_or_default()),
        };
        if base.is_some_and(|base| base == 0 || base > u16::MAX - PORTS_MAX) {
            let range = format!("choosing ports: --base-port must be from 1 to {}", u16::MAX - PORTS_MAX);
            return Err(StartError::io(range)(io::ErrorKind::InvalidInput.into()));
        }
        Ok(Self { home: home.clone(), base, ports })
    }

    /// The port for something, found if need be, and remembered. It is free now.
    pub(crate) fn reserve(&mut self, what: &str) -> Result<u16, StartError> {
        let port = self.find(what)?;
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                return Err(StartError::PortBusy { port, what: what.to_owned() });
            }
            Err(source) => return Err(StartError::io(format!("trying port {port}"))(source)),
        }
        self.remember(what, port)?;
        Ok(port)
    }

    /// As [`reserve`](Self::reserve), for something that checks by itself whether its port is free.
    pub(crate) fn assign(&mut self, what: &str) -> Result<u16, StartError> {
        let port = self.find(what)?;
        self.remember(what, port)?;
        Ok(port)
    }

    fn find(&self, what: &str) -> Result<u16, StartError> {
        self.ports.get(what).map_or_else(|| self.next(what), |port| Ok(*port))
    }

    fn remember(&mut self, what: &str, port: u16) -> Result<(), StartError> {
        if self.ports.insert(what.to_owned(), port).is_some() {
            return Ok(());
        }
        let path = self.home.ports();
        write_json(&path, &self.ports).map_err(StartError::io(format!("writing {}", path.display())))
    }

    /// The port for something that was reserved before.
    pub(crate) fn get(&self, what: &str) -> u16 {
        self.ports.get(what).copied().unwrap_or_default()
    }

    fn next(&self, what: &str) -> Result<u16, StartError> {
        let Some(base) = self.base else {
            return weft_pgserver::reserve_loopback_port().map_err(StartError::io("finding a free port"));
        };
        let used: Vec<u16> = self.ports.values().copied().collect();
        let free = (base..base + PORTS_MAX).find(|port| !used.contains(port));
        free.ok_or_else(|| {
            StartError::io(format!("finding a port for {what} among {PORTS_MAX}"))(
                io::ErrorKind::AddrInUse.into(),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        (dir, home)
    }

    #[test]
    fn ports_are_remembered() {
        let (_dir, home) = home();
        let mut first = Ports::choose(&home, PortChoice::Free).unwrap();
        let port = first.reserve("controller").unwrap();
        let mut second = Ports::choose(&home, PortChoice::Remembered).unwrap();
        assert_eq!(second.reserve("controller").unwrap(), port);
        assert_eq!(second.get("controller"), port);
    }

    #[test]
    fn a_busy_port_is_named_with_the_way_out() {
        let (_dir, home) = home();
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port().min(u16::MAX - PORTS_MAX);
        // Only if the kernel's port leaves room for a hundred more is it the one to try.
        if port == taken.local_addr().unwrap().port() {
            let mut ports = Ports::choose(&home, PortChoice::From(port)).unwrap();
            let text = ports.reserve("controller").unwrap_err().to_string();
            assert!(text.contains(&port.to_string()) && text.contains("--base-port"), "{text}");
            assert!(!home.ports().exists());
        }
    }

    #[test]
    fn a_base_without_room_is_refused() {
        let (_dir, home) = home();
        assert!(Ports::choose(&home, PortChoice::From(0)).is_err());
        assert!(Ports::choose(&home, PortChoice::From(65_500)).is_err());
    }
}
