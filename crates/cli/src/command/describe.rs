//! `weft describe`: everything about one resource, with its last changes.

use crate::command::log::{self, Event};
use crate::command::{answer, get};
use crate::context::ContextArgs;
use crate::failure::{Exit, Failure, Outcome};
use crate::moment::AtArgs;
use crate::output::{Format, OutputArgs, json, print, yaml};
use crate::resource::Kind;
use crate::resource::document::Described;
use serde::Serialize;
use weft_proto::v1;

/// How many of its last events are shown.
const EVENTS_SHOWN: u64 = 10;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// services, instances, traffic, security or mesh
    kind: Kind,
    /// Its name or scope
    #[arg(default_value = "")]
    name: String,
    #[command(flatten)]
    at: AtArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Serialize)]
struct Description {
    resource: Described,
    events: Vec<Event>,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let mut client = context.load()?.client()?;
    let name = args.kind.full_name(&args.name);
    let name = if args.kind == Kind::MeshDefaults { String::new() } else { name };
    let request = v1::GetRequest { kind: args.kind.wire().into(), name: name.clone(), at: args.at.wire() };
    let list = format!("list what there is with `weft get {}`", args.kind.aliases()[0]);
    let response = answer(client.get(request).await).map_err(|failure| failure.or_next(&list))?;
    args.at.check(response.as_of)?;
    let [resource] = response.resources.as_slice() else {
        return Err(Failure::fault(format!("there is no {} {name}", args.kind.word())).next(list));
    };
    let request = v1::ReadLogRequest {
        scope_prefix: resource.scope.clone(),
        limit: EVENTS_SHOWN,
        last: true,
        until: args.at.wire(),
        ..v1::ReadLogRequest::default()
    };
    let events = log::read(&mut client, request).await?;
    // Another scope may start with the same text.
    let events: Vec<Event> = events.into_iter().filter(|event| event.scope == resource.scope).collect();
    print(&match args.output.format {
        Format::Table => {
            let document = get::documents(&response.resources)?;
            format!("{document}\nlast changes of {}:\n{}", resource.scope, log::table(&events).render())
        }
        Format::Json => json(&described(resource, events)?)?,
        Format::Yaml => yaml(&described(resource, events)?)?,
    })?;
    Ok(Exit::Ok)
}

fn described(resource: &v1::Resource, events: Vec<Event>) -> Outcome<Description> {
    let resource = Described::of(resource).ok_or_else(|| {
        Failure::fault("the controller knows a kind of resource that this program does not")
            .next("upgrade `weft`; `weft version` shows both versions")
    })?;
    Ok(Description { resource, events })
}
