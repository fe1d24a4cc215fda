//! `weft log archive`: old ranges of the log become compressed segments, which everything reads as before.
//!
//! Works on the database itself, with the rights of the tables' owner, which no controller has while it runs.

use crate::command::verify::{Progress, unreadable};
use crate::failure::{Exit, Failure, Outcome, chain};
use crate::output::{Format, OutputArgs, json, print, yaml};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;
use weft_eventlog::{ArchiveConfig, ArchiveError, ArchiveReport, ConnectConfig, SEALED_AGE_MIN};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Nothing is thrown away: what is sealed is read by every command as if it were rows, and takes a tenth of the space.
SQL sees what it spans, in audit.sealed. Whole ranges of a million events are sealed, never the newest.

Examples:
  weft log archive --older-than 30d --database-url-file .weft/secrets/controller.url"
)]
pub(crate) struct Args {
    /// Seal ranges whose events are all older than this, such as 30d; at least 74h
    #[arg(long, value_name = "AGE", value_parser = humantime::parse_duration)]
    older_than: Duration,
    /// A file that holds a PostgreSQL URL of a login that owns the log's tables
    #[arg(long, env = "WEFT_DATABASE_URL_FILE", value_name = "PATH")]
    database_url_file: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

/// What was done, as programs read it.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Sealed {
    sealed_to: u64,
    events: u64,
    segments: u64,
    bytes: u64,
    tables_taken_away: u64,
}

impl From<ArchiveReport> for Sealed {
    fn from(report: ArchiveReport) -> Self {
        Self {
            sealed_to: report.sealed.0,
            events: report.events,
            segments: report.segments,
            bytes: report.bytes,
            tables_taken_away: report.tables,
        }
    }
}

pub(crate) async fn run(args: Args) -> Outcome<Exit> {
    let config =
        ArchiveConfig { connect: connect(&args)?, older_than: args.older_than, forget_outcomes: false };
    let mut progress = Progress::new("sealing");
    let report = weft_eventlog::archive(&config, |seen| progress.show(seen.sealed.0, seen.of.0)).await;
    progress.end();
    let sealed = Sealed::from(report.map_err(refused)?);
    print(&match args.output.format {
        Format::Table => text(&sealed),
        Format::Json => json(&sealed)?,
        Format::Yaml => yaml(&sealed)?,
    })?;
    Ok(Exit::Ok)
}

fn connect(args: &Args) -> Outcome<ConnectConfig> {
    let wrong = |why: &str| {
        Failure::fault(format!("the database URL in {} cannot be used: {why}", args.database_url_file.display()))
            .next("write the URL of a login that owns the log's tables; of a local mesh it is .weft/secrets/controller.url")
    };
    let text = std::fs::read_to_string(&args.database_url_file).map_err(|error| wrong(&error.to_string()))?;
    // It holds a password, so it is in no message.
    text.trim().parse().map_err(|_| wrong("it is not a PostgreSQL URL"))
}

fn refused(error: ArchiveError) -> Failure {
    match error {
        ArchiveError::Store(error) => unreadable(&error),
        ArchiveError::TooYoung => {
            let hours = SEALED_AGE_MIN.as_secs() / 3_600;
            Failure::fault(chain(&error))
                .next(format!("ask for what is older, with --older-than {hours}h or more"))
        }
        ArchiveError::Damaged { .. } | ArchiveError::Segment { .. } => {
            Failure::fault(chain(&error)).next("see what is wrong with `weft verify`")
        }
        other => Failure::fault(chain(&other)),
    }
}

fn text(sealed: &Sealed) -> String {
    let Sealed { sealed_to, events, segments, bytes, tables_taken_away } = sealed;
    if *events == 0 && *tables_taken_away == 0 {
        return format!(
            "nothing to seal: no range of the log is full and old enough; sealed up to event {sealed_to}\n"
        );
    }
    let each = bytes.checked_div(*events).unwrap_or_default();
    format!(
        "sealed {events} events in {segments} segments of {bytes} bytes, {each} for each; {tables_taken_away} tables taken \
         away; sealed up to event {sealed_to}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sealed_is_told_and_so_is_that_nothing_was() {
        let nothing = Sealed { sealed_to: 0, events: 0, segments: 0, bytes: 0, tables_taken_away: 0 };
        assert!(text(&nothing).starts_with("nothing to seal"));
        let sealed = Sealed { sealed_to: 100, events: 100, segments: 2, bytes: 5_000, tables_taken_away: 1 };
        assert!(text(&sealed).contains("100 events in 2 segments of 5000 bytes, 50 for each"));
    }

    #[test]
    fn what_is_too_young_says_how_old_it_must_be() {
        let failure = refused(ArchiveError::TooYoung);
        assert!(format!("{failure:?}").contains("--older-than 74h"), "{failure:?}");
    }
}
