//! `weft rollout`: what canaries try, and how to end it by hand. Also what `apply --canary` needs: its options, and waiting for the
//! end.

use crate::command::short_actor;
use crate::context::ContextArgs;
use crate::failure::{Exit, Failure, Outcome};
use crate::output::table::Table;
use crate::output::text::{printable, printable_lines};
use crate::output::{Format, OutputArgs, json, print, time, yaml};
use serde::Serialize;
use std::time::Duration;
use tokio::time::{Instant, sleep};
use tonic::transport::Channel;
use weft_client::{command, retry};
use weft_model::rollout::WHOLE_PPM;
use weft_proto::v1;
use weft_proto::v1::mesh_client::MeshClient;

/// How often a rollout is looked at while somebody waits for its end.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a controller may take to know of a rollout that another one began.
const BEHIND_MAX: Duration = Duration::from_secs(10);

/// Options of a change that some sidecars get first.
#[derive(Debug, clap::Args)]
pub(crate) struct CanaryArgs {
    /// Give policies to so large a share of the sidecars that they concern first, at least one; to everybody if nothing goes wrong
    /// there
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    canary: Option<u32>,
    /// For how long canaries are watched, once all of them run it
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = super::change::duration, requires = "canary")]
    watch: Duration,
    /// Take it back if more of a canary's connections than this are refused or fail
    #[arg(long, value_name = "PERCENT", default_value = "1%", value_parser = percent, requires = "canary")]
    tolerance: u32,
}

impl CanaryArgs {
    pub(crate) fn wire(&self) -> Option<v1::Canary> {
        let watch_ms = u32::try_from(self.watch.as_millis()).unwrap_or(u32::MAX);
        let tolerance_ppm = self.tolerance;
        self.canary.map(|share_ppm| v1::Canary { share_ppm, watch_ms, tolerance_ppm })
    }
}

/// A share as people write it, in parts per million.
fn percent(text: &str) -> Result<u32, String> {
    let number = text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
    let ppm = number.map(|number| (number * f64::from(WHOLE_PPM) / 100.0).round());
    match ppm {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a whole number within the range"
        )]
        Some(ppm) if (0.0..=f64::from(WHOLE_PPM)).contains(&ppm) => Ok(ppm as u32),
        Some(_) | None => Err("write a share from 0% to 100%, such as 5% or 0.5%".to_owned()),
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Give it to everybody now
    Advance(EndArgs),
    /// Take it back now
    Abort(EndArgs),
}

#[derive(Debug, clap::Args)]
struct EndArgs {
    /// Why; recorded in the log
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let client = context.load()?.client()?;
    let rollout = look(&client).await?;
    let Some(action) = args.action else {
        show(&rollout, args.output.format)?;
        return Ok(Exit::Ok);
    };
    if rollout.state != "running" {
        return Err(
            Failure::fault("no rollout is running").next("see how the last one ended with `weft rollout`")
        );
    }
    // Whatever began meanwhile is not what was looked at.
    let end = |reason| v1::EndRolloutRequest { meta: Some(command(reason)), position: rollout.position };
    let (advance, request) = match action {
        Action::Advance(EndArgs { reason }) => (true, end(reason)),
        Action::Abort(EndArgs { reason }) => (false, end(reason)),
    };
    let ended = retry(|| {
        let (mut client, request) = (client.clone(), request.clone());
        async move {
            if advance { client.advance_rollout(request).await } else { client.abort_rollout(request).await }
        }
    });
    ended.await?;
    show(&look(&client).await?, args.output.format)?;
    Ok(Exit::Ok)
}

async fn look(client: &MeshClient<Channel>) -> Outcome<Rollout> {
    let response = retry(|| {
        let mut client = client.clone();
        async move { client.get_rollout(v1::GetRolloutRequest {}).await }
    });
    Ok(Rollout::of(response.await?))
}

/// Shows the rollout that began with this version of its scope; waits for its end if that is wanted, and tells how it goes on.
pub(crate) async fn follow(
    client: &MeshClient<Channel>,
    version: u64,
    wait: Option<Duration>,
    format: Format,
) -> Outcome<Exit> {
    let begun = Instant::now();
    let mut said = String::new();
    loop {
        let rollout = look(client).await?;
        // A controller that is behind knows of an earlier one only; it has this one soon.
        if rollout.version > version + 1 {
            let what = "the rollout ended, and another one began";
            return Err(Failure::new(Exit::CheckFailed, what).next("see how with `weft log --scope rollout`"));
        }
        if rollout.version == version + 1 || rollout.version == version && wait.is_none() {
            show(&rollout, format)?;
            return Ok(if rollout.state == "aborted" { Exit::CheckFailed } else { Exit::Ok });
        }
        // Canaries that do not say that they run it are waited for twice as long, and then watched.
        let limit = 3 * Duration::from_millis(rollout.watch_ms.into()) + wait.unwrap_or(BEHIND_MAX);
        if begun.elapsed() > limit {
            let what = format!("the rollout has not ended after {} s", limit.as_secs());
            return Err(Failure::new(Exit::CheckFailed, what).next("look at it with `weft rollout`"));
        }
        let progress = rollout.progress();
        if rollout.version == version && progress != said {
            eprintln!("{progress}");
            said = progress;
        }
        sleep(LOOK_EVERY).await;
    }
}

