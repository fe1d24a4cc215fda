//! The macro that declares an event family: the enum over its event structs, their stored names, their schema
//! versions, and the chain of past shapes that each is read through.
//!
//! The current schema is decoded straight from the text into the event. A past one is decoded straight into the struct
//! that had its shape, and then lifted by `TryFrom`, schema by schema. Which steps change an event is in
//! [`event`](crate::event); that no link of a chain is missing is checked when the family is compiled; read
//! `tests.rs` for a family with three schemas.

/// Declares an event family. Each event names its current schema, and its past shapes from schema 1 on:
/// `Rented = 3 from [RentedV1, RentedV2]`.
macro_rules! event_family {
    ($(#[$doc:meta])* $family:ident {
        $($event:ident = $schema:literal $(from [$($past:ident),+ $(,)?])?),+ $(,)?
    }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum $family {
            $(#[doc = concat!("See [`", stringify!($event), "`].")] $event($event),)+
        }

        impl $family {
            /// The types of the family, each with its current schema.
            pub(crate) const TYPES: &'static [(&'static str, u16)] = &[$((stringify!($event), $schema)),+];

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
                    $(stringify!($event) => match schema {
                        $schema => serde_json::from_str(payload).map_err(DecodeError::Payload),
                        0 => Err(DecodeError::SchemaZero),
                        _ => $crate::event::decode_past!(
                            $event, schema, payload, 1, [$($($past)+)?]
                        ),
                    }
                    .map(Self::$event),)+
                    _ => Err(DecodeError::Type),
                }
            }
        }

        $(const _: () = {
            let past: &[&str] = &[$($(stringify!($past)),+)?];
            assert!(
                past.len() + 1 == $schema,
                concat!(stringify!($event), ": its `from` list needs one shape for each schema before the current one")
            );
        };)+

        $(impl From<$event> for $family {
            fn from(event: $event) -> Self {
                Self::$event(event)
            }
        })+
    };
}
pub(crate) use event_family;

/// Decodes a schema that is not the current one: `version` is that of the first shape in the list.
macro_rules! decode_past {
    ($event:ident, $schema:ident, $payload:ident, $version:expr, []) => {
        Err(DecodeError::Newer { schema: $schema, known: $version })
    };
    ($event:ident, $schema:ident, $payload:ident, $version:expr, [$past:ident $($newer:ident)*]) => {
        if $schema == $version {
            let unfit = |source| DecodeError::Upcast { schema: $schema, source };
            serde_json::from_str::<$past>($payload)
                .map_err(DecodeError::Payload)
                $(.and_then(|past| <$newer>::try_from(past).map_err(Into::into).map_err(unfit)))*
                .and_then(|past| <$event>::try_from(past).map_err(Into::into).map_err(unfit))
        } else {
            $crate::event::decode_past!($event, $schema, $payload, $version + 1, [$($newer)*])
        }
    };
}
pub(crate) use decode_past;
