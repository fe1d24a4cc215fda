//! The `service` scope: that a service exists, which ports it has and at which virtual address it is reached.

use crate::event::event_family;
use crate::id::{Name, Port, ServiceName};
use crate::rejection::Rejection;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// Most ports of one service. More than any known protocol uses; keeps shards and listener tables small.
pub const PORTS_MAX: usize = 64;

/// A namespace of this name could not be told from the whole mesh in a security scope.
const RESERVED_NAMESPACE: &str = "mesh";

/// One port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServicePort {
    /// What people call it, such as `sql`.
    pub name: Name,
    /// The number that clients connect to.
    pub port: Port,
}

event_family! {
    /// What can happen in a `service` scope.
    ServiceEvent { ServiceDeclared = 1, ServiceDeleted = 1 }
}

/// The service exists and has this shape from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceDeclared {
    /// Its ports; at least one, with distinct names and numbers.
    pub ports: Vec<ServicePort>,
    /// The loopback address it is reached at; if none, the fold gives it one and keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
}

/// The service is no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceDeleted {}

/// What someone wants of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServiceCommand {
    /// Create it, or give it a new shape.
    Declare(ServiceDeclared),
    /// Remove it.
    Delete,
}

/// The service, if it exists.
pub type ServiceState = Option<ServiceDeclared>;

/// Decides a command. That no instance is left and the address is free is checked where all scopes are seen.
///
/// # Errors
/// If the shape makes no sense, or there is nothing to delete.
pub fn decide(
    service: &ServiceName,
    state: &ServiceState,
    command: &ServiceCommand,
) -> Result<Vec<ServiceEvent>, Rejection> {
    match (command, state) {
        (ServiceCommand::Declare(wanted), Some(current)) if wanted == current => Ok(Vec::new()),
        (ServiceCommand::Declare(wanted), _) => {
            validate(service, wanted)?;
            Ok(vec![wanted.clone().into()])
        }
        (ServiceCommand::Delete, Some(_)) => Ok(vec![ServiceDeleted {}.into()]),
        (ServiceCommand::Delete, None) => Err(Rejection::UnknownService(service.clone())),
    }
}

/// The state after an event.
#[must_use]
pub fn apply(_state: ServiceState, event: &ServiceEvent) -> ServiceState {
    match event {
        ServiceEvent::ServiceDeclared(declared) => Some(declared.clone()),
        ServiceEvent::ServiceDeleted(ServiceDeleted {}) => None,
    }
}

/// Whether `address` lies in 127.64.0.0/10, where service addresses live, and can be bound by one host.
#[must_use]
pub fn is_service_address(address: Ipv4Addr) -> bool {
    let [a, b, _, d] = address.octets();
    a == 127 && b & 0b1100_0000 == 64 && d != 0 && d != 255
}

fn validate(service: &ServiceName, declared: &ServiceDeclared) -> Result<(), Rejection> {
    if service.namespace.as_str() == RESERVED_NAMESPACE {
        return Err(Rejection::invalid("name", "no namespace may be called mesh"));
    }
    if declared.ports.is_empty() || declared.ports.len() > PORTS_MAX {
        return Err(Rejection::invalid("ports", format!("a service has 1 to {PORTS_MAX} ports")));
    }
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    for (index, ServicePort { name, port }) in declared.ports.iter().enumerate() {
        if !names.insert(name) {
            return Err(Rejection::invalid(format!("ports[{index}].name"), format!("{name} is there twice")));
        }
        if !numbers.insert(port) {
            return Err(Rejection::invalid(format!("ports[{index}].port"), format!("{port} is there twice")));
        }
    }
    match declared.address {
        Some(address) if !is_service_address(address) => {
            Err(Rejection::invalid("address", "must lie in 127.64.0.0/10 and not end in .0 or .255"))
        }
        Some(_) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn db() -> ServiceName {
        "default/db".parse().unwrap()
    }

    fn declared(ports: &[(&str, u16)]) -> ServiceDeclared {
        let port = |&(name, port): &(&str, u16)| ServicePort {
            name: name.parse().unwrap(),
            port: Port::new(port).unwrap(),
        };
        ServiceDeclared { ports: ports.iter().map(port).collect(), address: None }
    }

    #[test]
    fn declaring_twice_changes_nothing() {
        let wanted = declared(&[("sql", 5432)]);
        let command = ServiceCommand::Declare(wanted.clone());
        assert_eq!(decide(&db(), &None, &command), Ok(vec![wanted.clone().into()]));
        assert_eq!(decide(&db(), &Some(wanted), &command), Ok(vec![]));
    }

    #[test]
    fn shapes_that_make_no_sense_are_refused() {
        let port = |p| ServicePort { name: format!("p{p}").parse().unwrap(), port: Port::new(p).unwrap() };
        let many = ServiceDeclared { ports: (1..=65).map(port).collect(), address: None };
        let outside = Some(Ipv4Addr::new(127, 0, 0, 1));
        for bad in [
            declared(&[]),
            declared(&[("a", 1), ("a", 2)]),
            declared(&[("a", 1), ("b", 1)]),
            many,
            ServiceDeclared { address: outside, ..declared(&[("a", 1)]) },
        ] {
            let result = decide(&db(), &None, &ServiceCommand::Declare(bad.clone()));
            assert!(matches!(result, Err(Rejection::Invalid { .. })), "{bad:?}");
        }
        let reserved = "mesh/db".parse().unwrap();
        assert!(decide(&reserved, &None, &ServiceCommand::Declare(declared(&[("a", 1)]))).is_err());
    }

    #[test]
    fn only_what_exists_can_be_deleted() {
        let state = Some(declared(&[("sql", 5432)]));
        assert_eq!(decide(&db(), &state, &ServiceCommand::Delete), Ok(vec![ServiceDeleted {}.into()]));
        assert_eq!(decide(&db(), &None, &ServiceCommand::Delete), Err(Rejection::UnknownService(db())));
    }
}
