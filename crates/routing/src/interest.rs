//! Interest classes: sidecars that may see the same services run the same manifest.

use crate::hash::Hash;
use std::fmt;
use weft_model::ServiceName;
use weft_model::membership::Upstreams;

/// What a sidecar may see: its own service's inbound policy, and the endpoints of its upstreams.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct InterestClass {
    /// The service that the sidecar stands before.
    pub service: ServiceName,
    /// The services that it may connect to.
    pub upstreams: Upstreams,
    /// Whether it runs the candidates of the running rollout.
    pub canary: bool,
}

/// A short name for a class, derived from its content: what classes are found by, since a class may name a thousand services.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassId([u8; 16]);

impl InterestClass {
    /// The class's name.
    #[must_use]
    pub fn id(&self) -> ClassId {
        ClassId(digest(self))
    }
}

impl fmt::Display for InterestClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ->{}", self.service, Listed(self))
    }
}

impl fmt::Display for ClassId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for ClassId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The same but for the service, which classes of several services may share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ListId([u8; 16]);

impl ListId {
    pub(crate) fn of(class: &InterestClass) -> Self {
        Self(digest(&Listed(class)))
    }
}

/// A class but for its service.
struct Listed<'a>(&'a InterestClass);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.upstreams {
            Upstreams::All => f.write_str(" *"),
            Upstreams::Only(services) => services.iter().try_for_each(|service| write!(f, " {service}")),
        }?;
        // No service is called so: their names have a slash.
        if self.0.canary { f.write_str(" canary") } else { Ok(()) }
    }
}

fn digest(what: &impl fmt::Display) -> [u8; 16] {
    Hash::of(what.to_string().as_bytes()).first_half()
}
