//! Resources: what people write in YAML and hand to `weft apply`.
//!
//! A file holds any number of documents, each with a `kind`. They are read into a tree that knows its lines
//! ([`node`]), checked field by field ([`fields`]), given their meaning ([`read`]) and checked by the model's own
//! rules. So `weft check -f` finds without a controller whatever can be found without one, in the same words. What
//! a controller refuses all the same is traced back to the line ([`Resource::explain`]).
//!
//! The way back, from a controller's answer to a document that `weft apply` takes, is [`document`]; the borders to the
//! wire are in [`wire`]. Every field is documented in `docs/resources.md`, which a test holds against [`read::FIELDS`].

pub(crate) mod document;
pub(crate) mod fields;
pub(crate) mod files;
pub(crate) mod kind;
pub(crate) mod node;
pub(crate) mod read;
pub(crate) mod wire;

use crate::resource::node::{FileError, Node};
use weft_model::{Command, ExpectedVersion};

pub(crate) use kind::Kind;

/// Most resources of one apply; a controller takes no more at once.
pub(crate) const RESOURCES_MAX: usize = 1_000;

/// One document of a file, with its meaning.
#[derive(Clone, Debug)]
pub(crate) struct Resource {
    pub(crate) kind: Kind,
    /// The name or scope that it is about.
    pub(crate) name: String,
    /// What applying it asks for.
    pub(crate) command: Command,
    /// The `version` that it expects to replace.
    pub(crate) expected: ExpectedVersion,
    node: Node,
}

impl Resource {
    /// A controller's complaint about a field of this resource, with the field's place in the file. A complaint that
    /// names no field may name a value, such as a service that nobody declared: then that value's place.
    pub(crate) fn explain(&self, field: &str, message: &str) -> FileError {
        let named = |text: &str| {
            text != self.name && text.len() > 2 && message.split([' ', ',', ';']).any(|word| word == text)
        };
        let value = if field.is_empty() { self.node.find(&named) } else { None };
        let place = value.unwrap_or_else(|| self.node.locate(field)).clone();
        FileError { place, message: format!("{} {}: {message}", self.kind.word(), self.name) }
    }
}
