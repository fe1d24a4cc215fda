//! The records that sidecars write about connections, read as a user's log collector reads them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use crate::wait::until;

/// How long a record may take to be in the file after its connection ended.
const WRITTEN_LIMIT: Duration = Duration::from_secs(5);

/// One sidecar's records.
#[derive(Clone, Debug)]
pub struct Records {
    file: PathBuf,
}

/// One connection, as one sidecar recorded it.
#[derive(Clone, Debug, PartialEq)]
pub struct Record(Value);

impl Records {
    /// Those in a file of JSON lines.
    pub fn of(file: PathBuf) -> Self {
        Self { file }
    }

    /// How many bytes there are by now: [`Self::after`] reads what is written later.
    ///
    /// # Errors
    ///
    /// The file cannot be looked at.
    pub fn mark(&self) -> anyhow::Result<usize> {
        match std::fs::metadata(&self.file) {
            Ok(found) => Ok(usize::try_from(found.len())?),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error).with_context(|| self.file.display().to_string()),
        }
    }

    /// Every whole record after a mark.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or holds something else.
    pub fn after(&self, mark: usize) -> anyhow::Result<Vec<Record>> {
        read(&self.file, mark).with_context(|| self.file.display().to_string())
    }

    /// Waits for a record after a mark that is as wanted.
    ///
    /// # Errors
    ///
    /// None is written in time.
    pub async fn find(
        &self,
        mark: usize,
        what: &str,
        wanted: impl Fn(&Record) -> bool,
    ) -> anyhow::Result<Record> {
        until(&format!("{what} in {}", self.file.display()), WRITTEN_LIMIT, async || {
            let records = self.after(mark)?;
            match records.iter().rev().find(|record| wanted(record)) {
                Some(record) => Ok(record.clone()),
                None => bail!(
                    "{} new records, the last one {}",
                    records.len(),
                    records.last().map_or_else(|| "none".to_owned(), |record| record.0.to_string())
                ),
            }
        })
        .await
    }
}

fn read(file: &Path, mark: usize) -> anyhow::Result<Vec<Record>> {
    let text = match std::fs::read(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let text = String::from_utf8(text.get(mark..).context("the file became shorter")?.to_vec())?;
    let mut records = Vec::new();
    for line in text.split_inclusive('\n') {
        // The last one may be half written.
        if let Some(line) = line.strip_suffix('\n') {
            records.push(Record(serde_json::from_str(line).with_context(|| format!("no record: {line}"))?));
        }
    }
    Ok(records)
}

impl Record {
    /// A field's text; empty if it is absent or no text.
    pub fn text(&self, field: &str) -> &str {
        self.0.get(field).and_then(Value::as_str).unwrap_or_default()
    }

    /// A field's number, if it is one.
    pub fn number(&self, field: &str) -> Option<u64> {
        self.0.get(field).and_then(Value::as_u64)
    }

    /// Whether a field says yes.
    pub fn flag(&self, field: &str) -> bool {
        self.0.get(field).and_then(Value::as_bool).unwrap_or_default()
    }

    /// Whether these fields hold these texts.
    pub fn is(&self, fields: &[(&str, &str)]) -> bool {
        fields.iter().all(|(field, text)| self.text(field) == *text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_whole_records_after_the_mark_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("records");
        let records = Records::of(file.clone());
        assert_eq!(records.mark().unwrap(), 0);
        assert!(records.after(0).unwrap().is_empty());

        std::fs::write(&file, "{\"id\":\"old\"}\n").unwrap();
        let mark = records.mark().unwrap();
        std::fs::write(&file, "{\"id\":\"old\"}\n{\"id\":\"new\",\"n\":1}\n{\"id\":").unwrap();
        let new = records.after(mark).unwrap();
        assert_eq!(new.len(), 1);
        assert_eq!((new[0].text("id"), new[0].number("n")), ("new", Some(1)));
        let found = records.find(mark, "it", |record| record.is(&[("id", "new")])).await.unwrap();
        assert_eq!(found, new[0]);
    }
}
