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
use weft_model::Position;
use weft_projector::{FoldToError, RowsReport, Store, VerifyRowsError};

/// Differences that are listed; the first ones say where to look.
const DIFFERENCES_SHOWN: usize = 20;

const RESTORE: &str = "the database was changed behind the log's back: restore it from a backup";
const UNFOLDABLE: &str =
    "use the `weft` of the controllers' version; if it is that already, restore the database from a backup";
const REWRITE: &str = "the stored state is wrong though the log is sound: restart the leading controller, which rewrites the rows when it begins to lead";

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
    /// What to do about what is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<&'static str>,
    checkpoint: String,
    rows: usize,
    manifests_hash: String,
    differences: Vec<String>,
    took_ms: u64,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let context = context.load()?;
    let reader = Reader::new(context.reader()?);
    let store = Store::reading(&context.reader_url()?).map_err(|error| Failure::from_error(&error))?;
    let begun = Instant::now();

    let mut report = Report::default();
    let mut progress = Progress::new("checking the chain of");
    let log = weft_eventlog::verify(&reader, |seen| progress.show(seen.checked.0, seen.of.0)).await;
    progress.end();
    report.take_log(log)?;
    // A log that is not sound may still fold; what follows from it proves nothing.
    if report.damaged_at.is_none() {
        let mut progress = Progress::new("folding");
        let rows =
            weft_projector::verify_rows(&reader, &store, |seen| progress.show(seen.folded.0, seen.of.0))
                .await;
        progress.end();
        report.take_rows(rows)?;
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

/// What follows from rows that were projected from events that the log does not have.
pub(crate) fn lost(projected: Position, head: Position) -> String {
    format!("rows were projected up to {projected}, the log ends at {head}: events were lost")
}

pub(crate) fn unreadable(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::fault(chain(error))
        .next("is the mesh's database up? see `weft status`, or start it with `weft up`")
}

impl Report {
    fn take_log(&mut self, log: Result<VerifyReport, VerifyError>) -> Outcome<()> {
        match log {
            Ok(log) => {
                self.events = log.events;
                self.scopes = log.scopes;
                self.epochs = log.epochs;
                self.head = format!("{}.{}", log.head.epoch, log.head.position);
                self.head_hash = log.head.hash.to_string();
            }
            Err(VerifyError::Damaged { position, defect }) => {
                self.damaged_at = Some(position.0);
                self.take_defect(format!("the log is damaged at position {position}: {defect}"), RESTORE);
            }
            Err(error @ VerifyError::Store(_)) => return Err(unreadable(&error)),
        }
        Ok(())
    }

    fn take_rows(&mut self, rows: Result<RowsReport, VerifyRowsError>) -> Outcome<()> {
        match rows {
            Ok(rows) => {
                self.checkpoint = rows.checkpoint.to_string();
                self.rows = rows.rows;
                self.manifests_hash = rows.manifests.to_string();
                self.differences = rows.differences.iter().map(ToString::to_string).collect();
                self.next = (!rows.differences.is_empty()).then_some(REWRITE);
            }
            Err(VerifyRowsError::Fold(FoldToError::Fault(fault))) => {
                self.take_defect(format!("the log cannot be folded: {}", chain(&fault)), UNFOLDABLE);
            }
            Err(VerifyRowsError::Fold(FoldToError::NotYet { wanted, head })) => {
                self.take_defect(lost(wanted, head), RESTORE);
            }
            Err(error @ (VerifyRowsError::Store(_) | VerifyRowsError::Fold(FoldToError::Store(_)))) => {
                return Err(unreadable(&error));
            }
        }
        Ok(())
    }

    fn take_defect(&mut self, defect: String, next: &'static str) {
        self.defect = Some(defect);
        self.next = Some(next);
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let mut line =
        |ok: bool, what: String| text.push_str(&format!("{}  {what}\n", if ok { "ok  " } else { "FAIL" }));
    if report.damaged_at.is_none() {
        line(
            true,
            format!(
                "log: {} events in {} scopes and {} epoch(s), no gap, every hash right; head {} {}",
                report.events, report.scopes, report.epochs, report.head, report.head_hash
            ),
        );
    }
    match &report.defect {
        Some(defect) => line(false, defect.clone()),
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
    for difference in report.differences.iter().take(DIFFERENCES_SHOWN) {
        text.push_str(&format!("      {difference}\n"));
    }
    text.push_str(&match report.next {
        Some(next) => format!("{next}\n"),
        None => format!("verified in {} ms\n", report.took_ms),
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
    use weft_projector::Difference;
    use weft_routing::Hash;

    #[test]
    fn soundness_and_its_opposite_are_told() {
        let rows = |differences: Vec<Difference>| RowsReport {
            checkpoint: "1.42".parse().unwrap(),
            rows: 7,
            manifests: Hash::of(b""),
            differences,
        };
        let told = |rows: Result<RowsReport, VerifyRowsError>| {
            let mut report = Report::default();
            report.take_rows(rows).unwrap();
            text(&report)
        };
        let right = told(Ok(rows(Vec::new())));
        assert!(right.contains("ok    state: refolded") && right.contains("verified in"), "{right}");

        let missing = Difference::Missing { table: "weft.class_manifest", key: "x".into() };
        let wrong = told(Ok(rows(vec![missing])));
        assert!(wrong.contains("FAIL  state: 1 of the rows"), "{wrong}");
        assert!(wrong.contains("      weft.class_manifest: x is missing"), "{wrong}");
        assert!(wrong.ends_with(&format!("{REWRITE}\n")), "{wrong}");

        let cut = FoldToError::NotYet { wanted: Position(58), head: Position(57) };
        let cut = told(Err(cut.into()));
        assert!(
            cut.contains("FAIL  rows were projected up to 58, the log ends at 57: events were lost"),
            "{cut}"
        );
        assert!(cut.ends_with(&format!("{RESTORE}\n")), "{cut}");
    }
}
