//! Scopes: the consistency boundaries of the mesh. Each has its own gapless version and its own state machine.

use crate::id::{IdError, InstanceId, Namespace, ServiceName, serde_as_text};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// One consistency boundary. Its text is what the log stores and what people filter by.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// `service/<ns>/<service>`: that the service exists, its ports and address.
    Service(ServiceName),
    /// `membership/<ns>/<service>/<instance>`: whether the instance takes part.
    Membership(InstanceId),
    /// `health/<ns>/<service>/<instance>`: what was last observed of the instance.
    Health(InstanceId),
    /// `traffic/<ns>/<service>` or `traffic/<ns>/<source>-><ns>/<service>`.
    Traffic(TrafficScope),
    /// `security/mesh`, `security/<ns>` or `security/<ns>/<service>`.
    Security(SecurityScope),
    /// `identity/<ns>/<service>/<instance>`: the leaves issued to the instance.
    Identity(InstanceId),
    /// `token/<id>`: one join token.
    Token(TokenId),
    /// `ca`: the roots that the mesh trusts.
    Ca,
    /// `mesh`: defaults of the whole mesh.
    Mesh,
    /// `rollout`: a change of policies that some sidecars get first.
    Rollout,
}

/// What a traffic policy is about.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrafficScope {
    /// The service that is connected to. First, so that all policies for one destination sort together.
    pub destination: ServiceName,
    /// If set, only connections from this service; such a policy replaces the service-wide one for them.
    pub source: Option<ServiceName>,
}

/// What a security policy protects.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SecurityScope {
    /// Every service.
    Mesh,
    /// Every service of a namespace.
    Namespace(Namespace),
    /// One service.
    Service(ServiceName),
}

/// The public half of a join token's name: 32 lowercase hex digits. It is not secret.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(Arc<str>);

impl TokenId {
    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TokenId {
    type Err = ScopeError;

    fn from_str(s: &str) -> Result<Self, ScopeError> {
        let valid = s.len() == 32 && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if valid { Ok(Self(s.into())) } else { Err(ScopeError::Token) }
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

serde_as_text!(TokenId);

/// A text does not name a scope.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// A name in it is not valid.
    #[error("a name in the scope is not valid")]
    Name(#[from] IdError),
    /// The part before the first slash is not a kind of scope.
    #[error(
        "a scope starts with service, membership, health, traffic, security, identity or token, or is ca, mesh or rollout"
    )]
    Kind,
    /// What follows `token/` is not a token id.
    #[error("a token id is 32 lowercase hex digits")]
    Token,
}

impl Scope {
    /// The kind of scope: the word that its text starts with.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Service(_) => "service",
            Self::Membership(_) => "membership",
            Self::Health(_) => "health",
            Self::Traffic(_) => "traffic",
            Self::Security(_) => "security",
            Self::Identity(_) => "identity",
            Self::Token(_) => "token",
            Self::Ca => "ca",
            Self::Mesh => "mesh",
            Self::Rollout => "rollout",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind();
        match self {
            Self::Service(service) => write!(f, "{kind}/{service}"),
            Self::Membership(instance) | Self::Health(instance) | Self::Identity(instance) => {
                write!(f, "{kind}/{instance}")
            }
            Self::Traffic(scope) => write!(f, "{kind}/{scope}"),
            Self::Security(scope) => write!(f, "{kind}/{scope}"),
            Self::Token(id) => write!(f, "{kind}/{id}"),
            Self::Ca | Self::Mesh | Self::Rollout => f.write_str(kind),
        }
    }
}

impl FromStr for Scope {
    type Err = ScopeError;

    fn from_str(s: &str) -> Result<Self, ScopeError> {
        match s.split_once('/') {
            None if s == "ca" => Ok(Self::Ca),
            None if s == "mesh" => Ok(Self::Mesh),
            None if s == "rollout" => Ok(Self::Rollout),
            Some(("service", rest)) => Ok(Self::Service(rest.parse()?)),
            Some(("membership", rest)) => Ok(Self::Membership(rest.parse()?)),
            Some(("health", rest)) => Ok(Self::Health(rest.parse()?)),
            Some(("traffic", rest)) => Ok(Self::Traffic(rest.parse()?)),
            Some(("security", rest)) => Ok(Self::Security(rest.parse()?)),
            Some(("identity", rest)) => Ok(Self::Identity(rest.parse()?)),
            Some(("token", rest)) => Ok(Self::Token(rest.parse()?)),
            _ => Err(ScopeError::Kind),
        }
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for TrafficScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{source}->{}", self.destination),
            None => self.destination.fmt(f),
        }
    }
}

impl FromStr for TrafficScope {
    type Err = ScopeError;

    fn from_str(s: &str) -> Result<Self, ScopeError> {
        Ok(match s.split_once("->") {
            Some((source, destination)) => {
                Self { source: Some(source.parse()?), destination: destination.parse()? }
            }
            None => Self { source: None, destination: s.parse()? },
        })
    }
}

impl fmt::Debug for TrafficScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl SecurityScope {
    /// Whether it protects a service.
    #[must_use]
    pub fn covers(&self, service: &ServiceName) -> bool {
        match self {
            Self::Mesh => true,
            Self::Namespace(namespace) => service.namespace == *namespace,
            Self::Service(own) => own == service,
        }
    }
}

impl fmt::Display for SecurityScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mesh => f.write_str("mesh"),
            Self::Namespace(namespace) => namespace.fmt(f),
            Self::Service(service) => service.fmt(f),
        }
    }
}

impl FromStr for SecurityScope {
    type Err = ScopeError;

    fn from_str(s: &str) -> Result<Self, ScopeError> {
        Ok(match s {
            "mesh" => Self::Mesh,
            _ if s.contains('/') => Self::Service(s.parse()?),
            _ => Self::Namespace(s.parse()?),
        })
    }
}

impl fmt::Debug for SecurityScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

serde_as_text!(Scope);
serde_as_text!(TrafficScope);
serde_as_text!(SecurityScope);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_round_trip_as_text() {
        for text in [
            "service/default/db",
            "membership/default/db/db-1",
            "health/default/db/db-1",
            "traffic/default/api",
            "traffic/default/web->default/api",
            "security/mesh",
            "security/default",
            "security/default/db",
            "identity/default/db/db-1",
            "token/0123456789abcdef0123456789abcdef",
            "ca",
            "mesh",
            "rollout",
        ] {
            assert_eq!(text.parse::<Scope>().unwrap().to_string(), text);
        }
        for bad in ["", "db", "ca/x", "service/db", "membership/default/db", "token/xyz", "traffic/a->b"] {
            assert!(bad.parse::<Scope>().is_err(), "{bad}");
        }
    }
}
