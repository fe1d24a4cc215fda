//! What `apply` and `delete` share: sending changes, telling what became of them, and waiting until every sidecar has
//! them.

use crate::command::rollout::{self, CanaryArgs};
use crate::failure::{Exit, Failure, Outcome};
use crate::output::table::Table;
use crate::output::{Format, OutputArgs, json, print, yaml};
use crate::resource::Resource;
use serde::Serialize;
use std::time::Duration;
use tokio::time::{Instant, sleep};
use tonic::transport::Channel;
use weft_client::{CallError, command, retry};
use weft_proto::v1;
use weft_proto::v1::mesh_client::MeshClient;

/// How often the mesh is asked whether a change has arrived. Small beside the milliseconds that it takes to arrive.
const ARRIVAL_POLL: Duration = Duration::from_millis(10);

/// Options of every command that changes the mesh.
#[derive(Debug, clap::Args)]
pub(crate) struct ChangeArgs {
    /// Decide everything, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Why; recorded in the log
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Wait until every connected sidecar runs the change; one that is not connected is not waited for. With --canary: until the
    /// rollout ended
    #[arg(long, conflicts_with = "dry_run")]
    wait: bool,
    /// Longest to wait; with --canary, in addition to what watching takes
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration, requires = "wait")]
    timeout: Duration,
    #[command(flatten)]
    canary: CanaryArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// A duration as people write it.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let parsed: Result<jiff::SignedDuration, _> = text.parse();
    let positive = parsed.ok().and_then(|duration| Duration::try_from(duration).ok());
    positive.ok_or_else(|| "write a duration, such as 500ms, 10s or 5m".to_owned())
}

/// A change, and what it is about.
pub(crate) struct Wanted<'r> {
    pub(crate) label: String,
    pub(crate) change: v1::Change,
    /// Where it is written, if it comes from a file.
    pub(crate) resource: Option<&'r Resource>,
}

/// What became of the changes.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Report {
    version: String,
    dry_run: bool,
    repeated: bool,
    changes: Vec<Changed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arrival: Option<Arrival>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Changed {
    resource: String,
    scope: String,
    version: u64,
    changed: bool,
}

/// Every connected sidecar runs the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Arrival {
    sidecars: usize,
    /// Left out: nobody knows when these will be back.
    not_connected: usize,
    /// From the answer of the apply.
    took_ms: u64,
}

/// Sends the changes as one, and tells what became of each.
pub(crate) async fn run(
    mut client: MeshClient<Channel>,
    wanted: Vec<Wanted<'_>>,
    args: ChangeArgs,
) -> Outcome<Exit> {
    let request = v1::ApplyRequest {
        meta: Some(command(args.reason)),
        changes: wanted.iter().map(|wanted| wanted.change.clone()).collect(),
        dry_run: args.dry_run,
        canary: args.canary.wire(),
    };
    let applied = retry(|| {
        let (mut client, request) = (client.clone(), request.clone());
        async move { client.apply(request).await }
    });
    let response = applied.await.map_err(|error| explain(error, &wanted))?;
    let acknowledged = Instant::now();

    let version = response.version.unwrap_or_default();
    if let Some(outcome) = response.outcomes.first().filter(|it| request.canary.is_some() && it.changed)
        && !args.dry_run
    {
        let wait = args.wait.then_some(args.timeout);
        return rollout::follow(&client, outcome.version, wait, args.output.format).await;
    }
    // What is tried is one change: of the rollout.
    let rollout = [Wanted { label: "Rollout".to_owned(), change: v1::Change::default(), resource: None }];
    let wanted = if request.canary.is_some() { &rollout[..] } else { &wanted[..] };
    let changes = wanted.iter().zip(&response.outcomes).map(|(wanted, outcome)| Changed {
        resource: wanted.label.clone(),
        scope: outcome.scope.clone(),
        version: outcome.version,
        changed: outcome.changed,
    });
    let mut report = Report {
        version: format!("{}.{}", version.epoch, version.position),
        dry_run: args.dry_run,
        repeated: response.repeated,
        changes: changes.collect(),
        arrival: None,
    };
    if args.wait {
        report.arrival = Some(wait_for(&mut client, version, acknowledged, args.timeout).await?);
    }
    print(&match args.output.format {
        Format::Table => table(&report),
        Format::Json => json(&report)?,
        Format::Yaml => yaml(&report)?,
    })?;
    Ok(Exit::Ok)
}

