//! YAML text as a tree in which everything knows its line and column.
//!
//! A tree of our own rather than derived types, because a person who mistyped a field wants to know where it is, what
//! would be allowed there, and, when a controller refuses a value, which line that value stands on. Anchors and aliases
//! are refused: they let a small file unfold into a huge one, and hide which line a value comes from.

use crate::resource::RESOURCES_MAX;
use serde_saphyr::granit_parser::{Event, Parser, ScalarStyle, ScanError, Span};
use std::fmt;
use std::sync::Arc;

/// Deepest nesting that is read. The deepest resource nests five levels.
const DEPTH_MAX: usize = 16;
/// Most fields of one mapping. No kind has more than ten, and metadata has at most 16 entries. The search for a field that
/// is there twice compares each with those before it.
const FIELDS_MAX: usize = 64;
/// Most items of one list: the longest lists of a resource, upstreams and a rule's services, hold 1024.
const ITEMS_MAX: usize = 1_024;

/// A spot in a file, for people: lines and columns count from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) file: Arc<str>,
    pub(crate) line: usize,
    pub(crate) column: usize,
}

impl Place {
    fn new(file: &Arc<str>, span: Span) -> Self {
        Self { file: Arc::clone(file), line: span.start.line(), column: span.start.col() + 1 }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// What is wrong with a file, and where. Nothing was sent anywhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {message}")]
pub(crate) struct FileError {
    pub(crate) place: Place,
    pub(crate) message: String,
}

/// A value and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) value: Value,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Null,
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) place: Place,
    pub(crate) text: String,
}

impl Node {
    /// Reads every document of a file; empty ones are left out.
    pub(crate) fn parse_all(file: &str, text: &str) -> Result<Vec<Self>, FileError> {
        let mut reader = Reader { file: file.into(), events: Parser::new_from_str(text) };
        let mut documents = Vec::new();
        while let Some((event, span)) = reader.next()? {
            match event {
                Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => {}
                Event::StreamEnd => break,
                event => {
                    let node = reader.node(event, span, 0)?;
                    if node.value == Value::Null {
                        continue;
                    }
                    if documents.len() == RESOURCES_MAX {
                        let message = format!("a file holds at most {RESOURCES_MAX} resources");
                        return Err(FileError { place: node.place, message });
                    }
                    documents.push(node);
                }
            }
        }
        Ok(documents)
    }

    /// The word for what it is.
    pub(crate) const fn what(&self) -> &'static str {
        match self.value {
            Value::Null => "nothing",
            Value::Text(_) => "a single value",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }

    /// Where the first value stands that is as wanted.
    pub(crate) fn find(&self, wanted: &impl Fn(&str) -> bool) -> Option<&Place> {
        match &self.value {
            Value::Null => None,
            Value::Text(text) => wanted(text).then_some(&self.place),
            Value::List(items) => items.iter().find_map(|item| item.find(wanted)),
            Value::Map(entries) => entries.iter().find_map(|(_, value)| value.find(wanted)),
        }
    }

    /// Where the field of this path stands, such as `rules[2].ports`: the deepest part of the path that is there.
    pub(crate) fn locate(&self, path: &str) -> &Place {
        let mut here = self;
        for part in path.split(['.', '[']).filter(|part| !part.is_empty()) {
            let next = match (&here.value, part.strip_suffix(']')) {
                (Value::List(items), Some(index)) => index.parse().ok().and_then(|i: usize| items.get(i)),
                (Value::Map(entries), None) => {
                    entries.iter().find(|(key, _)| key.text == part).map(|(_, node)| node)
                }
                _ => None,
            };
            match next {
                Some(next) => here = next,
                None => break,
            }
        }
        &here.place
    }
}

struct Reader<'t> {
    file: Arc<str>,
    events: Parser<'t, serde_saphyr::granit_parser::StrInput<'t>>,
}

impl<'t> Reader<'t> {
    fn next(&mut self) -> Result<Option<(Event<'t>, Span)>, FileError> {
        self.events.next().transpose().map_err(|error| self.not_yaml(&error))
    }

    fn not_yaml(&self, error: &ScanError) -> FileError {
        let marker = error.marker();
        let place = Place { file: Arc::clone(&self.file), line: marker.line(), column: marker.col() + 1 };
        FileError { place, message: format!("this is not YAML: {}", error.info()) }
    }

