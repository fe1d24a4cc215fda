//! Reading the fields of one mapping, with errors that name the field, what is allowed and what was probably meant.

use crate::resource::node::{FileError, Node, Place, Value};
use jiff::SignedDuration;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// A mapping whose field names are all known.
#[derive(Clone, Debug)]
pub(crate) struct Fields<'n> {
    node: &'n Node,
    path: String,
}

/// One value of a mapping or list, and its path from the resource's top.
#[derive(Clone, Debug)]
pub(crate) struct Field<'n> {
    node: &'n Node,
    path: String,
}

impl<'n> Fields<'n> {
    /// The resource's own fields.
    pub(crate) fn of_resource(node: &'n Node, allowed: &[&str]) -> Result<Self, FileError> {
        Self::of(Field { node, path: String::new() }, allowed)
    }

    fn of(field: Field<'n>, allowed: &[&str]) -> Result<Self, FileError> {
        let Value::Map(entries) = &field.node.value else {
            let rule = format!("must be a mapping with the fields {}", allowed.join(", "));
            return Err(field.wrong(&rule));
        };
        if let Some((key, _)) = entries.iter().find(|(key, _)| !allowed.contains(&key.text.as_str())) {
            let inside = if field.path.is_empty() { String::new() } else { format!(" in {}", field.path) };
            let message = format!("unknown field {:?}{inside}; {}", key.text, suggestion(&key.text, allowed));
            return Err(FileError { place: key.place.clone(), message });
        }
        Ok(Self { node: field.node, path: field.path })
    }

    /// A field that may be left out; null counts as left out.
    pub(crate) fn optional(&self, name: &str) -> Option<Field<'n>> {
        let Value::Map(entries) = &self.node.value else { return None };
        let (_, node) = entries.iter().find(|(key, _)| key.text == name)?;
        (node.value != Value::Null).then(|| Field { node, path: join(&self.path, name) })
    }

    /// A field that must be there.
    pub(crate) fn required(&self, name: &str) -> Result<Field<'n>, FileError> {
        self.optional(name).ok_or_else(|| {
            let message = format!("field {:?} is missing", join(&self.path, name));
            FileError { place: self.node.place.clone(), message }
        })
    }

    /// Every name and value, where names are free.
    pub(crate) fn entries(field: &Field<'n>) -> Result<Vec<(String, Field<'n>)>, FileError> {
        let Value::Map(entries) = &field.node.value else { return Err(field.wrong("must be a mapping")) };
        let each = |(key, node): &'n (_, Node)| {
            let key: &crate::resource::node::Key = key;
            (key.text.clone(), Field { node, path: join(&field.path, &key.text) })
        };
        Ok(entries.iter().map(each).collect())
    }
}

impl<'n> Field<'n> {
    /// The fields of a mapping.
    pub(crate) fn fields(self, allowed: &[&str]) -> Result<Fields<'n>, FileError> {
        Fields::of(self, allowed)
    }

    /// The text of a single value.
    pub(crate) fn text(&self) -> Result<&'n str, FileError> {
        match &self.node.value {
            Value::Text(text) => Ok(text),
            Value::Null | Value::List(_) | Value::Map(_) => {
                Err(self.wrong(&format!("must be a single value, and this is {}", self.node.what())))
            }
        }
    }

    /// The text, if it is a single value.
    pub(crate) fn as_text(&self) -> Option<&'n str> {
        self.text().ok()
    }

    /// A value that is written as text.
    pub(crate) fn parse<T: FromStr<Err: Display>>(&self) -> Result<T, FileError> {
        self.text()?.parse().map_err(|error: T::Err| self.wrong(&format!("{error}")))
    }

    /// A whole number within bounds.
    pub(crate) fn number(&self, bounds: RangeInclusive<u64>) -> Result<u64, FileError> {
        let number = self.text()?.parse().ok().filter(|number| bounds.contains(number));
        number.ok_or_else(|| {
            self.wrong(&format!("must be a whole number from {} to {}", bounds.start(), bounds.end()))
        })
    }

    /// One of a few words.
    pub(crate) fn word<T: Copy>(&self, words: &[(&str, T)]) -> Result<T, FileError> {
        let text = self.text()?;
        words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value).ok_or_else(|| {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.wrong(&format!("{text:?} is not known; {}", suggestion(text, &known)))
        })
    }

    /// A duration in whole milliseconds, such as `500ms`, `2s` or `1m 30s`.
    pub(crate) fn duration_ms(&self) -> Result<u32, FileError> {
        let duration: Option<SignedDuration> = self.text()?.parse().ok();
        let whole = duration.filter(|duration| duration.subsec_nanos() % 1_000_000 == 0);
        whole.and_then(|duration| u32::try_from(duration.as_millis()).ok()).ok_or_else(|| {
            self.wrong("must be a duration in whole milliseconds, such as 500ms, 2s or 1m 30s")
        })
    }

    /// The items of a list.
    pub(crate) fn list(&self) -> Result<Vec<Self>, FileError> {
        let Value::List(items) = &self.node.value else {
            return Err(self.wrong(&format!("must be a list, and this is {}", self.node.what())));
        };
        let item = |(index, node)| Field { node, path: format!("{}[{index}]", self.path) };
        Ok(items.iter().enumerate().map(item).collect())
    }

    /// The items of a list, each written as text.
    pub(crate) fn parse_list<C, T>(&self) -> Result<C, FileError>
    where
        C: FromIterator<T>,
        T: FromStr<Err: Display>,
    {
        self.list()?.iter().map(Field::parse).collect()
    }

    /// Where it stands.
    pub(crate) const fn place(&self) -> &'n Place {
        &self.node.place
    }

    /// The error that says what must hold for this field.
    pub(crate) fn wrong(&self, rule: &str) -> FileError {
        let subject = if self.path.is_empty() { "a resource".to_owned() } else { self.path.clone() };
        FileError { place: self.node.place.clone(), message: format!("{subject}: {rule}") }
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// What was probably meant, and what would be allowed.
pub(crate) fn suggestion(given: &str, allowed: &[&str]) -> String {
    // Two edits catch a transposition and a forgotten plural; more would guess.
    let nearest = allowed.iter().map(|word| (edits(given, word), word)).min();
    let list = allowed.join(", ");
    match nearest {
        Some((0..=2, word)) => format!("did you mean {word:?}? allowed: {list}"),
        _ => format!("allowed: {list}"),
    }
}

/// Levenshtein's distance, case folded. Both words are short.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.to_lowercase().chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.to_lowercase().chars().take(64).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_words_are_suggested_and_far_ones_are_not() {
        assert_eq!(suggestion("prots", &["ports", "name"]), "did you mean \"ports\"? allowed: ports, name");
        assert_eq!(suggestion("colour", &["ports", "name"]), "allowed: ports, name");
        assert_eq!(edits("service", "Service"), 0);
        assert_eq!(edits("", "abc"), 3);
    }

    #[test]
    fn durations_are_whole_milliseconds() {
        let parse = |text: &str| {
            let nodes = Node::parse_all("f", &format!("- {text}")).unwrap();
            let top = Field { node: &nodes[0], path: "t".into() };
            top.list().unwrap()[0].duration_ms().ok()
        };
        assert_eq!(parse("500ms"), Some(500));
        assert_eq!(parse("1m 30s"), Some(90_000));
        assert_eq!(parse("2s"), Some(2_000));
        for bad in ["500", "-1s", "1us", "soon", "99999h"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
