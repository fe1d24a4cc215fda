//! Logs of the past, read for ever. `golden_logs/*.jsonl` hold every event type at every schema version that was
//! ever written, and the `*.out` beside each says what it folds to. The README there has the format, and how to add one.
//!
//! A landed log never changes, `WEFT_ACCEPT_GOLDEN=1` or not; what it folds to may, and is reviewed as a diff.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a broken log fails the test, naming its line")]

use serde::Deserialize;
use serde_json::value::RawValue;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;
use weft_eventlog::{EventHash, RecordedEvent, UnixMicros};
use weft_model::{Epoch, Event, Fact, Position, Version};
use weft_projector::Decoder;
use weft_routing::{Hash, Projection, ShardKey};

#[test]
#[expect(clippy::disallowed_methods, reason = "how a person accepts a changed outcome")]
fn past_logs_fold_to_what_they_folded_to() {
    let accept = std::env::var("WEFT_ACCEPT_GOLDEN").is_ok();
    for log in logs() {
        let text = fs::read_to_string(&log).unwrap();
        let shown = fold(&log, &text);
        let expected = log.with_extension("out");
        let wanted = fs::read_to_string(&expected).unwrap_or_default();
        if let Some(landed) = wanted.lines().next() {
            assert_eq!(
                shown.lines().next(),
                Some(landed),
                "{} never changes: add another log",
                log.display()
            );
        }
        if accept {
            fs::write(&expected, &shown).unwrap();
        } else {
            assert!(shown == wanted, "{} folds to\n{shown}\nnot\n{wanted}", log.display());
        }
    }
}

#[test]
fn every_schema_that_can_be_read_is_in_a_log() {
    let mut held = BTreeSet::new();
    for log in logs() {
        held.extend(events(&log, &fs::read_to_string(&log).unwrap()).iter().map(of_type));
    }
    if let Some((type_name, schema)) = missing(Event::known(), &held) {
        panic!("{}", how_to_add(type_name, schema));
    }
}

#[test]
fn a_schema_that_no_log_holds_is_told() {
    let held: BTreeSet<_> = [("ServiceDeclared".to_owned(), 1)].into();
    let known = [("ServiceDeclared", 1), ("ServiceDeclared", 2)];
    assert_eq!(missing(known[..1].iter().copied(), &held), None);
    assert_eq!(missing(known.into_iter(), &held), Some(("ServiceDeclared", 2)));
    assert!(how_to_add("ServiceDeclared", 2).contains("ServiceDeclared at schema 2"));
}

/// The payload is hashed and compared byte for byte, so how it is written is as fixed as how it is read.
#[test]
fn a_payload_of_the_current_schema_is_written_as_it_was() {
    for log in logs() {
        for event in events(&log, &fs::read_to_string(&log).unwrap()) {
            let meaning = meaning(&log, &event).event;
            assert_eq!(meaning.type_name(), event.event_type);
            if meaning.schema() == event.schema {
                let (log, position) = (log.display(), event.position);
                assert_eq!(meaning.payload().unwrap(), event.payload, "{log}, line {position}");
            }
        }
    }
}

fn missing(
    mut known: impl Iterator<Item = (&'static str, u16)>,
    held: &BTreeSet<(String, u16)>,
) -> Option<(&'static str, u16)> {
    known.find(|&(type_name, schema)| !held.contains(&(type_name.to_owned(), schema)))
}

fn how_to_add(type_name: &str, schema: u16) -> String {
    let folder = folder();
    format!(
        "no golden log holds {type_name} at schema {schema}. Add a new file to {} with such an event in a history \
         that folds, as the README there says; then WEFT_ACCEPT_GOLDEN=1 writes the .out beside it",
        folder.display()
    )
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden_logs")
}

fn logs() -> Vec<PathBuf> {
    let files = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path());
    let mut logs: Vec<_> =
        files.filter(|path| path.extension().is_some_and(|extension| extension == "jsonl")).collect();
    logs.sort();
    logs
}

/// One event of a log. Its position is the number of its line.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    epoch: u64,
    scope: String,
    version: u64,
    #[serde(rename = "type")]
    event_type: String,
    schema: u16,
    actor: String,
    recorded_at: i64,
    /// Kept byte for byte.
    #[serde(borrow)]
    payload: &'a RawValue,
}

