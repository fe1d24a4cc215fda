//! Proves the reading of past schemas on an event that had three shapes, whichever real ones have a past.
#![expect(unreachable_pub, reason = "families are declared as public, and here nobody is outside")]

use super::{DecodeError, Event, event_family};
use crate::Chain;
use crate::id::{Name, Port};
use crate::scope::Scope;
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

event_family! {
    /// What can happen to a berth.
    BerthEvent { BerthRented = 3 from [BerthRentedV1, BerthRentedV2], BerthLeft = 1 }
}

/// Schema 3: how long was not said before; where it lies was one text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BerthRented {
    ship: Name,
    pier: Name,
    berth: Port,
    days: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BerthLeft {}

/// Schema 2: `boat` is called `ship`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BerthRentedV2 {
    ship: Name,
    place: String,
}

/// Schema 1.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BerthRentedV1 {
    boat: Name,
    place: String,
}

impl From<BerthRentedV1> for BerthRentedV2 {
    fn from(BerthRentedV1 { boat, place }: BerthRentedV1) -> Self {
        Self { ship: boat, place }
    }
}

impl TryFrom<BerthRentedV2> for BerthRented {
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn try_from(BerthRentedV2 { ship, place }: BerthRentedV2) -> Result<Self, Self::Error> {
        let (pier, berth) = place.split_once(':').ok_or("a place is written <pier>:<berth>")?;
        Ok(Self { ship, pier: pier.parse()?, berth: berth.parse()?, days: 1 })
    }
}

fn decode(schema: u16, payload: &str) -> Result<BerthEvent, DecodeError> {
    BerthEvent::decode("BerthRented", schema, payload)
}

fn text(shape: &impl Serialize) -> String {
    serde_json::to_string(shape).unwrap()
}

fn name() -> impl Strategy<Value = Name> {
    "[a-z][a-z0-9]{0,8}".prop_map(|name| name.parse().unwrap())
}

