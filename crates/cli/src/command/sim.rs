//! `weft sim`: a fleet of simulated sidecars on a real mesh, to see how it takes a size or a kind of churn that is not there yet.

use crate::command::change::duration;
use crate::context::ContextArgs;
use crate::failure::{Exit, Failure, Outcome, chain};
use crate::output::table::Table;
use crate::output::{Format, OutputArgs, json, print, yaml};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::time::Duration;
use weft_fleet::profile::{self, Outcome as Profiled, Pace, Profile};
use weft_fleet::{Fleet, FleetError, Plan, Progress, Reading};
use weft_model::Namespace;

/// Files that are open besides connections.
const FILES_BESIDES: u64 = 64;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The sidecars are real to the mesh: each joins by a token of its own, registers an instance, and follows its\n\
    snapshots. They carry no connections. Everything they do is in the log; at the end their instances and\n\
    services are deleted. Needs the role operator."
)]
pub(crate) struct Args {
    /// Sidecars, besides those of the endpoints
    #[arg(long, value_name = "N", default_value_t = 100)]
    sidecars: usize,
    /// Endpoints of the service that changes
    #[arg(long, value_name = "N", default_value_t = 10)]
    endpoints: usize,
    /// Sidecars that have this service for their upstream, in percent of all
    #[arg(long, value_name = "PERCENT", default_value_t = 100.0)]
    interested: f64,
    /// Sidecars that share a connection, as behind a relay on their node
    #[arg(long, value_name = "N", default_value_t = 1)]
    per_connection: usize,
    /// What happens, in this order [default: all]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "KINDS")]
    profile: Vec<Kind>,
    /// Changes of each kind
    #[arg(long, value_name = "N", default_value_t = 20)]
    changes: usize,
    /// From when a change has reached everybody to the next one
    #[arg(long, value_name = "DURATION", default_value = "100ms", value_parser = duration)]
    pause: Duration,
    /// Where its services are; nothing else may be there
    #[arg(long, value_name = "NAME", default_value = "sim")]
    namespace: Namespace,
    #[command(flatten)]
    output: OutputArgs,
}

/// What happens to the fleet.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    /// One endpoint after the other goes down and up again
    Endpoint,
    /// One endpoint after the other is replaced
    Rolling,
    /// A tenth of the endpoints go down and up together
    Flap,
    /// The service's traffic policy changes
    Policy,
    /// All connections break at once
    Reconnect,
}

impl From<Kind> for Profile {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Endpoint => Self::Endpoint,
            Kind::Rolling => Self::Rolling,
            Kind::Flap => Self::Flap,
            Kind::Policy => Self::Policy,
            Kind::Reconnect => Self::Reconnect,
        }
    }
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Report {
    sidecars: usize,
    endpoints: usize,
    interested: usize,
    per_connection: usize,
    profiles: Vec<Profiled>,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let mesh = context.load()?.mesh()?;
    let plan = args.plan()?;
    let (interested, per_connection) = (plan.interested, plan.per_connection);
    make_room(plan.size().div_ceil(plan.per_connection))?;
    let told = Told::new();
    let mut fleet = Fleet::enroll(mesh, plan, |progress| told.tell(progress)).await.map_err(failed)?;
    let measured = args.measure(&mut fleet, &told).await;
    // Whatever came of it, the mesh is left as it was.
    told.say("leaving");
    let left = fleet.leave().await.map_err(failed);
    let profiles = measured.map_err(failed)?;
    left?;
    let Args { sidecars, endpoints, .. } = args;
    let report = Report { sidecars, endpoints, interested, per_connection, profiles };
    print(&match args.output.format {
        Format::Table => report.table(),
        Format::Json => json(&report)?,
        Format::Yaml => yaml(&report)?,
    })?;
    let broken = report.profiles.iter().any(|profile| profile.faults + profile.refused > 0);
    Ok(if broken { Exit::CheckFailed } else { Exit::Ok })
}