/// A controller's refusal, with the line of the change at fault.
fn explain(error: CallError, wanted: &[Wanted<'_>]) -> Failure {
    let at = |change: Option<u32>| wanted.get(usize::try_from(change?).ok()?);
    let place = |change: Option<u32>, field: &str, message: &str| match at(change) {
        Some(Wanted { resource: Some(resource), .. }) => resource.explain(field, message).to_string(),
        Some(Wanted { label, .. }) => format!("{label}: {message}"),
        None => message.to_owned(),
    };
    match &error {
        CallError::Conflict { change, scope, expected, current } => {
            let message = format!("{scope} is at version {current}, not {expected}");
            let what = format!("{}; nothing was changed", place(*change, "version", &message));
            let next = format!(
                "look at what changed with `weft log --scope {scope}`, then apply again with version {current}"
            );
            Failure::new(Exit::Conflict, what).next(next)
        }
        CallError::Rejected { change: None, message, .. } => Failure::fault(message.clone()),
        CallError::Rejected { change, field, message, .. } => Failure::fault(place(*change, field, message))
            .next("mend it and apply again; nothing was changed"),
        CallError::Invalid { change, message } => {
            Failure::fault(place(*change, "", message)).next("mend it and apply again; nothing was changed")
        }
        CallError::Unreachable(_)
        | CallError::Unavailable(_)
        | CallError::NotFound(_)
        | CallError::Denied(_)
        | CallError::Overloaded(_)
        | CallError::Other { .. } => Failure::from(error),
    }
}

/// Waits until every connected sidecar runs what it should after `version`.
async fn wait_for(
    client: &mut MeshClient<Channel>,
    version: v1::ConfigVersion,
    since: Instant,
    limit: Duration,
) -> Outcome<Arrival> {
    loop {
        let status = super::answer(client.status(v1::StatusRequest { at: None }).await)?;
        let late = late(&status, version);
        if late.is_empty() {
            let sidecars = status.sidecars.iter().filter(|sidecar| sidecar.connected).count();
            return Ok(Arrival {
                sidecars,
                not_connected: status.sidecars.len() - sidecars,
                took_ms: u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
            });
        }
        if since.elapsed() > limit {
            let what = format!(
                "the change is recorded as {}.{}, but after {} s it has not arrived at {}",
                version.epoch,
                version.position,
                limit.as_secs(),
                late.join(", ")
            );
            return Err(Failure::new(Exit::CheckFailed, what).next("look at the sidecars with `weft status`"));
        }
        sleep(ARRIVAL_POLL).await;
    }
}

/// Who does not have the change yet; the projector if it has not projected it: before its checkpoint covers the change,
/// what sidecars should run is not yet said.
fn late(status: &v1::StatusResponse, version: v1::ConfigVersion) -> Vec<String> {
    let number = |version: &v1::ConfigVersion| (version.epoch, version.position);
    if status.leader.as_ref().is_none_or(|leader| leader.position < version.position) {
        return vec!["the projector".to_owned()];
    }
    let behind = |sidecar: &&v1::SidecarStatus| {
        sidecar.connected && sidecar.applied.as_ref().map(number) < sidecar.wanted.as_ref().map(number)
    };
    status.sidecars.iter().filter(behind).map(|sidecar| sidecar.instance.clone()).collect()
}

fn table(report: &Report) -> String {
    let mut table = Table::new(&["RESOURCE", "VERSION", "RESULT"]);
    for change in &report.changes {
        let result = match (change.changed, report.dry_run) {
            (true, false) => "changed",
            (true, true) => "would change",
            (false, _) => "unchanged",
        };
        table.row([change.resource.clone(), change.version.to_string(), result.to_owned()]);
    }
    let mut text = table.render();
    text.push_str(&match (report.dry_run, report.repeated) {
        (true, _) => format!("dry run: nothing was changed; the log is at {}\n", report.version),
        (false, true) => format!("this command was executed before; the log was at {}\n", report.version),
        (false, false) => format!("the log is at {}\n", report.version),
    });
    if let Some(Arrival { sidecars, not_connected, took_ms }) = report.arrival {
        text.push_str(&format!(
            "all {sidecars} connected sidecars run it, {took_ms} ms after it was recorded\n"
        ));
        if not_connected != 0 {
            text.push_str(&format!("left out, since not connected: {not_connected}; see `weft status`\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(position: u64) -> Option<v1::ConfigVersion> {
        Some(v1::ConfigVersion { epoch: 1, position })
    }

    #[test]
    fn an_answer_tells_what_changed() {
        let change = |resource: &str, changed| Changed {
            resource: resource.into(),
            scope: String::new(),
            version: 2,
            changed,
        };
        let mut report = Report {
            version: "1.42".into(),
            dry_run: false,
            repeated: false,
            changes: vec![change("Service default/db", true), change("Service default/api", false)],
            arrival: Some(Arrival { sidecars: 4, not_connected: 1, took_ms: 12 }),
        };
        let expected = "RESOURCE              VERSION   RESULT\n\
                        Service default/db    2         changed\n\
                        Service default/api   2         unchanged\n\
                        the log is at 1.42\n\
                        all 4 connected sidecars run it, 12 ms after it was recorded\n\
                        left out, since not connected: 1; see `weft status`\n";
        assert_eq!(table(&report), expected);
        report.dry_run = true;
        assert!(table(&report).contains("would change"));
    }

    #[test]
    fn who_is_late_is_told_and_who_is_away_is_not_waited_for() {
        let sidecar = |instance: &str, applied, connected| v1::SidecarStatus {
            instance: instance.into(),
            wanted: version(9),
            applied,
            connected,
            ..v1::SidecarStatus::default()
        };
        let mut status = v1::StatusResponse {
            // The fold is ahead of the rows that say what sidecars should run.
            as_of: version(10),
            leader: Some(v1::LeaderStatus { position: 9, ..v1::LeaderStatus::default() }),
            sidecars: vec![
                sidecar("there", version(9), true),
                sidecar("late", version(8), true),
                sidecar("new", None, true),
                sidecar("away", version(1), false),
            ],
            ..v1::StatusResponse::default()
        };
        assert_eq!(late(&status, version(9).unwrap()), ["late", "new"]);
        assert_eq!(late(&status, version(10).unwrap()), ["the projector"]);
        status.leader = None;
        assert_eq!(late(&status, version(9).unwrap()), ["the projector"]);
    }

    #[test]
    fn durations_are_written_as_people_do() {
        assert_eq!(duration("10m"), Ok(Duration::from_secs(600)));
        assert!(duration("-1s").is_err());
        assert!(duration("soon").is_err());
    }
}
