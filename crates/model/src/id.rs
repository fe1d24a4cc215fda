//! Names of things in the mesh. Every name is checked when it is made, so a value of these types is always
//! safe to put in a DNS name, a SPIFFE id, a file name or a log line.

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;
use std::num::NonZeroU16;
use std::str::FromStr;
use std::sync::Arc;

/// The namespace that a bare service name belongs to.
pub const DEFAULT_NAMESPACE: &str = "default";

/// Longest name: what fits one DNS label (RFC 1035, 2.3.4).
const LABEL_BYTES_MAX: usize = 63;

/// A text is not a valid name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {what}: {rule}")]
pub struct IdError {
    text: String,
    what: &'static str,
    rule: &'static str,
}

impl IdError {
    fn new(text: &str, what: &'static str, rule: &'static str) -> Self {
        // A hostile name may be long: keep what a person needs to find it.
        Self { text: text.chars().take(80).collect(), what, rule }
    }
}

const LABEL_RULE: &str = "1 to 63 of a-z, 0-9 and -, starting with a letter and not ending with -";

fn is_label(s: &str) -> bool {
    s.len() <= LABEL_BYTES_MAX
        && s.starts_with(|c: char| c.is_ascii_lowercase())
        && !s.ends_with('-')
        && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Implements serde for a type that is written as its `Display` text.
macro_rules! serde_as_text {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_str($crate::id::FromText(std::marker::PhantomData))
            }
        }
    };
}
pub(crate) use serde_as_text;

/// Reads a value from text where it stands, without a copy of the text.
pub(crate) struct FromText<T>(pub(crate) PhantomData<T>);

impl<T: FromStr<Err: fmt::Display>> Visitor<'_> for FromText<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

/// Declares a name that is one DNS label.
macro_rules! label {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(s: &str) -> Result<Self, IdError> {
                if is_label(s) { Ok(Self(s.into())) } else { Err(IdError::new(s, $what, LABEL_RULE)) }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        serde_as_text!($name);
    };
}

label! {
    /// A group of services, `default` unless said otherwise.
    Namespace, "namespace"
}
label! {
    /// A name inside a namespace, of a service, an instance, a port or a rule.
    Name, "name"
}

/// A service: what a client wants to reach. Written `<namespace>/<name>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    /// The namespace it lives in.
    pub namespace: Namespace,
    /// Its name in the namespace.
    pub name: Name,
}

impl ServiceName {
    /// The smallest name that a service of `namespace` can have, to start a range over its services.
    #[must_use]
    pub fn first_of(namespace: &Namespace) -> Self {
        // No label is smaller.
        Self { namespace: namespace.clone(), name: Name("a".into()) }
    }

    /// Reads `<namespace>/<name>`, or a bare `<name>` in the default namespace, as people type it.
    pub fn parse_lenient(s: &str) -> Result<Self, IdError> {
        if s.contains('/') { s.parse() } else { format!("{DEFAULT_NAMESPACE}/{s}").parse() }
    }
}

impl FromStr for ServiceName {
    type Err = IdError;

    fn from_str(s: &str) -> Result<Self, IdError> {
        let (namespace, name) =
            s.split_once('/').ok_or_else(|| IdError::new(s, "service", "written <namespace>/<name>"))?;
        Ok(Self { namespace: namespace.parse()?, name: name.parse()? })
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

serde_as_text!(ServiceName);

/// One running instance of a service. Written `<namespace>/<service>/<instance>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId {
    /// The service it runs.
    pub service: ServiceName,
    /// Its name among the service's instances.
    pub instance: Name,
}

impl FromStr for InstanceId {
    type Err = IdError;

    fn from_str(s: &str) -> Result<Self, IdError> {
        let (service, instance) = s
            .rsplit_once('/')
            .ok_or_else(|| IdError::new(s, "instance", "written <namespace>/<service>/<instance>"))?;
        Ok(Self { service: service.parse()?, instance: instance.parse()? })
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.service, self.instance)
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

serde_as_text!(InstanceId);

/// A port of a service, as clients name it; not where the app happens to listen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Port(NonZeroU16);

impl Port {
    /// A port, unless it is zero.
    #[must_use]
    pub const fn new(port: u16) -> Option<Self> {
        match NonZeroU16::new(port) {
            Some(port) => Some(Self(port)),
            None => None,
        }
    }

    /// The number.
    #[must_use]
    pub const fn number(self) -> u16 {
        self.0.get()
    }
}

impl FromStr for Port {
    type Err = IdError;

    fn from_str(s: &str) -> Result<Self, IdError> {
        s.parse().map(Self).map_err(|_| IdError::new(s, "port", "a number from 1 to 65535"))
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The name that all identities of a mesh start with, like a DNS name: `weft.local`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = IdError;

    fn from_str(s: &str) -> Result<Self, IdError> {
        let valid = s.len() <= 253 && s.split('.').all(is_label);
        if valid { Ok(Self(s.into())) } else { Err(IdError::new(s, "trust domain", "labels joined by dots")) }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

serde_as_text!(TrustDomain);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "api", "api-1", "a0"] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        let long = "a".repeat(64);
        for bad in ["", "A", "-a", "a-", "1a", "a_b", "a.b", "a/b", "é", "a\n", long.as_str()] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_bare_service_name_is_in_the_default_namespace() {
        assert_eq!(ServiceName::parse_lenient("db").unwrap().to_string(), "default/db");
        assert_eq!(ServiceName::parse_lenient("shop/db").unwrap().to_string(), "shop/db");
        assert!("db".parse::<ServiceName>().is_err());
        assert!("a/b/c".parse::<ServiceName>().is_err());
    }

    #[test]
    fn instances_name_their_service() {
        let id: InstanceId = "default/api/api-1".parse().unwrap();
        assert_eq!(id.service.to_string(), "default/api");
        assert_eq!(id.to_string(), "default/api/api-1");
        assert!("default/api".parse::<InstanceId>().is_err());
    }

    #[test]
    fn errors_quote_at_most_what_a_person_can_read() {
        let error = "x/".repeat(4000).parse::<Name>().unwrap_err();
        assert!(error.to_string().len() < 300);
    }
}
