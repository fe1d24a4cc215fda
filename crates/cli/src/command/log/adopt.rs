//! `weft log adopt-history`: go on with a log that lost events which were seen.
//!
//! Shows first what would be given up and who has seen it, and asks. What the controller then settles is what was shown: if
//! more turns out to be lost meanwhile, it refuses, and one looks again.

use crate::command::answer;
use crate::context::ContextArgs;
use crate::failure::{Exit, Failure, Outcome};
use crate::output::table::Table;
use crate::output::text::printable;
use crate::output::time::point;
use crate::output::{Format, OutputArgs, json, print, yaml};
use serde::Serialize;
use std::io::{IsTerminal, Write, stdin, stdout};
use weft_client::{CallError, command, retry};
use weft_proto::v1;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Restore what was lost instead, if any backup or standby has it: then nothing has to be adopted.

Examples:
  weft log adopt-history --reason 'the backup of Monday is all there is'
  weft log adopt-history --reason 'failover, see ticket 7' --yes"
)]
pub(crate) struct Args {
    /// Why the lost events are given up; recorded
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    reason: String,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// What was decided, as programs read it.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Adopted {
    epoch: u64,
    fork_position: u64,
    settled: u64,
    version: Option<String>,
}

fn reason(text: &str) -> Result<String, String> {
    let text = text.trim();
    if text.is_empty() { Err("say why the lost events are given up".into()) } else { Ok(text.to_owned()) }
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let mut client = context.load()?.client()?;
    let status = answer(client.status(v1::StatusRequest { at: None }).await)?;
    let Some(upto) = status.rewinds.iter().map(|rewind| rewind.id).max() else {
        return Err(Failure::fault(
            "the log was not found to have lost anything, so there is nothing to adopt",
        )
        .next("look at the mesh with `weft status`"));
    };
    eprint!("{}", lost(&status));
    if !args.yes && !confirmed()? {
        return Err(Failure::fault("nothing was decided: changes stay refused")
            .next("restore what was lost, or run it again with --yes"));
    }
    let request = v1::AdoptHistoryRequest { meta: Some(command(args.reason)), rewind_upto: upto };
    let adopting = retry(|| {
        let (mut client, request) = (client.clone(), request.clone());
        async move { client.adopt_history(request).await }
    });
    let response = adopting.await.map_err(refused)?;
    let version = response.version.map(|version| format!("{}.{}", version.epoch, version.position));
    let adopted = Adopted {
        epoch: response.epoch,
        fork_position: response.fork_position,
        settled: response.rewind_upto,
        version,
    };
    print(&match args.output.format {
        Format::Table => text(&adopted),
        Format::Json => json(&adopted)?,
        Format::Yaml => yaml(&adopted)?,
    })?;
    Ok(Exit::Ok)
}

fn refused(error: CallError) -> Failure {
    match error {
        CallError::Other { message, .. } => {
            Failure::fault(message).next("look at what stands now with `weft status`")
        }
        other => Failure::from(other),
    }
}

/// A person at a terminal is asked; a script has to say it.
fn confirmed() -> Outcome<bool> {
    if !stdin().is_terminal() {
        return Ok(false);
    }
    eprint!("Give these events up for good? Type yes: ");
    let mut line = String::new();
    let read = stdout().flush().and_then(|()| stdin().read_line(&mut line));
    read.map_err(|error| Failure::from_error(&error))?;
    Ok(line.trim() == "yes")
}

fn version(version: Option<v1::ConfigVersion>) -> String {
    let version = version.unwrap_or_default();
    format!("{}.{}", version.epoch, version.position)
}

/// What is given up, and who has seen it.
fn lost(status: &v1::StatusResponse) -> String {
    let mut table = Table::new(&["SEEN", "BY", "LOG ENDED AT", "NOW THERE", "REPORTED"]);
    for rewind in &status.rewinds {
        table.row([
            version(rewind.seen),
            printable(&rewind.witness),
            version(rewind.found),
            if rewind.found_hash.is_empty() { "nothing".to_owned() } else { "another event".to_owned() },
            point(rewind.reported_at_ms),
        ]);
    }
    let number = |version: Option<v1::ConfigVersion>| version.unwrap_or_default().position;
    let seen = status.rewinds.iter().map(|rewind| number(rewind.seen)).max().unwrap_or_default();
    let ended = status.rewinds.iter().map(|rewind| number(rewind.found)).min().unwrap_or_default();
    let first = status.rewinds.iter().map(|rewind| number(rewind.seen)).min().unwrap_or_default();
    let from = ended.min(first.saturating_sub(1)) + 1;
    format!(
        "LOG_REWOUND: events {from} to {seen} were seen, at the least, and are not in the log any more.\n\
         They are given up: what they said is not so any more, and their positions get other events.\n\n{}\n",
        table.render()
    )
}

fn text(adopted: &Adopted) -> String {
    let Adopted { epoch, fork_position, version, .. } = adopted;
    let recorded = match version {
        Some(version) => format!("recorded as {version}"),
        None => "a controller records it in a moment; see `weft log`".to_owned(),
    };
    format!(
        "the log is adopted as epoch {epoch}; what was seen after event {fork_position} is given up; {recorded}\n\
         changes are taken again; look at the sidecars with `weft status`\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(epoch: u64, position: u64) -> Option<v1::ConfigVersion> {
        Some(v1::ConfigVersion { epoch, position })
    }

    #[test]
    fn what_is_given_up_is_told_with_who_has_seen_it() {
        let rewind = |id, seen, witness: &str| v1::Rewind {
            id,
            seen,
            found: at(2, 10),
            witness: witness.into(),
            reported_at_ms: 1_772_366_400_000,
            ..v1::Rewind::default()
        };
        let rewinds = vec![
            rewind(1, at(1, 15), "sidecar default/api/one"),
            rewind(2, at(1, 17), "controller c1\u{1b}[2J"),
        ];
        let text = lost(&v1::StatusResponse { rewinds, ..v1::StatusResponse::default() });
        assert!(text.contains("events 11 to 17 were seen"), "{text}");
        assert!(
            text.contains("sidecar default/api/one") && text.contains("1.15") && text.contains("2.10"),
            "{text}"
        );
        assert!(!text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn a_decision_needs_a_reason() {
        assert!(reason("  ").is_err());
        assert_eq!(reason(" why "), Ok("why".to_owned()));
    }

    #[test]
    fn the_answer_says_what_holds_now() {
        let adopted = Adopted { epoch: 3, fork_position: 10, settled: 2, version: Some("3.11".into()) };
        assert_eq!(
            text(&adopted),
            "the log is adopted as epoch 3; what was seen after event 10 is given up; recorded as 3.11\n\
             changes are taken again; look at the sidecars with `weft status`\n"
        );
    }
}
