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
}

impl InterestClass {
    /// A short name for the class, derived from its content.
    #[must_use]
    pub fn id(&self) -> String {
        hex::encode(&Hash::of(self.to_string().as_bytes()).0[..16])
    }
}

impl fmt::Display for InterestClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ->", self.service)?;
        match &self.upstreams {
            Upstreams::All => f.write_str(" *"),
            Upstreams::Only(services) => services.iter().try_for_each(|service| write!(f, " {service}")),
        }
    }
}