proptest! {
    /// Whichever of its shapes an event was stored in, it is the same event.
    #[test]
    fn a_past_payload_is_read_as_what_it_would_be_written_as_now(
        boat in name(), pier in name(), berth in 1..=u16::MAX,
    ) {
        let first = BerthRentedV1 { boat, place: format!("{pier}:{berth}") };
        let second = BerthRentedV2::from(first.clone());
        let third = BerthRented::try_from(second.clone()).unwrap();
        let event = BerthEvent::from(third.clone());
        prop_assert_eq!(&decode(1, &text(&first)).unwrap(), &event);
        prop_assert_eq!(&decode(2, &text(&second)).unwrap(), &event);
        prop_assert_eq!(&decode(3, &text(&third)).unwrap(), &event);
        prop_assert_eq!(event.payload().unwrap(), text(&third));
    }

    /// A payload is held to the schema that it was stored with, not to one that happens to fit.
    #[test]
    fn a_payload_of_another_schema_is_malformed(boat in name(), stored in 1..=3_u16, read in 1..=3_u16) {
        prop_assume!(stored != read);
        let payload = match stored {
            1 => format!(r#"{{"boat":"{boat}","place":"north:7"}}"#),
            2 => format!(r#"{{"ship":"{boat}","place":"north:7"}}"#),
            _ => format!(r#"{{"ship":"{boat}","pier":"north","berth":7,"days":1}}"#),
        };
        prop_assert!(decode(stored, &payload).is_ok());
        prop_assert!(matches!(decode(read, &payload), Err(DecodeError::Payload(_))));
    }
}

#[test]
fn a_past_payload_becomes_the_current_event() {
    let event = decode(1, r#"{"boat":"argo","place":"north:7"}"#).unwrap();
    assert_eq!(event.payload().unwrap(), r#"{"ship":"argo","pier":"north","berth":7,"days":1}"#);
    assert_eq!((event.type_name(), event.schema()), ("BerthRented", 3));
    assert_eq!(BerthEvent::decode("BerthLeft", 1, "{}").unwrap(), BerthLeft {}.into());
}

#[test]
fn what_is_not_understood_says_so() {
    let refused = |type_name, schema, payload| {
        Chain(&BerthEvent::decode(type_name, schema, payload).unwrap_err()).to_string()
    };
    let newer = |schema, known| {
        format!("schema version {schema} was written by a newer Weft, this one reads up to {known}; upgrade")
    };
    assert_eq!(refused("BerthRented", 4, "{}"), newer(4, 3));
    assert_eq!(refused("BerthRented", u16::MAX, "{}"), newer(u16::MAX, 3));
    assert_eq!(refused("BerthLeft", 2, "{}"), newer(2, 1));
    for type_name in ["BerthRented", "BerthLeft"] {
        assert_eq!(refused(type_name, 0, "{}"), "there is no schema version 0, they count from 1");
    }
    assert_eq!(
        refused("BerthSold", 1, "{}"),
        "unknown event type for this scope; if a newer Weft wrote it, upgrade"
    );
    for (schema, payload, field) in [
        (1, r#"{"boat":"argo","place":"north:7","days":2}"#, "days"),
        (2, r#"{"ship":"argo","place":"north:7","berth":7}"#, "berth"),
        (3, r#"{"ship":"argo","pier":"north","berth":7,"days":2,"boat":"argo"}"#, "boat"),
    ] {
        let said = refused("BerthRented", schema, payload);
        assert!(said.starts_with(&format!("malformed payload: unknown field `{field}`")), "{said}");
    }
    assert_eq!(
        refused("BerthRented", 1, r#"{"boat":"argo","place":"north"}"#),
        "the payload of schema version 1 cannot be brought to the current one: a place is written <pier>:<berth>"
    );
    let said = refused("BerthRented", 2, r#"{"ship":"argo","place":"north:0"}"#);
    assert!(said.contains(r#"current one: "0" is not a port"#), "{said}");
}

#[test]
fn every_schema_up_to_the_current_one_is_read() {
    assert_eq!(BerthEvent::TYPES, [("BerthRented", 3), ("BerthLeft", 1)]);
    for &(type_name, current) in BerthEvent::TYPES {
        for schema in 1..=current {
            let read = BerthEvent::decode(type_name, schema, "null");
            assert!(matches!(read, Err(DecodeError::Payload(_))), "{type_name} {schema}: {read:?}");
        }
    }
    let scopes = SCOPES.map(|scope| scope.parse::<Scope>().unwrap());
    for (type_name, schema) in Event::known() {
        let reads = |scope: &&Scope| {
            matches!(Event::decode(scope, type_name, schema, "null"), Err(DecodeError::Payload(_)))
        };
        assert_eq!(scopes.iter().filter(reads).count(), 1, "{type_name} {schema}");
    }
}

/// One of each kind.
const SCOPES: [&str; 10] = [
    "service/default/db",
    "membership/default/db/db-1",
    "health/default/db/db-1",
    "traffic/default/db",
    "security/mesh",
    "identity/default/db/db-1",
    "token/0123456789abcdef0123456789abcdef",
    "ca",
    "mesh",
    "rollout",
];

/// Columns, filters and golden logs name an event by its type alone.
#[test]
fn no_two_events_share_a_name_and_a_schema() {
    let known: Vec<_> = Event::known().collect();
    assert_eq!(known.iter().collect::<BTreeSet<_>>().len(), known.len());
    assert!(known.contains(&("ServiceDeclared", 1)) && known.contains(&("MeshDefaultsSet", 1)));
}

#[test]
fn a_scope_reads_only_events_of_its_family() {
    let payload = r#"{"defaults":{"security":"deny","propagation_bound_ms":1000}}"#;
    assert!(Event::decode(&Scope::Mesh, "MeshDefaultsSet", 1, payload).is_ok());
    assert!(matches!(Event::decode(&Scope::Ca, "MeshDefaultsSet", 1, payload), Err(DecodeError::Type)));
    assert!(matches!(
        Event::decode(&Scope::Mesh, "MeshDefaultsSet", 3, payload),
        Err(DecodeError::Newer { schema: 3, known: 2 })
    ));
}
