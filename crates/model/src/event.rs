//! Everything that can happen in the mesh: one event family per kind of scope.
//!
//! An event's type name and schema version are stored beside its JSON payload. Within one schema version a payload's
//! fields never change; a changed shape is a new schema version and an upcaster on read. An unknown type, an
//! unknown schema or an unknown field is a [`DecodeError`], never skipped: a fold that leaves out an event is
//! wrong.

use crate::ca::CaEvent;
use crate::health::HealthEvent;
use crate::identity::IdentityEvent;
use crate::membership::MembershipEvent;
use crate::mesh::MeshEvent;
use crate::scope::Scope;
use crate::security::SecurityEvent;
use crate::service::ServiceEvent;
use crate::time::Timestamp;
use crate::token::TokenEvent;
use crate::traffic::TrafficEvent;
use crate::version::{ConfigVersion, Epoch, Position, Version};

/// Declares an event family: the enum over its event structs, their stored names and schema versions.
macro_rules! event_family {
    ($(#[$doc:meta])* $family:ident { $($event:ident = $schema:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum $family {
            $(#[doc = concat!("See [`", stringify!($event), "`].")] $event($event),)+
        }

        impl $family {
            pub(crate) const fn type_name(&self) -> &'static str {
                match self { $(Self::$event(_) => stringify!($event),)+ }
            }

            pub(crate) const fn schema(&self) -> u16 {
                match self { $(Self::$event(_) => $schema,)+ }
            }

            pub(crate) fn payload(&self) -> Result<String, serde_json::Error> {
                match self { $(Self::$event(event) => serde_json::to_string(event),)+ }
            }

            pub(crate) fn decode(
                type_name: &str,
                schema: u16,
                payload: &str,
            ) -> Result<Self, $crate::event::DecodeError> {
                use $crate::event::DecodeError;
                match type_name {
                    $(stringify!($event) if schema == $schema => serde_json::from_str(payload)
                        .map(Self::$event)
                        .map_err(DecodeError::Payload),)+
                    $(stringify!($event) => Err(DecodeError::Schema { schema, known: $schema }),)+
                    _ => Err(DecodeError::Type),
                }
            }
        }

        $(impl From<$event> for $family {
            fn from(event: $event) -> Self {
                Self::$event(event)
            }
        })+
    };
}
pub(crate) use event_family;

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
}

/// A stored event cannot be read by this version of Weft.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// No event of this name belongs to the scope.
    #[error("unknown event type for this scope")]
    Type,
    /// The payload has a shape of another version.
    #[error("schema version {schema} is not known, only {known}")]
    Schema {
        /// The stored schema version.
        schema: u16,
        /// The newest one that is known.
        known: u16,
    },
    /// The payload is not what the type and schema promise.
    #[error("malformed payload")]
    Payload(#[source] serde_json::Error),
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
