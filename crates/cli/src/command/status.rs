//! `weft status`: the mesh at a glance.

use crate::command::get::ports;
use crate::command::{answer, short_actor};
use crate::context::ContextArgs;
use crate::failure::{Exit, Outcome};
use crate::moment::AtArgs;
use crate::output::table::Table;
use crate::output::text::printable;
use crate::output::time::{ago, now_ms, point, span};
use crate::output::{Format, OutputArgs, json, print, yaml};
use crate::resource::document::{address, health};
use serde::Serialize;
use std::time::Duration;
use weft_proto::v1;
use weft_proto::v1::resource::Spec;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    at: AtArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// The status as programs read it. Times are RFC 3339, empty for never.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Status {
    as_of: String,
    as_of_time: String,
    head: String,
    leader: Leader,
    services: Vec<Service>,
    sidecars: Vec<Sidecar>,
    policies: Vec<Policy>,
    /// How soon a change shall run in every sidecar.
    propagation_bound_ms: u32,
    /// How the last changes reached the sidecars, the newest first.
    propagation: Vec<Propagation>,
    /// Endpoints whose health flaps or did so lately.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    flapping: Vec<Flapping>,
    /// Events that were seen and are not in the log: while there is one, no change is taken.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    log_rewound: Vec<Rewind>,
    #[serde(skip)]
    as_of_ms: i64,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Rewind {
    seen: String,
    found: String,
    witness: String,
    reported_at: String,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Leader {
    holder: String,
    term: u64,
    position: u64,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Service {
    name: String,
    address: String,
    ports: String,
    instances: Vec<Instance>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Instance {
    name: String,
    address: String,
    state: String,
    health: &'static str,
    health_detail: String,
    identity: String,
    leaf_not_after: String,
    #[serde(skip)]
    leaf_not_after_ms: i64,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Sidecar {
    instance: String,
    wanted: Option<String>,
    applied: Option<String>,
    lag_ms: i64,
    outside_bound: bool,
    connected: bool,
    last_seen: String,
    error: String,
    #[serde(skip)]
    last_seen_ms: i64,
}

/// The way of a change into the sidecars; times are milliseconds since its append.
#[derive(Debug, PartialEq, Serialize)]
struct Propagation {
    version: String,
    event: String,
    scope: String,
    appended_at: String,
    folded_ms: f64,
    published_ms: f64,
    applied_p50_ms: Option<f64>,
    applied_p99_ms: Option<f64>,
    applied_last_ms: Option<f64>,
    last_sidecar: String,
    interested: u64,
    applied: u64,
    #[serde(skip)]
    appended_at_ms: i64,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Flapping {
    endpoint: String,
    state: &'static str,
    penalty: u64,
    reported: &'static str,
    held_since: String,
    held_by: u64,
    hidden_transitions: u64,
    release_estimate: String,
    #[serde(skip)]
    held_since_ms: i64,
    #[serde(skip)]
    release_at_ms: i64,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Policy {
    scope: String,
    version: u64,
    changed_at: String,
    actor: String,
    summary: String,
    #[serde(skip)]
    changed_at_ms: i64,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let past = args.at.at.is_some();
    let request = v1::StatusRequest { at: args.at.wire() };
    let response = answer(context.load()?.client()?.status(request).await)?;
    args.at.check(response.as_of)?;
    let status = Status::of(response);
    print(&match args.output.format {
        Format::Table => text(&status, past, now_ms()),
        Format::Json => json(&status)?,
        Format::Yaml => yaml(&status)?,
    })?;
    Ok(Exit::Ok)
}

fn version(version: Option<v1::ConfigVersion>) -> Option<String> {
    let version = version.filter(|version| version.position != 0)?;
    Some(format!("{}.{}", version.epoch, version.position))
}

impl Status {
    fn of(response: v1::StatusResponse) -> Self {
        let leader = response.leader.unwrap_or_default();
        let service = |service: v1::ServiceStatus| Service {
            name: service.name,
            address: service.address,
            ports: ports(&service.ports),
            instances: service.instances.iter().filter_map(Instance::of).collect(),
        };
        let sidecar = |sidecar: v1::SidecarStatus| Sidecar {
            instance: sidecar.instance,
            wanted: version(sidecar.wanted),
            applied: version(sidecar.applied),
            lag_ms: sidecar.lag_ms,
            outside_bound: sidecar.outside_bound,
            connected: sidecar.connected,
            last_seen: point(sidecar.last_seen_ms),
            error: sidecar.error,
            last_seen_ms: sidecar.last_seen_ms,
        };
        let policy = |policy: v1::PolicyStatus| Policy {
            scope: policy.scope,
            version: policy.version,
            changed_at: point(policy.changed_at_ms),
            actor: policy.actor,
            summary: policy.summary,
            changed_at_ms: policy.changed_at_ms,
        };
        let propagation = |change: v1::Propagation| Propagation {
            version: version(change.version).unwrap_or_default(),
            event: change.event,
            scope: change.scope,
            appended_at: point(change.appended_at_ms),
            folded_ms: change.folded_ms,
            published_ms: change.published_ms,
            applied_p50_ms: change.applied_p50_ms,
            applied_p99_ms: change.applied_p99_ms,
            applied_last_ms: change.applied_last_ms,
            last_sidecar: change.last_sidecar,
            interested: change.interested,
            applied: change.applied,
            appended_at_ms: change.appended_at_ms,
        };
        let rewind = |rewind: v1::Rewind| {
            let found = rewind.found.unwrap_or_default();
            Rewind {
                seen: version(rewind.seen).unwrap_or_default(),
                found: format!("{}.{}", found.epoch, found.position),
                witness: rewind.witness,
                reported_at: point(rewind.reported_at_ms),
            }
        };
        Self {
            as_of: version(response.as_of).unwrap_or_default(),
            as_of_time: point(response.as_of_ms),
            as_of_ms: response.as_of_ms,
            head: version(response.head).unwrap_or_default(),
            leader: Leader { holder: leader.holder, term: leader.term, position: leader.position },
            services: response.services.into_iter().map(service).collect(),
            sidecars: response.sidecars.into_iter().map(sidecar).collect(),
            policies: response.policies.into_iter().map(policy).collect(),
            propagation_bound_ms: response.propagation_bound_ms,
            propagation: response.propagation.into_iter().map(propagation).collect(),
            flapping: response.flapping.into_iter().map(Flapping::of).collect(),
            log_rewound: response.rewinds.into_iter().map(rewind).collect(),
        }
    }

    /// Sidecars that do not run what they should, each with the reason. Who is behind within the propagation bound is not one
    /// of them: something has just changed.
    pub(crate) fn problems(&self) -> Vec<String> {
        let problem = |sidecar: &Sidecar| {
            let arriving = sidecar.connected && sidecar.error.is_empty() && !sidecar.outside_bound;
            let why = sidecar.trouble().filter(|_| !arriving)?;
            Some(format!("{}: {why}", sidecar.instance))
        };
        self.sidecars.iter().filter_map(problem).collect()
    }

    /// That the log lost events, and what to do; none if it did not.
    pub(crate) fn rewound(&self) -> Option<String> {
        let Rewind { seen, found, witness, .. } = self.log_rewound.first()?;
        let more = match self.log_rewound.len() - 1 {
            0 => String::new(),
            more => format!(" (and {more} more)"),
        };
        Some(format!(
            "LOG_REWOUND: {} has seen event {seen}{more}, and the log ended at {found}: no change is taken; \
             restore what was lost, or go on without it with `weft log adopt-history`",
            printable(witness)
        ))
    }

    /// How many sidecars there are.
    pub(crate) fn sidecars(&self) -> usize {
        self.sidecars.len()
    }
}

pub(crate) async fn fetch(context: &crate::context::Context) -> Outcome<Status> {
    Ok(Status::of(answer(context.client()?.status(v1::StatusRequest { at: None }).await)?))
}

impl Instance {
    fn of(resource: &v1::Resource) -> Option<Self> {
        let Some(Spec::Instance(instance)) = &resource.spec else { return None };
        let registration = instance.registration.as_ref()?;
        Some(Self {
            name: registration.instance.clone(),
            address: address(registration),
            state: instance.state.clone(),
            health: health(instance.health()),
            health_detail: instance.health_detail.clone(),
            identity: instance.identity.clone(),
            leaf_not_after: point(instance.leaf_not_after_ms),
            leaf_not_after_ms: instance.leaf_not_after_ms,
        })
    }
}

impl Flapping {
    fn of(flapping: v1::FlappingStatus) -> Self {
        Self {
            state: match (flapping.held_since_ms, flapping.penalty > flapping.suppress.into()) {
                (1.., _) => "held down",
                (_, true) => "needed, not held",
                (_, false) => "watched",
            },
            penalty: flapping.penalty,
            reported: health(flapping.reported()),
            held_since: point(flapping.held_since_ms),
            held_by: flapping.held_by,
            hidden_transitions: flapping.hidden,
            release_estimate: point(flapping.release_at_ms),
            held_since_ms: flapping.held_since_ms,
            release_at_ms: flapping.release_at_ms,
            endpoint: flapping.instance,
        }
    }
}

impl Sidecar {
    /// Why it does not run what it should; none if it does.
    fn trouble(&self) -> Option<String> {
        if !self.error.is_empty() {
            return Some(format!("refused its snapshot: {}", self.error));
        }
        if !self.connected {
            return Some("not connected".to_owned());
        }
        (self.applied != self.wanted).then(|| match self.lag_ms {
            0 => "behind".to_owned(),
            ms => {
                let bound = if self.outside_bound { ", outside the bound" } else { "" };
                format!("behind for {}{bound}", span(Duration::from_millis(ms.unsigned_abs())))
            }
        })
    }
}

fn text(status: &Status, past: bool, now_ms: i64) -> String {
    if status.as_of.is_empty() {
        let rewound = status.rewound().map(|rewound| rewound + "\n\n").unwrap_or_default();
        return format!("{rewound}before the first event; the log is at {}\n", status.head);
    }
    let age = ago(now_ms, status.as_of_ms);
    let mut text = status.rewound().map(|rewound| rewound + "\n\n").unwrap_or_default();
    text.push_str(&format!("as of {} ({age}), log at {}", status.as_of, status.head));
    // Who leads is known of now only.
    text.push_str(&match status.leader.holder.as_str() {
        _ if past => "\n".to_owned(),
        "" => ", no controller projects\n".to_owned(),
        holder => format!(", {} projects (term {})\n", printable(holder), status.leader.term),
    });
    let mut section = |table: Table| {
        if !table.is_empty() {
            text.push('\n');
            text.push_str(&table.render());
        }
    };
    section(services(status, now_ms));
    if !past {
        section(sidecars(status, now_ms));
        section(changes(status, now_ms));
    }
    section(flapping(status, now_ms));
    section(policies(status, now_ms));
    text
}

/// One row per instance, so that a service's whole story is in one place; a service without one has a row too.
fn services(status: &Status, now_ms: i64) -> Table {
    let mut table =
        Table::new(&["SERVICE", "REACHED AT", "PORTS", "INSTANCE", "STATE", "HEALTH", "SIDECAR AT", "LEAF"]);
    for service in &status.services {
        let own = [service.name.clone(), service.address.clone(), service.ports.clone()];
        if service.instances.is_empty() {
            let [name, address, ports] = own.clone();
            let none = String::new;
            table.row([name, address, ports, none(), none(), none(), none(), none()]);
        }
        for instance in &service.instances {
            let [name, address, ports] = own.clone();
            let left = u64::try_from(instance.leaf_not_after_ms.saturating_sub(now_ms)).unwrap_or(0);
            let leaf = match (instance.leaf_not_after_ms, left) {
                (0, _) => String::new(),
                (_, 0) => "expired".to_owned(),
                (_, left) => format!("{} left", span(Duration::from_millis(left))),
            };
            let short = instance.name.rsplit('/').next().unwrap_or_default().to_owned();
            let health = match (instance.health, instance.health_detail.as_str()) {
                ("unhealthy", detail) if !detail.is_empty() => format!("unhealthy: {detail}"),
                (health, _) => health.to_owned(),
            };
            table.row([
                name,
                address,
                ports,
                short,
                instance.state.clone(),
                health,
                instance.address.clone(),
                leaf,
            ]);
        }
    }
    table
}

fn sidecars(status: &Status, now_ms: i64) -> Table {
    let mut table = Table::new(&["SIDECAR", "WANTED", "APPLIED", "STATUS", "SEEN"]);
    for sidecar in &status.sidecars {
        table.row([
            sidecar.instance.clone(),
            sidecar.wanted.clone().unwrap_or_default(),
            sidecar.applied.clone().unwrap_or_default(),
            sidecar.trouble().unwrap_or_else(|| "up to date".to_owned()),
            ago(now_ms, sidecar.last_seen_ms),
        ]);
    }
    table
}

/// How the last changes came into the sidecars, in milliseconds since the append.
fn changes(status: &Status, now_ms: i64) -> Table {
    let mut table = Table::new(&[
        "CHANGE", "WHAT", "APPENDED", "SENT MS", "P50 MS", "P99 MS", "LAST MS", "APPLIED", "LAST",
    ]);
    let after = |ms: Option<f64>| ms.map(|ms| format!("{ms:.1}")).unwrap_or_default();
    for change in &status.propagation {
        let what = format!("{} {}", change.event, change.scope);
        table.row([
            change.version.clone(),
            what.trim().to_owned(),
            ago(now_ms, change.appended_at_ms),
            after(Some(change.published_ms)),
            after(change.applied_p50_ms),
            after(change.applied_p99_ms),
            after(change.applied_last_ms),
            format!("{} of {}", change.applied, change.interested),
            change.last_sidecar.clone(),
        ]);
    }
    table
}

fn flapping(status: &Status, now_ms: i64) -> Table {
    let mut table = Table::new(&["FLAPPING", "STATE", "POINTS", "REPORTS", "HELD", "BY", "HIDDEN", "LET GO"]);
    for flapping in &status.flapping {
        let held = flapping.held_since_ms != 0;
        let left = u64::try_from(flapping.release_at_ms.saturating_sub(now_ms)).unwrap_or(0);
        let release = match (held, flapping.release_at_ms) {
            (false, _) => String::new(),
            (true, 0) => "once it is up".to_owned(),
            (true, _) => format!("in {}", span(Duration::from_millis(left))),
        };
        let shown = |text: String| if held { text } else { String::new() };
        table.row([
            flapping.endpoint.clone(),
            flapping.state.to_owned(),
            flapping.penalty.to_string(),
            flapping.reported.to_owned(),
            shown(ago(now_ms, flapping.held_since_ms)),
            shown(flapping.held_by.to_string()),
            shown(flapping.hidden_transitions.to_string()),
            release,
        ]);
    }
    table
}

fn policies(status: &Status, now_ms: i64) -> Table {
    let mut table = Table::new(&["POLICY", "VERSION", "CHANGED", "BY", "SAYS"]);
    for policy in &status.policies {
        table.row([
            policy.scope.clone(),
            policy.version.to_string(),
            ago(now_ms, policy.changed_at_ms),
            short_actor(&policy.actor),
            policy.summary.clone(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests;