impl Args {
    fn plan(&self) -> Outcome<Plan> {
        if !(0.0..=100.0).contains(&self.interested) {
            return Err(Failure::fault("--interested is a percentage, 0 to 100"));
        }
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of some thousands"
        )]
        let interested = (self.sidecars as f64 * self.interested / 100.0).round() as usize;
        Ok(Plan {
            namespace: self.namespace.clone(),
            sidecars: self.sidecars,
            endpoints: self.endpoints,
            interested: interested.max(1),
            also: Vec::new(),
            per_connection: self.per_connection,
            reading: Reading::Freely,
        })
    }

    async fn measure(&self, fleet: &mut Fleet, told: &Told) -> Result<Vec<Profiled>, FleetError> {
        fleet.subscribe(|progress| told.tell(progress)).await?;
        let profiles = if self.profile.is_empty() {
            Profile::ALL.to_vec()
        } else {
            self.profile.iter().map(|kind| Profile::from(*kind)).collect()
        };
        let pace = Pace { changes: self.changes, pause: self.pause };
        let mut outcomes = Vec::new();
        for profile in profiles {
            let outcome = profile::run(fleet, profile, pace, |progress| told.tell(progress));
            outcomes.push(Box::pin(outcome).await?);
        }
        Ok(outcomes)
    }
}

impl Report {
    fn table(&self) -> String {
        let Self { sidecars, endpoints, interested, per_connection, .. } = self;
        let mut table = Table::new(&[
            "PROFILE",
            "CHANGES",
            "APPEND-P50",
            "P50",
            "P99",
            "MAX",
            "NOTICES/CHANGE",
            "BYTES/NOTICE",
            "PULLS",
            "FAULTS",
        ]);
        for profile in &self.profiles {
            let ms = |ms: f64| format!("{ms:.1}ms");
            table.row([
                profile.profile.as_str().to_owned(),
                profile.changes.to_string(),
                ms(profile.append.p50_ms),
                ms(profile.converged.p50_ms),
                ms(profile.converged.p99_ms),
                ms(profile.converged.max_ms),
                format!("{:.2}", profile.notices_per_change),
                format!("{:.0}", profile.bytes_per_notice),
                profile.pulls.to_string(),
                (profile.faults + profile.refused).to_string(),
            ]);
        }
        format!(
            "{sidecars} sidecars, {interested} of them interested in a service of {endpoints} endpoints, {per_connection} on a connection;\n\
             from a change's acknowledgement until an interested sidecar ran it:\n\n{}",
            table.render()
        )
    }
}

fn failed(error: FleetError) -> Failure {
    let failure = match error {
        FleetError::Call { source, what } => {
            let Failure { exit, .. } = Failure::from(source.clone());
            Failure::new(exit, format!("{what} failed: {source}"))
        }
        error => Failure::fault(chain(&error)),
    };
    failure.next("what is left of the fleet in the log is in the namespace of --namespace: look with `weft get instances`")
}

/// One connection is one open file.
fn make_room(connections: usize) -> Outcome<()> {
    let needed = u64::try_from(connections).unwrap_or(u64::MAX).saturating_add(FILES_BESIDES);
    let refused = |error: nix::errno::Errno| Failure::fault(format!("the limit of open files: {error}"));
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(refused)?;
    if needed <= soft {
        return Ok(());
    }
    if needed > hard {
        return Err(Failure::fault(format!(
            "{connections} connections need {needed} open files, the limit is {hard}"
        ))
        .next("raise it (`ulimit -Hn`), or let several sidecars share a connection with --per-connection"));
    }
    setrlimit(Resource::RLIMIT_NOFILE, needed, hard).map_err(refused)
}

/// Progress: one line that is rewritten on a terminal, a line for each undertaking elsewhere.
struct Told {
    terminal: bool,
}

impl Told {
    fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal() }
    }

    fn tell(&self, Progress { what, done, of }: Progress) {
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K{what}: {done} of {of}");
        } else if done == of {
            self.say(&format!("{what}: {of}"));
        }
    }

    fn say(&self, line: &str) {
        let mut stderr = std::io::stderr();
        let _ = if self.terminal { write!(stderr, "\r\x1b[K{line}\r") } else { writeln!(stderr, "{line}") };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weft_fleet::Spread;

    #[test]
    fn a_report_is_one_line_a_profile() {
        let spread = Spread { p50_ms: 1.25, p99_ms: 12.0, max_ms: 20.5 };
        let profile = Profiled {
            profile: Profile::Flap,
            changes: 20,
            append: spread,
            converged: spread,
            notices_per_change: 0.25,
            bytes_per_notice: 130.4,
            pulls: 1,
            faults: 0,
            refused: 2,
        };
        let report = Report {
            sidecars: 100,
            endpoints: 10,
            interested: 50,
            per_connection: 1,
            profiles: vec![profile],
        };
        let table = report.table();
        let row: Vec<&str> = table.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(
            row,
            ["flap", "20", "1.2ms", "1.2ms", "12.0ms", "20.5ms", "0.25", "130", "1", "2"],
            "{table}"
        );
    }
}
