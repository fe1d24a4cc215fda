//! Events in a file, one a line, as the log stores them: so that whoever reads them decodes them.

use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use weft_model::{Decoder, Epoch, Fact, Position, StoredEvent, Timestamp, Version};

#[derive(Serialize, Deserialize)]
struct Line<'a> {
    epoch: u64,
    position: u64,
    version: u64,
    at: i64,
    actor: Cow<'a, str>,
    scope: Cow<'a, str>,
    event_type: Cow<'a, str>,
    schema: u16,
    payload: Cow<'a, str>,
}

pub(super) struct Writer(BufWriter<File>);

impl Writer {
    pub(super) fn create(path: &Path) -> anyhow::Result<Self> {
        Ok(Self(BufWriter::new(File::create(path)?)))
    }

    pub(super) fn append(&mut self, fact: &Fact) -> anyhow::Result<()> {
        let line = Line {
            epoch: fact.epoch.0,
            position: fact.position.0,
            version: fact.version.0,
            at: fact.at.0,
            actor: (&*fact.actor).into(),
            scope: fact.scope.to_string().into(),
            event_type: fact.event.type_name().into(),
            schema: fact.event.schema(),
            payload: fact.event.payload()?.into(),
        };
        serde_json::to_writer(&mut self.0, &line)?;
        Ok(self.0.write_all(b"\n")?)
    }

    pub(super) fn flush(&mut self) -> anyhow::Result<()> {
        Ok(self.0.flush()?)
    }
}

/// Gives every event in turn.
pub(super) fn read(path: &Path, mut each: impl FnMut(Fact) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut decoder = Decoder::default();
    for line in BufReader::new(File::open(path)?).lines() {
        let line = line?;
        let stored: Line<'_> = serde_json::from_str(&line).context("a stored event is not readable")?;
        let fact = decoder.decode(&StoredEvent {
            epoch: Epoch(stored.epoch),
            position: Position(stored.position),
            version: Version(stored.version),
            at: Timestamp(stored.at),
            actor: &stored.actor,
            scope: &stored.scope,
            event_type: &stored.event_type,
            schema: stored.schema,
            payload: &stored.payload,
        })?;
        each(fact)?;
    }
    Ok(())
}
