//! Everything that can happen in the mesh: one event family per kind of scope.
//!
//! An event's type name and schema version are stored beside its JSON payload. Within one schema version a payload's
//! fields never change; a changed shape is a new schema version, and payloads of the past ones are brought to it when
//! they are read. An unknown type, an unknown schema or an unknown field is a [`DecodeError`], never skipped: a fold
//! that leaves out an event is wrong.
//!
//! # How to change an event
//!
//! The log keeps what was written, so everything that was ever written must be read for ever. The shape of a payload
//! is that of its struct and of every type inside it, down to which texts a name may be.
//!
//! 1. Copy the struct as it is to `<scope>/past.rs`, as `<Event>V<n>` with n its schema, and with it each type inside
//!    whose shape changes. Of a past shape only `Deserialize` is needed, with `deny_unknown_fields`. It never
//!    changes again.
//! 2. Change the struct. In `event_family!` raise its schema and append the past shape: `Event = 2 from [EventV1]`.
//! 3. Write the upcaster: `From<EventV<n>>` for the changed struct, or `TryFrom` if a stored payload can lack what the new
//!    shape needs. It is pure: what it fills in is a constant or comes from the payload. The upcaster to the struct that
//!    was there before now leads to `EventV<n>`.
//! 4. Add a golden log with the new schema, see `crates/projector/tests/golden_logs/README.md`. The ones that are
//!    there stay as they are, and hold the past schema. A test fails until it is there.
//! 5. Say in the changelog that every controller is to be upgraded before anything is written: an older one stops at
//!    the new schema, and says why.
//!
//! A new type starts with schema 1 and needs only step 4. A type that is not written any more stays. One without a
//! changed shape needs no new schema: rules about what may happen are in `decide`, which past events do not pass again.

mod family;
#[cfg(test)]
mod tests;

use crate::ca::CaEvent;
use crate::health::HealthEvent;
use crate::identity::IdentityEvent;
use crate::membership::MembershipEvent;
use crate::mesh::MeshEvent;
use crate::rollout::RolloutEvent;
use crate::scope::Scope;
use crate::security::SecurityEvent;
use crate::service::ServiceEvent;
use crate::time::Timestamp;
use crate::token::TokenEvent;
use crate::traffic::TrafficEvent;
use crate::version::{ConfigVersion, Epoch, Position, Version};

pub(crate) use family::{decode_past, event_family};

macro_rules! families {
    ($($variant:ident($family:ty) = $scope:pat,)+) => {
        /// Anything that can happen in the mesh.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Event {
            $(#[doc = concat!("Something happened in a `", stringify!($variant), "` scope.")] $variant($family),)+
        }

        impl Event {
            /// The name that the log stores for this type of event.
            #[must_use]
            pub const fn type_name(&self) -> &'static str {
                match self { $(Self::$variant(event) => event.type_name(),)+ }
            }

            /// The version of the payload's shape.
            #[must_use]
            pub const fn schema(&self) -> u16 {
                match self { $(Self::$variant(event) => event.schema(),)+ }
            }

            /// The payload as JSON text.
            ///
            /// # Errors
            /// None in practice: all payloads are plain structs with text keys.
            pub fn payload(&self) -> Result<String, serde_json::Error> {
                match self { $(Self::$variant(event) => event.payload(),)+ }
            }

            /// Reads a stored event back. The scope says which family it must belong to.
            ///
            /// # Errors
            /// If the type, schema or payload is not one that this version of Weft knows.
            pub fn decode(scope: &Scope, type_name: &str, schema: u16, payload: &str) -> Result<Self, DecodeError> {
                match scope { $($scope => <$family>::decode(type_name, schema, payload).map(Self::$variant),)+ }
            }

            /// Every type and schema that this version of Weft can read; of each type, its schemas from 1 to the
            /// current one.
            pub fn known() -> impl Iterator<Item = (&'static str, u16)> {
                let types = [$(<$family>::TYPES),+].into_iter().flatten();
                types.flat_map(|&(type_name, current)| (1..=current).map(move |schema| (type_name, schema)))
            }
        }

        $(impl From<$family> for Event {
            fn from(event: $family) -> Self {
                Self::$variant(event)
            }
        })+
    };
}

families! {
    Service(ServiceEvent) = Scope::Service(_),
    Membership(MembershipEvent) = Scope::Membership(_),
    Health(HealthEvent) = Scope::Health(_),
    Traffic(TrafficEvent) = Scope::Traffic(_),
    Security(SecurityEvent) = Scope::Security(_),
    Identity(IdentityEvent) = Scope::Identity(_),
    Token(TokenEvent) = Scope::Token(_),
    Ca(CaEvent) = Scope::Ca,
    Mesh(MeshEvent) = Scope::Mesh,
    Rollout(RolloutEvent) = Scope::Rollout,
}

/// A stored event cannot be read by this version of Weft.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// No event of this name belongs to the scope.
    #[error("unknown event type for this scope; if a newer Weft wrote it, upgrade")]
    Type,
    /// The schema version is zero.
    #[error("there is no schema version 0, they count from 1")]
    SchemaZero,
    /// The payload has a shape that this version of Weft does not know yet.
    #[error("schema version {schema} was written by a newer Weft, this one reads up to {known}; upgrade")]
    Newer {
        /// The stored schema version.
        schema: u16,
        /// The newest one that is known.
        known: u16,
    },
    /// The payload is not what the type and schema promise.
    #[error("malformed payload")]
    Payload(#[source] serde_json::Error),
    /// The payload has its past shape, but says nothing that the current one can hold.
    #[error("the payload of schema version {schema} cannot be brought to the current one")]
    Upcast {
        /// The stored schema version.
        schema: u16,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A recorded event with its meaning: what the fold takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// The life of the log that it belongs to.
    pub epoch: Epoch,
    /// Where in the whole log.
    pub position: Position,
    /// Where in its scope.
    pub version: Version,
    /// When it was recorded, by the database's clock.
    pub at: Timestamp,
    /// Whose command caused it: a SPIFFE id.
    pub actor: String,
    /// The scope it happened in.
    pub scope: Scope,
    /// What happened.
    pub event: Event,
}

impl Fact {
    /// The configuration version of which this event is the last.
    #[must_use]
    pub const fn config_version(&self) -> ConfigVersion {
        ConfigVersion::new(self.epoch, self.position)
    }
}
