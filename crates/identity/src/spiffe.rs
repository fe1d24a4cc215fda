//! SPIFFE ids: the names that leaves carry. The grammar is closed: a text is one of the three forms below, byte for
//! byte, or it is refused. Percent-encoding, dot segments, upper case, queries and trailing slashes have no form, so
//! two different texts never name the same subject.
//!
//! ```text
//! spiffe://<trust-domain>/ns/<ns>/svc/<service>/inst/<instance>
//! spiffe://<trust-domain>/controller/<name>
//! spiffe://<trust-domain>/operator/<viewer|operator|admin>/<name>
//! ```

use std::fmt;
use std::str::FromStr;
use weft_model::id::{IdError, InstanceId, Name, ServiceName, TrustDomain};

/// Longest SPIFFE id in bytes (SPIFFE-ID, section 2.3).
pub const SPIFFE_ID_BYTES_MAX: usize = 2048;

const SCHEME: &str = "spiffe://";

/// A text is not a SPIFFE id of this mesh.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// Longer than [`SPIFFE_ID_BYTES_MAX`].
    #[error("a SPIFFE id has at most {SPIFFE_ID_BYTES_MAX} bytes, this one has {bytes}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// It does not start with `spiffe://`.
    #[error("a SPIFFE id starts with {SCHEME}")]
    Scheme,
    /// The part before the first slash is not a trust domain.
    #[error("the trust domain of the SPIFFE id is malformed")]
    TrustDomain(#[source] IdError),
    /// The path has none of the known forms.
    #[error("the path of the SPIFFE id names neither an instance nor a controller nor an operator")]
    Path,
    /// The path has a known form, but a name in it is malformed.
    #[error("a name in the SPIFFE id is malformed")]
    Name(#[source] IdError),
}

/// Whom a leaf was issued to: a subject in a trust domain.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    /// The mesh that the subject belongs to.
    pub trust_domain: TrustDomain,
    /// Who it is there.
    pub subject: Subject,
}

/// Who somebody is inside a trust domain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// One instance of a service; what a sidecar is.
    Instance(InstanceId),
    /// A controller.
    Controller(Name),
    /// A person or a tool that uses the API.
    Operator {
        /// What it may do.
        role: Role,
        /// Its name, as the log's actor.
        name: Name,
    },
}

/// What an operator may do. Each role includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Reads.
    Viewer,
    /// Reads and changes the mesh.
    Operator,
    /// Reads, changes the mesh, and decides who belongs to it: tokens, identities, roots.
    Admin,
}

impl Role {
    /// Every role, the weakest first.
    pub const ALL: [Self; 3] = [Self::Viewer, Self::Operator, Self::Admin];

    /// Whether this role may do what `needed` may do.
    #[must_use]
    pub fn permits(self, needed: Self) -> bool {
        self >= needed
    }

    /// The role as SPIFFE ids and the command line write it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

impl SpiffeId {
    /// The instance, if that is what it names.
    #[must_use]
    pub const fn as_instance(&self) -> Option<&InstanceId> {
        match &self.subject {
            Subject::Instance(instance) => Some(instance),
            Subject::Controller(_) | Subject::Operator { .. } => None,
        }
    }