fn events(log: &Path, text: &str) -> Vec<RecordedEvent> {
    let event = |(position, line): (u64, &str)| {
        let line: Line<'_> = serde_json::from_str(line)
            .unwrap_or_else(|error| panic!("{}, line {position}: {error}", log.display()));
        RecordedEvent {
            position: Position(position),
            epoch: Epoch(line.epoch),
            scope: line.scope,
            version: Version(line.version),
            event_type: line.event_type,
            schema: line.schema,
            actor: line.actor,
            reason: None,
            cause: None,
            command_id: Uuid::nil(),
            recorded_at: UnixMicros(line.recorded_at),
            payload: line.payload.get().to_owned(),
            hash: EventHash::GENESIS,
        }
    };
    (1..).zip(text.lines()).map(event).collect()
}

fn of_type(event: &RecordedEvent) -> (String, u16) {
    (event.event_type.clone(), event.schema)
}

fn meaning(log: &Path, event: &RecordedEvent) -> Fact {
    Decoder::default()
        .decode(&event.view())
        .unwrap_or_else(|error| panic!("{}: {}", log.display(), weft_model::Chain(&error)))
}

/// Folds a log event by event, and shows what each one changed and what stands in the end.
fn fold(log: &Path, text: &str) -> String {
    let mut shown = format!("log {}\n", Hash::of(text.as_bytes()));
    let mut projection = Projection::default();
    let (mut facts, mut names) = (Vec::new(), BTreeMap::new());
    for event in events(log, text) {
        let fact = meaning(log, &event);
        let RecordedEvent { position, scope, event_type, schema, .. } = &event;
        let changes = projection
            .apply([&fact])
            .unwrap_or_else(|error| panic!("{}, line {position}: {error}", log.display()));
        writeln!(shown, "\n{} {scope} {event_type} {schema}", fact.config_version()).unwrap();
        if fact.event.schema() != *schema {
            writeln!(shown, "    read as {} {}", fact.event.schema(), fact.event.payload().unwrap()).unwrap();
        }
        for key in &changes.shards {
            show_shard(&mut shown, &projection, key);
        }
        names.extend(projection.classes().iter().map(|(id, class)| (*id, Arc::clone(&class.interest))));
        let mut touched: Vec<_> = changes.manifests.union(&changes.classes).collect();
        touched.sort_by_key(|id| &names[*id]);
        for id in touched {
            match projection.classes().get(id) {
                Some(class) => {
                    writeln!(shown, "    {} manifest of {}", class.manifest.hash(), class.interest).unwrap();
                }
                None => writeln!(shown, "    gone: manifest of {}", names[id]).unwrap(),
            }
        }
        facts.push(fact);
    }
    assert_eq!(projection.recompute(), projection, "{}", log.display());
    let mut at_once = Projection::default();
    at_once.apply(&facts).unwrap();
    assert_eq!(at_once, projection, "{} in one batch", log.display());
    show_end(&mut shown, &projection);
    shown
}

fn show_shard(shown: &mut String, projection: &Projection, key: &ShardKey) {
    match projection.shards().get(key) {
        Some(shard) => writeln!(shown, "    {} {key} at {}", shard.hash, shard.position).unwrap(),
        None => writeln!(shown, "    none: {key}").unwrap(),
    }
}

fn show_end(shown: &mut String, projection: &Projection) {
    writeln!(shown, "\nin the end {}", projection.version()).unwrap();
    for key in projection.shards().keys() {
        show_shard(shown, projection, key);
    }
    let mut classes: Vec<_> = projection.classes().values().collect();
    classes.sort_by_key(|class| &class.interest);
    for class in classes {
        let (hash, interest, position) = (class.manifest.hash(), &class.interest, class.position);
        writeln!(shown, "    {hash} manifest of {interest} at {position}").unwrap();
    }
    for instance in projection.sidecars() {
        let wanted = projection.wanted(instance).unwrap();
        writeln!(shown, "    {instance} wants {}", wanted.version).unwrap();
    }
}
