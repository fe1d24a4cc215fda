//! Whom a connection may be with.

use crate::spiffe::{SpiffeId, Subject};
use std::collections::BTreeSet;
use std::fmt;
use weft_model::id::InstanceId;

/// Whom the other end must be, within the own trust domain; a peer from another one is never admitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExpectedPeer {
    /// Any instance of any service. What it may do is decided by policy afterwards.
    AnyInstance,
    /// One of these instances; none if the set is empty.
    OneOf(BTreeSet<InstanceId>),
    /// Any controller.
    Controller,
    /// Anybody of the mesh: instances, controllers and operators.
    Any,
}

impl ExpectedPeer {
    /// Exactly this instance: what a proxy expects of the endpoint that it chose.
    #[must_use]
    pub fn instance(instance: InstanceId) -> Self {
        Self::OneOf(BTreeSet::from([instance]))
    }

    /// Whether it may be this peer, whose trust domain is the own one.
    #[must_use]
    pub fn admits(&self, peer: &SpiffeId) -> bool {
        match (self, &peer.subject) {
            (Self::Any, _)
            | (Self::AnyInstance, Subject::Instance(_))
            | (Self::Controller, Subject::Controller(_)) => true,
            (Self::OneOf(instances), Subject::Instance(instance)) => instances.contains(instance),
            (Self::AnyInstance | Self::OneOf(_), Subject::Controller(_) | Subject::Operator { .. })
            | (Self::Controller, Subject::Instance(_) | Subject::Operator { .. }) => false,
        }
    }
}

impl fmt::Display for ExpectedPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AnyInstance => f.write_str("an instance"),
            Self::Controller => f.write_str("a controller"),
            Self::Any => f.write_str("a member of the mesh"),
            Self::OneOf(instances) => match instances.first() {
                None => f.write_str("nobody"),
                Some(only) if instances.len() == 1 => write!(f, "{only}"),
                Some(first) => write!(f, "{first} or one of {} others", instances.len() - 1),
            },
        }
    }
}