    /// The role, if it names an operator.
    #[must_use]
    pub const fn as_operator(&self) -> Option<(Role, &Name)> {
        match &self.subject {
            Subject::Operator { role, name } => Some((*role, name)),
            Subject::Instance(_) | Subject::Controller(_) => None,
        }
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(s: &str) -> Result<Self, SpiffeIdError> {
        if s.len() > SPIFFE_ID_BYTES_MAX {
            return Err(SpiffeIdError::TooLong { bytes: s.len() });
        }
        let rest = s.strip_prefix(SCHEME).ok_or(SpiffeIdError::Scheme)?;
        let (trust_domain, path) = rest.split_once('/').ok_or(SpiffeIdError::Path)?;
        Ok(Self {
            trust_domain: trust_domain.parse().map_err(SpiffeIdError::TrustDomain)?,
            subject: parse_path(path)?,
        })
    }
}

fn parse_path(path: &str) -> Result<Subject, SpiffeIdError> {
    let mut segments = path.split('/');
    // The longest form has six segments; a seventh is enough to know that there are too many.
    let mut next = || segments.next();
    let subject = match (next(), next(), next(), next(), next(), next(), next()) {
        (Some("ns"), Some(namespace), Some("svc"), Some(service), Some("inst"), Some(instance), None) => {
            let service = ServiceName { namespace: name(namespace)?, name: name(service)? };
            Subject::Instance(InstanceId { service, instance: name(instance)? })
        }
        (Some("controller"), Some(controller), None, ..) => Subject::Controller(name(controller)?),
        (Some("operator"), Some(role), Some(operator), None, ..) => {
            let role = Role::ALL.into_iter().find(|r| r.as_str() == role).ok_or(SpiffeIdError::Path)?;
            Subject::Operator { role, name: name(operator)? }
        }
        _ => return Err(SpiffeIdError::Path),
    };
    Ok(subject)
}

fn name<T: FromStr<Err = IdError>>(text: &str) -> Result<T, SpiffeIdError> {
    text.parse().map_err(SpiffeIdError::Name)
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/", self.trust_domain)?;
        match &self.subject {
            Subject::Instance(InstanceId { service, instance }) => {
                write!(f, "ns/{}/svc/{}/inst/{instance}", service.namespace, service.name)
            }
            Subject::Controller(name) => write!(f, "controller/{name}"),
            Subject::Operator { role, name } => write!(f, "operator/{}/{name}", role.as_str()),
        }
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name of a root: its trust domain alone, without a path (X509-SVID, section 3.1).
pub(crate) fn root_uri(trust_domain: &TrustDomain) -> String {
    format!("{SCHEME}{trust_domain}")
}

/// The trust domain that a root's URI names.
pub(crate) fn parse_root_uri(uri: &str) -> Result<TrustDomain, SpiffeIdError> {
    uri.strip_prefix(SCHEME).ok_or(SpiffeIdError::Scheme)?.parse().map_err(SpiffeIdError::TrustDomain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_three_forms_read_back() {
        for text in [
            "spiffe://weft.local/ns/default/svc/api/inst/api-1",
            "spiffe://weft.local/controller/c1",
            "spiffe://weft.local/operator/viewer/grafana",
            "spiffe://weft.local/operator/admin/ann",
        ] {
            assert_eq!(text.parse::<SpiffeId>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn near_misses_are_refused() {
        let long = format!("spiffe://weft.local/controller/{}", "a".repeat(2048));
        for text in [
            "",
            "spiffe://",
            "spiffe://weft.local",
            "spiffe://weft.local/",
            "SPIFFE://weft.local/controller/c1",
            "https://weft.local/controller/c1",
            "spiffe:/weft.local/controller/c1",
            "spiffe:///controller/c1",
            "spiffe://Weft.local/controller/c1",
            "spiffe://weft.local:443/controller/c1",
            "spiffe://user@weft.local/controller/c1",
            "spiffe://weft..local/controller/c1",
            "spiffe://weft.local//controller/c1",
            "spiffe://weft.local/controller/c1/",
            "spiffe://weft.local/controller/C1",
            "spiffe://weft.local/controller/c%31",
            "spiffe://weft.local/controller/..",
            "spiffe://weft.local/controller/c1?x=1",
            "spiffe://weft.local/controller/c1#x",
            "spiffe://weft.local/controller/c1\0",
            "spiffe://weft.local/controller/c1 ",
            "spiffe://weft.local/controller/ç",
            "spiffe://weft.local/operator/root/ann",
            "spiffe://weft.local/operator/Admin/ann",
            "spiffe://weft.local/operator/ann",
            "spiffe://weft.local/ns/default/svc/api",
            "spiffe://weft.local/ns/default/svc/api/inst/api-1/x",
            "spiffe://weft.local/ns/default/svc/../inst/api-1",
            "spiffe://weft.local/ns/default/sa/api/inst/api-1",
            long.as_str(),
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_role_includes_the_weaker_ones() {
        for (strength, role) in Role::ALL.into_iter().enumerate() {
            for (needed, weaker) in Role::ALL.into_iter().enumerate() {
                assert_eq!(role.permits(weaker), strength >= needed, "{role} for {weaker}");
            }
        }
    }

    proptest! {
        #[test]
        fn what_parses_has_one_spelling(text in "(spiffe://)?[a-z0-9./%?#-]{0,60}|\\PC{0,40}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }

        #[test]
        fn every_id_reads_back(domain in "[a-z]{1,8}(\\.[a-z]{1,8})?", a in "[a-z]{1,9}", b in "[a-z]{1,9}", c in "[a-z]{1,9}") {
            let text = format!("spiffe://{domain}/ns/{a}/svc/{b}/inst/{c}");
            prop_assert_eq!(text.parse::<SpiffeId>().unwrap().to_string(), text);
        }
    }
}