    fn node(&mut self, event: Event<'t>, span: Span, depth: usize) -> Result<Node, FileError> {
        let place = Place::new(&self.file, span);
        let refuse = |message: &str| FileError { place: place.clone(), message: message.to_owned() };
        if depth > DEPTH_MAX {
            return Err(refuse("this is nested deeper than any resource"));
        }
        let value = match event {
            Event::Scalar(text, style, anchor, _) => {
                if anchor != 0 {
                    return Err(refuse("anchors are not supported; write the value where it is used"));
                }
                let plain = matches!(style, ScalarStyle::Plain);
                match text.as_ref() {
                    "" | "~" | "null" if plain => Value::Null,
                    text => Value::Text(text.to_owned()),
                }
            }
            Event::SequenceStart(_, 0, _) => {
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        Some((Event::SequenceEnd, _)) | None => break,
                        Some(_) if items.len() == ITEMS_MAX => {
                            return Err(refuse(&format!("a list has at most {ITEMS_MAX} items")));
                        }
                        Some((event, span)) => items.push(self.node(event, span, depth + 1)?),
                    }
                }
                Value::List(items)
            }
            Event::MappingStart(_, 0, _) => Value::Map(self.entries(depth)?),
            Event::SequenceStart(..) | Event::MappingStart(..) => {
                return Err(refuse("anchors are not supported; write the value where it is used"));
            }
            Event::Alias(_) => return Err(refuse("aliases are not supported; write the value out")),
            _ => return Err(refuse("a value is missing here")),
        };
        Ok(Node { place, value })
    }

    fn entries(&mut self, depth: usize) -> Result<Vec<(Key, Node)>, FileError> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        loop {
            let Some((event, span)) = self.next()? else { return Ok(entries) };
            if event == Event::MappingEnd {
                return Ok(entries);
            }
            let place = Place::new(&self.file, span);
            let Event::Scalar(text, ..) = event else {
                return Err(FileError { place, message: "a field's name is a single word".to_owned() });
            };
            if entries.len() == FIELDS_MAX {
                let message = format!("a mapping has at most {FIELDS_MAX} fields");
                return Err(FileError { place, message });
            }
            if let Some((first, _)) = entries.iter().find(|(key, _)| key.text == text) {
                let message = format!("field {text:?} is there twice, first on line {}", first.place.line);
                return Err(FileError { place, message });
            }
            let key = Key { place: place.clone(), text: text.into_owned() };
            let Some((event, span)) = self.next()? else { return Ok(entries) };
            let mut node = self.node(event, span, depth + 1)?;
            if node.value == Value::Null {
                // Nothing has no place of its own; its field's name has.
                node.place = place;
            }
            entries.push((key, node));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Vec<Node> {
        Node::parse_all("f.yaml", text).unwrap()
    }

    fn error(text: &str) -> String {
        Node::parse_all("f.yaml", text).unwrap_err().to_string()
    }

    #[test]
    fn values_know_their_places() {
        let nodes = parse("a: 1\nb:\n  - x\n  - { c: d }\n---\n# nothing\n---\nz: null\n");
        assert_eq!(nodes.len(), 2);
        assert_eq!(nodes[0].locate("b[1].c").to_string(), "f.yaml:4:10");
        assert_eq!(nodes[0].locate("b[7].c").to_string(), nodes[0].locate("b").to_string());
        assert_eq!(nodes[1].locate("z").to_string(), "f.yaml:8:1");
    }

    #[test]
    fn a_quoted_null_is_text() {
        let nodes = parse("a: 'null'\n");
        let Value::Map(entries) = &nodes[0].value else { panic!() };
        assert_eq!(entries[0].1.value, Value::Text("null".into()));
    }

    #[test]
    fn what_is_no_yaml_is_told_with_its_place() {
        let message = error("a: [1, 2\nb: 3\n");
        assert!(message.starts_with("f.yaml:") && message.contains("not YAML"), "{message}");
    }

    #[test]
    fn what_could_unfold_or_mislead_is_refused() {
        assert!(error("a: &x [1]\nb: *x\n").contains("anchors are not supported"));
        assert!(error("a: &x 1\n").contains("anchors are not supported"));
        assert_eq!(error("a: 1\na: 2\n"), "f.yaml:2:1: field \"a\" is there twice, first on line 1");
        let deep = format!("{}{}", "[".repeat(40), "]".repeat(40));
        assert!(error(&deep).contains("nested deeper"));
    }

    #[test]
    fn sizes_that_no_resource_has_are_refused_where_they_begin() {
        let fields = |count: usize| (0..count).map(|n| format!("f{n}: x\n")).collect::<String>();
        assert_eq!(parse(&fields(FIELDS_MAX)).len(), 1);
        assert_eq!(error(&fields(60_000)), "f.yaml:65:1: a mapping has at most 64 fields");
        assert_eq!(parse(&"- x\n".repeat(ITEMS_MAX)).len(), 1);
        assert_eq!(error(&"- x\n".repeat(60_000)), "f.yaml:1:1: a list has at most 1024 items");
        assert_eq!(parse(&"--- x\n".repeat(RESOURCES_MAX)).len(), RESOURCES_MAX);
        assert_eq!(error(&"--- x\n".repeat(60_000)), "f.yaml:1001:5: a file holds at most 1000 resources");
    }
}
