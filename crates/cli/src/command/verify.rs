//! `weft verify`: proof that the log is what was appended, and that the stored state is what follows from it.
//!
//! Reads the database itself, as a role that may only read: a controller need not be believed, nor run.

use crate::context::ContextArgs;
use crate::failure::{Exit, Failure, Outcome, chain};
use crate::output::{Format, OutputArgs, json, print, yaml};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use tokio::time::Instant;
use weft_eventlog::{Reader, VerifyError, VerifyReport};
use weft_projector::{RowsReport, Store, VerifyRowsError};

/// Differences that are listed; the first ones say where to look.
const DIFFERENCES_SHOWN: usize = 20;

#[derive(Debug, clap::Args)]
#[command(after_help = "Exits with 2 if the log or the stored state is not what it should be.\n\
    The log's end (position and hash), noted elsewhere, proves the whole log up to it.")]
pub(crate) struct Args {
    #[command(flatten)]
    output: OutputArgs,
}

/// What was proven, or the first thing that is wrong.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Report {
    sound: bool,
    events: u64,
    scopes: u64,
    epochs: u64,
    head: String,
    head_hash: String,
    /// Where the log is damaged first.
    #[serde(skip_serializing_if = "Option::is_none")]
    damaged_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    defect: Option<String>,
    checkpoint: String,
    rows: usize,
    manifests_hash: String,
    differences: Vec<String>,
    took_ms: u64,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let context = context.load()?;
    let reader = Reader::new(context.reader()?);
    let store = Store::new(&context.reader_url()?).map_err(|error| Failure::from_error(&error))?;
    let begun = Instant::now();

    let mut report = Report::default();
    let mut progress = Progress::new("checking the chain of");
    let log = weft_eventlog::verify(&reader, |seen| progress.show(seen.checked.0, seen.of.0)).await;
    progress.end();
    match log {
        Ok(log) => report.take_log(&log),
        Err(VerifyError::Damaged { position, defect }) => {
            report.damaged_at = Some(position.0);
            report.defect = Some(defect.to_string());
        }
        Err(error @ VerifyError::Store(_)) => return Err(unreadable(&error)),
    }
    // A log that is not sound may still fold; what follows from it proves nothing.
    if report.damaged_at.is_none() {
        let mut progress = Progress::new("folding");
        let rows =
            weft_projector::verify_rows(&reader, &store, |seen| progress.show(seen.folded.0, seen.of.0))
                .await;
        progress.end();
        match rows {
            Ok(rows) => report.take_rows(&rows),
            Err(VerifyRowsError::Fold(weft_projector::FoldToError::Fault(fault))) => {
                report.defect = Some(chain(&fault));
            }
            Err(error) => return Err(unreadable(&error)),
        }
    }
    store.close().await;
    report.sound = report.defect.is_none() && report.differences.is_empty();
    report.took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    print(&match args.output.format {
        Format::Table => text(&report),
        Format::Json => json(&report)?,
        Format::Yaml => yaml(&report)?,
    })?;
    Ok(if report.sound { Exit::Ok } else { Exit::CheckFailed })
}

pub(crate) fn unreadable(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::fault(chain(error))
        .next("is the mesh's database up? see `weft status`, or start it with `weft up`")
}

impl Report {
    fn take_log(&mut self, log: &VerifyReport) {
        self.events = log.events;
        self.scopes = log.scopes;
        self.epochs = log.epochs;
        self.head = format!("{}.{}", log.head.epoch, log.head.position);
        self.head_hash = log.head.hash.to_string();
    }

    fn take_rows(&mut self, rows: &RowsReport) {
        self.checkpoint = rows.checkpoint.to_string();
        self.rows = rows.rows;
        self.manifests_hash = rows.manifests.to_string();
        self.differences = rows.differences.iter().map(ToString::to_string).collect();
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let mut line =
        |ok: bool, what: String| text.push_str(&format!("{}  {what}\n", if ok { "ok  " } else { "FAIL" }));
    match (&report.damaged_at, &report.defect) {
        (Some(position), Some(defect)) => {
            line(false, format!("the log is damaged at position {position}: {defect}"));
        }
        (_, defect) => {
            line(
                true,
                format!(
                    "log: {} events in {} scopes and {} epoch(s), no gap, every hash right; head {} {}",
                    report.events, report.scopes, report.epochs, report.head, report.head_hash
                ),
            );
            match defect {
                Some(defect) => line(false, format!("the log cannot be folded: {defect}")),
                None if report.differences.is_empty() => line(
                    true,
                    format!(
                        "state: refolded from the first event to {}, {} rows equal; manifests {}",
                        report.checkpoint, report.rows, report.manifests_hash
                    ),
                ),
                None => line(
                    false,
                    format!(
                        "state: {} of the rows at {} are not what the log says",
                        report.differences.len(),
                        report.checkpoint
                    ),
                ),
            }
        }
    }
    for difference in report.differences.iter().take(DIFFERENCES_SHOWN) {
        text.push_str(&format!("      {difference}\n"));
    }
    text.push_str(&match report.sound {
        true => format!("verified in {} ms\n", report.took_ms),
        false if report.damaged_at.is_some() => {
            "the database was changed behind the log's back: restore it from a backup\n".to_owned()
        }
        false => {
            "the stored state is wrong though the log is sound: let it be built anew (see docs)\n".to_owned()
        }
    });
    text
}

/// One line that counts, on a terminal only.
pub(crate) struct Progress {
    what: &'static str,
    shown: bool,
}

impl Progress {
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, shown: false }
    }

    pub(crate) fn show(&mut self, done: u64, of: u64) {
        let mut out = std::io::stderr();
        if out.is_terminal() {
            self.shown = true;
            // Whoever does not see it misses nothing.
            let _ = write!(out, "\r{} event {done} of {of}", self.what);
        }
    }

    pub(crate) fn end(self) {
        if self.shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soundness_and_its_opposite_are_told() {
        let mut report =
            Report { sound: true, head: "1.42".into(), checkpoint: "1.42".into(), ..Report::default() };
        assert!(text(&report).contains("ok    state: refolded"), "{}", text(&report));
        report.sound = false;
        report.differences = vec!["weft.lease: x is missing".into()];
        let told = text(&report);
        assert!(
            told.contains("FAIL  state: 1 of the rows") && told.contains("      weft.lease: x"),
            "{told}"
        );
        report.damaged_at = Some(7);
        report.defect = Some("the event is missing".into());
        assert!(text(&report).starts_with("FAIL  the log is damaged at position 7: the event is missing\n"));
    }
}
