//! `weft get`: lists of resources.

use crate::command::{answer, short_actor};
use crate::context::ContextArgs;
use crate::failure::{Exit, Failure, Outcome};
use crate::moment::AtArgs;
use crate::output::table::Table;
use crate::output::text::printable;
use crate::output::time::{ago, now_ms, point, written};
use crate::output::{Format, OutputArgs, json, print, yaml};
use crate::resource::Kind;
use crate::resource::document::{self, Described, document, kind_and_name};
use weft_proto::v1;
use weft_proto::v1::resource::Spec;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// services, instances, traffic, security or mesh; everything if left out
    kind: Option<Kind>,
    /// Only this one
    name: Option<String>,
    #[command(flatten)]
    at: AtArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let name = args.kind.zip(args.name.as_deref()).map(|(kind, name)| kind.full_name(name));
    let request = v1::GetRequest {
        kind: args.kind.map_or(v1::Kind::Unspecified, Kind::wire).into(),
        name: name.clone().unwrap_or_default(),
        at: args.at.wire(),
    };
    let list =
        format!("list what there is with `weft get {}`", args.kind.map_or("", |kind| kind.aliases()[0]));
    let response = answer(context.load()?.client()?.get(request).await);
    let response = response.map_err(|failure| failure.or_next(list.trim_end()))?;
    args.at.check(response.as_of)?;
    if let (Some(kind), Some(name), []) = (args.kind, &name, response.resources.as_slice()) {
        return Err(Failure::fault(format!("there is no {} {name}", kind.word())).next(list));
    }
    print(&match args.output.format {
        Format::Table => tables(&response.resources, now_ms()),
        Format::Json => json(&response.resources.iter().filter_map(Described::of).collect::<Vec<_>>())?,
        Format::Yaml => documents(&response.resources)?,
    })?;
    Ok(Exit::Ok)
}

/// The resources as `weft apply` takes them, with what it does not take in comments.
pub(crate) fn documents(resources: &[v1::Resource]) -> Outcome<String> {
    let mut text = String::new();
    for resource in resources {
        let Some(document) = document(resource) else { continue };
        if !text.is_empty() {
            text.push_str("---\n");
        }
        text.push_str(&match resource.position {
            0 => "# as it is from the beginning\n".to_owned(),
            position => {
                let by = printable(&resource.actor);
                format!("# changed {} by {by}, event {position}\n", point(resource.changed_at_ms))
            }
        });
        if let Some(Spec::Instance(instance)) = &resource.spec {
            let health = document::health(instance.health());
            text.push_str(&format!("# state {}, health {health}\n", printable(&instance.state)));
        }
        if !resource.reached_at.is_empty() {
            text.push_str(&format!("# reached at {}\n", printable(&resource.reached_at)));
        }
        text.push_str(&yaml(&document)?);
    }
    Ok(text)
}

/// One table per kind that has something to show.
fn tables(resources: &[v1::Resource], now_ms: i64) -> String {
    let of_kind = |kind| {
        let of_kind =
            resources.iter().filter(|resource| kind_and_name(resource).map(|found| found.0) == Some(kind));
        let table = table(kind, of_kind, now_ms);
        (!table.is_empty()).then(|| table.render())
    };
    let tables: Vec<String> = Kind::ALL.into_iter().filter_map(of_kind).collect();
    if tables.is_empty() { "nothing is there\n".to_owned() } else { tables.join("\n") }
}

fn table<'r>(kind: Kind, resources: impl Iterator<Item = &'r v1::Resource>, now_ms: i64) -> Table {
    let mut table = Table::new(match kind {
        Kind::Service => &["SERVICE", "ADDRESS", "PORTS", "VERSION", "CHANGED", "BY"],
        Kind::Instance => &["INSTANCE", "ADDRESS", "STATE", "HEALTH", "UPSTREAMS", "VERSION", "CHANGED"],
        Kind::TrafficPolicy => &["TRAFFIC", "BALANCE", "TIMEOUT", "RETRIES", "VERSION", "CHANGED", "BY"],
        Kind::SecurityPolicy => &["SECURITY", "DEFAULT", "MODE", "RULES", "VERSION", "CHANGED", "BY"],
        Kind::MeshDefaults => &["MESH", "SECURITY", "PROPAGATION-BOUND", "VERSION", "CHANGED", "BY"],
    });
    for resource in resources {
        let version = resource.version.to_string();
        let changed = ago(now_ms, resource.changed_at_ms);
        let by = short_actor(&resource.actor);
        match &resource.spec {
            Some(Spec::Service(service)) => {
                table.row([
                    service.name.clone(),
                    resource.reached_at.clone(),
                    ports(&service.ports),
                    version,
                    changed,
                    by,
                ]);
            }
            Some(Spec::Instance(instance)) => {
                let registration = instance.registration.clone().unwrap_or_default();
                let upstreams = if registration.all_upstreams {
                    "all".to_owned()
                } else {
                    registration.upstreams.join(",")
                };
                table.row([
                    registration.instance.clone(),
                    document::address(&registration),
                    instance.state.clone(),
                    document::health(instance.health()).to_owned(),
                    upstreams,
                    version,
                    changed,
                ]);
            }
            Some(Spec::TrafficPolicy(put)) => {
                let policy = put.policy.clone().unwrap_or_default();
                table.row([
                    put.scope.clone(),
                    document::balance(policy.balance()).to_owned(),
                    written(policy.connect_timeout_ms),
                    policy.connect_retries.to_string(),
                    version,
                    changed,
                    by,
                ]);
            }
            Some(Spec::SecurityPolicy(put)) => {
                let policy = put.policy.clone().unwrap_or_default();
                let rules: Vec<String> = policy.rules.iter().map(|rule| rule.name.clone()).collect();
                table.row([
                    put.scope.clone(),
                    document::action(policy.default()).unwrap_or_default().to_owned(),
                    document::mode(policy.mode()).to_owned(),
                    rules.join(","),
                    version,
                    changed,
                    by,
                ]);
            }
            Some(Spec::MeshDefaults(defaults)) => {
                table.row([
                    "mesh".to_owned(),
                    document::action(defaults.security()).unwrap_or_default().to_owned(),
                    written(defaults.propagation_bound_ms),
                    version,
                    changed,
                    by,
                ]);
            }
            None => {}
        }
    }
    table
}

/// Ports as `name:number`.
pub(crate) fn ports(ports: &[v1::ServicePort]) -> String {
    ports.iter().map(|port| format!("{}:{}", port.name, port.port)).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests;
