//! How DNS spells services: `<service>.<namespace>.weft`, and one of a service's ports `<port>.<service>.<namespace>.weft`, where the
//! port is its name or its number. What the mesh's certificates name, standard TLS clients ask for and responders answer.

use crate::id::{Name, Port, ServiceName};
use std::fmt;
use std::str::FromStr;

/// The zone of all meshes. No public name ends in it.
pub const ZONE: &str = "weft";

/// A service, or a port of one, as DNS spells it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DnsName {
    /// The service.
    pub service: ServiceName,
    /// Which of its ports; none if that is not said.
    pub port: Option<PortLabel>,
}

/// A port, as one label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PortLabel {
    /// By the name that its service gives it.
    Named(Name),
    /// By its number. Names begin with a letter, so this is no name.
    Number(Port),
}

/// A text names no service of a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not written <service>.<namespace>.weft or <port>.<service>.<namespace>.weft")]
pub struct DnsNameError;

impl DnsName {
    /// A service's name.
    #[must_use]
    pub const fn of(service: ServiceName) -> Self {
        Self { service, port: None }
    }

    /// The pattern that covers the names of all ports of a service, as certificates have it (RFC 6125, section 6.4.3).
    #[must_use]
    pub fn ports_of(service: &ServiceName) -> String {
        format!("*.{}", Self::of(service.clone()))
    }
}

impl FromStr for DnsName {
    type Err = DnsNameError;

    /// Case is ignored, as everywhere in DNS.
    fn from_str(s: &str) -> Result<Self, DnsNameError> {
        let lower = s.to_ascii_lowercase();
        let mut labels = lower.rsplit('.');
        let mut next = || labels.next();
        let (zone, namespace, name, port, more) = (next(), next(), next(), next(), next());
        if zone != Some(ZONE) || more.is_some() {
            return Err(DnsNameError);
        }
        let namespace = namespace.and_then(|label| label.parse().ok()).ok_or(DnsNameError)?;
        let name = name.and_then(|label| label.parse().ok()).ok_or(DnsNameError)?;
        let port = port.map(str::parse).transpose()?;
        Ok(Self { service: ServiceName { namespace, name }, port })
    }
}

impl FromStr for PortLabel {
    type Err = DnsNameError;

    fn from_str(s: &str) -> Result<Self, DnsNameError> {
        // One spelling of a number: no sign, no zero before it.
        let number = s.parse().ok().and_then(Port::new).filter(|port| port.to_string() == s);
        let named = || s.parse().map(Self::Named).map_err(|_| DnsNameError);
        number.map_or_else(named, |port| Ok(Self::Number(port)))
    }
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(port) = &self.port {
            write!(f, "{port}.")?;
        }
        write!(f, "{}.{}.{ZONE}", self.service.name, self.service.namespace)
    }
}

impl fmt::Display for PortLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => fmt::Display::fmt(name, f),
            Self::Number(port) => fmt::Display::fmt(port, f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_read_has_one_spelling(text in "[a-z0-9.*_-]{0,12}(\\.[a-z0-9-]{1,5}){0,3}(\\.weft)?|\\PC{0,20}") {
            if let Ok(name) = text.parse::<DnsName>() {
                prop_assert_eq!(name.to_string(), text.to_ascii_lowercase());
            }
        }
    }

    #[test]
    fn names_are_read_back_as_they_are_written() {
        for text in ["db.default.weft", "sql.db.default.weft", "5432.db.default.weft", "weft.weft.weft.weft"]
        {
            assert_eq!(text.parse::<DnsName>().unwrap().to_string(), text);
        }
        let name: DnsName = "SQL.Db.default.WEFT".parse().unwrap();
        assert_eq!(name.to_string(), "sql.db.default.weft");
        assert_eq!(name.service.to_string(), "default/db");
        assert_eq!(DnsName::ports_of(&name.service), "*.db.default.weft");
        assert_eq!("5432".parse(), Ok(PortLabel::Number(Port::new(5432).unwrap())));
    }

    #[test]
    fn what_names_no_service_is_refused() {
        for text in [
            "",
            "weft",
            "default.weft",
            "db.default",
            "db.default.weft.",
            ".db.default.weft",
            "a.sql.db.default.weft",
            "db.default.example",
            "0.db.default.weft",
            "05432.db.default.weft",
            "65536.db.default.weft",
            "+1.db.default.weft",
            "*.db.default.weft",
            "s_l.db.default.weft",
            "127.0.0.1",
        ] {
            assert_eq!(text.parse::<DnsName>(), Err(DnsNameError), "{text}");
        }
    }
}