#[derive(Debug, Serialize)]
struct Rollout {
    state: String,
    version: u64,
    summary: String,
    position: u64,
    at: String,
    by: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    scopes: Vec<String>,
    #[serde(skip_serializing_if = "is_zero")]
    watch_ms: u32,
    #[serde(skip_serializing_if = "is_zero")]
    tolerance_ppm: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    canaries: Vec<Canary>,
}

#[derive(Debug, Serialize)]
struct Canary {
    instance: String,
    applied: bool,
    watched_ms: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    error: String,
    connections: u64,
    refused: u64,
    failed: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Rollout {
    fn of(response: v1::GetRolloutResponse) -> Self {
        let canary = |canary: v1::CanaryStatus| {
            let v1::CanaryStatus { instance, applied, error, watched_ms, connections, refused, failed } =
                canary;
            Canary { instance, applied, watched_ms, error, connections, refused, failed }
        };
        Self {
            state: response.state,
            version: response.version,
            summary: response.summary,
            position: response.position,
            at: time::point(response.at_ms),
            by: short_actor(&response.by),
            scopes: response.scopes,
            watch_ms: response.watch_ms,
            tolerance_ppm: response.tolerance_ppm,
            canaries: response.canaries.into_iter().map(canary).collect(),
        }
    }

    fn progress(&self) -> String {
        let applied = self.canaries.iter().filter(|canary| canary.applied).count();
        let sum = |of: fn(&Canary) -> u64| self.canaries.iter().map(of).sum::<u64>();
        format!(
            "{applied} of {} canaries run it: {} connections, {} refused, {} failed",
            self.canaries.len(),
            sum(|canary| canary.connections),
            sum(|canary| canary.refused),
            sum(|canary| canary.failed)
        )
    }
}

fn show(rollout: &Rollout, format: Format) -> Outcome<()> {
    print(&match format {
        Format::Table => text(rollout),
        Format::Json => json(rollout)?,
        Format::Yaml => yaml(rollout)?,
    })
}

fn text(rollout: &Rollout) -> String {
    if rollout.state.is_empty() {
        return "there never was a rollout; `weft apply --canary 5%` begins one\n".to_owned();
    }
    let Rollout { state, summary, position, at, by, .. } = rollout;
    let mut text = format!("{}  {}\n", state.to_uppercase(), printable(summary));
    text.push_str(&format!("since {at} by {}: `weft log {position}`\n", printable(by)));
    if rollout.canaries.is_empty() {
        return text;
    }
    text.push('\n');
    let mut table = Table::new(&["CANARY", "RUNS IT", "CONNECTIONS", "REFUSED", "FAILED"]);
    for canary in &rollout.canaries {
        let runs = match (canary.applied, canary.error.as_str()) {
            (true, _) => format!("for {}", time::span(Duration::from_millis(canary.watched_ms))),
            (false, "") => "not yet".to_owned(),
            (false, error) => format!("no: {error}"),
        };
        let numbers = [canary.connections, canary.refused, canary.failed].map(|number| number.to_string());
        let [connections, refused, failed] = numbers;
        table.row([canary.instance.clone(), printable(&runs), connections, refused, failed]);
    }
    text.push_str(&table.render());
    printable_lines(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_written_as_people_do() {
        for (text, ppm) in [("5%", 50_000), ("0.5 %", 5_000), ("100%", WHOLE_PPM), ("0%", 0)] {
            assert_eq!(percent(text), Ok(ppm), "{text}");
        }
        for wrong in ["5", "101%", "-1%", "many%", ""] {
            assert!(percent(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_rollout_reads_from_its_state_to_its_canaries() {
        let mut response = v1::GetRolloutResponse {
            state: "running".into(),
            summary: "2 sidecar(s) try security/default/db for 60 s".into(),
            position: 42,
            at_ms: 1_000,
            by: "spiffe://weft.local/operator/admin/alice".into(),
            canaries: vec![
                v1::CanaryStatus {
                    instance: "default/db/db-1".into(),
                    applied: true,
                    watched_ms: 7_400,
                    connections: 12,
                    refused: 1,
                    ..v1::CanaryStatus::default()
                },
                v1::CanaryStatus { instance: "default/db/db-2".into(), ..v1::CanaryStatus::default() },
            ],
            ..v1::GetRolloutResponse::default()
        };
        let rollout = Rollout::of(response.clone());
        assert_eq!(rollout.progress(), "1 of 2 canaries run it: 12 connections, 1 refused, 0 failed");
        let expected = "RUNNING  2 sidecar(s) try security/default/db for 60 s\n\
            since 1970-01-01T00:00:01Z by admin/alice: `weft log 42`\n\
            \n\
            CANARY            RUNS IT   CONNECTIONS   REFUSED   FAILED\n\
            default/db/db-1   for 7s    12            1         0\n\
            default/db/db-2   not yet   0             0         0\n";
        assert_eq!(text(&rollout), expected);
        response.state.clear();
        assert!(text(&Rollout::of(response)).contains("never"));
    }
}
