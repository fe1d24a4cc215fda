//! `weft log`: what happened. [`adopt`] is the way on when the log lost some of it, [`archive`] packs what is old.

mod adopt;
mod archive;

use crate::command::{answer, short_actor};
use crate::context::ContextArgs;
use crate::failure::{Exit, Failure, Outcome};
use crate::moment::Moment;
use crate::output::table::Table;
use crate::output::text::printable_lines;
use crate::output::time::point_ms;
use crate::output::{Format, OutputArgs, print, yaml};
use serde::Serialize;
use serde_json::Value;
use tonic::transport::Channel;
use weft_client::CallError;
use weft_proto::v1;
use weft_proto::v1::mesh_client::MeshClient;

#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  weft log                                  the last 20 events
  weft log 42                               one event, with its payload
  weft log -f                               what happens from now on, too
  weft log --scope security/default/db      what happened to one scope
  weft log --since '10m ago' -o json        the last ten minutes, one JSON object per line"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// One event, with its payload
    #[arg(conflicts_with_all = ["lines", "follow", "since", "until"])]
    position: Option<u64>,
    /// So many of the last events; 0 for all [default: 20, or all with --since]
    #[arg(short = 'n', long, value_name = "COUNT")]
    lines: Option<u64>,
    /// Stay, and print what happens from now on
    #[arg(short = 'f', long)]
    follow: bool,
    /// Only scopes that start with this, such as security/default
    #[arg(long, value_name = "PREFIX", default_value = "")]
    scope: String,
    /// Only events of this type, such as SecurityPolicySet
    #[arg(long = "type", value_name = "TYPE", default_value = "")]
    event_type: String,
    /// Only actors that contain this
    #[arg(long, value_name = "TEXT", default_value = "")]
    actor: String,
    /// Only events after this version or time
    #[arg(long, value_name = "VERSION|TIME")]
    since: Option<Moment>,
    /// Only events up to this version or time
    #[arg(long, visible_alias = "at", value_name = "VERSION|TIME", conflicts_with = "follow")]
    until: Option<Moment>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Go on with a log that lost events which were seen (LOG_REWOUND), without them
    AdoptHistory(adopt::Args),
    /// Pack old history: read as before, a tenth of the space
    Archive(archive::Args),
}

/// An event as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Event {
    position: u64,
    epoch: u64,
    recorded_at: String,
    pub(crate) scope: String,
    version: u64,
    #[serde(rename = "type")]
    event_type: String,
    schema: u32,
    actor: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<u64>,
    command_id: String,
    payload: Value,
    hash: String,
}

impl From<v1::LogEvent> for Event {
    fn from(event: v1::LogEvent) -> Self {
        Self {
            position: event.position,
            epoch: event.epoch,
            recorded_at: point_ms(event.recorded_at_us),
            scope: event.scope,
            version: event.version,
            event_type: event.r#type,
            schema: event.schema,
            actor: event.actor,
            reason: event.reason,
            cause: (event.cause != 0).then_some(event.cause),
            command_id: event.command_id,
            payload: serde_json::from_str(&event.payload).unwrap_or(Value::String(event.payload)),
            hash: hex::encode(event.hash),
        }
    }
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    if let Some(Command::Archive(args)) = args.command {
        return archive::run(args).await;
    }
    if let Some(Command::AdoptHistory(args)) = args.command {
        return adopt::run(args, context).await;
    }
    let mut client = context.load()?.client()?;
    if let Some(position) = args.position {
        return one(&mut client, position, args.output.format).await;
    }
    let after = match args.since {
        None => 0,
        Some(moment) => position_at(&mut client, moment).await?,
    };
    if let Some(until @ Moment::Version(_)) = args.until {
        position_at(&mut client, until).await?;
    }
    let lines = args.lines.unwrap_or(if args.since.is_some() { 0 } else { 20 });
    let request = v1::ReadLogRequest {
        after,
        limit: lines,
        scope_prefix: args.scope,
        r#type: args.event_type,
        actor: args.actor,
        follow: args.follow,
        until: args.until.map(Moment::wire),
        last: lines != 0,
    };
    if args.follow {
        return follow(&mut client, request, args.output.format).await;
    }
    let events = read(&mut client, request).await?;
    if events.is_empty() && args.output.format == Format::Table {
        print("no event matches\n")?;
        return Ok(Exit::Ok);
    }
    print(&shown(&events, args.output.format)?)?;
    Ok(Exit::Ok)
}

/// Every event that a request asks for.
pub(crate) async fn read(
    client: &mut MeshClient<Channel>,
    request: v1::ReadLogRequest,
) -> Outcome<Vec<Event>> {
    let mut batches = answer(client.read_log(request).await)?;
    let mut events = Vec::new();
    while let Some(batch) = batches.message().await.map_err(CallError::from)? {
        events.extend(batch.events.into_iter().map(Event::from));
    }
    Ok(events)
}

/// Shows what a request asks for up to now, then what is yet to come. The limit is one of the past only.
async fn follow(
    client: &mut MeshClient<Channel>,
    mut request: v1::ReadLogRequest,
    format: Format,
) -> Outcome<Exit> {
    if format == Format::Table {
        print(&line(&HEADINGS.map(str::to_owned)))?;
    }
    if request.last {
        let now = answer(client.status(v1::StatusRequest { at: None }).await)?.head.unwrap_or_default();
        let until = Some(Moment::Position(now.position).wire());
        let past = v1::ReadLogRequest { follow: false, until, ..request.clone() };
        show_lines(&read(client, past).await?, format)?;
        request = v1::ReadLogRequest { after: now.position, limit: 0, last: false, ..request };
    }
    let mut batches = answer(client.read_log(request).await)?;
    while let Some(batch) = batches.message().await.map_err(CallError::from)? {
        show_lines(&batch.events.into_iter().map(Event::from).collect::<Vec<_>>(), format)?;
    }
    Err(Failure::fault("the controller ended the log").next("follow it again with `weft log -f`"))
}

fn show_lines(events: &[Event], format: Format) -> Outcome<()> {
    match format {
        // A table cannot know how wide its next row will be.
        Format::Table => events.iter().try_for_each(|event| print(&line(&cells(event)))),
        Format::Json | Format::Yaml => print(&shown(events, format)?),
    }
}

async fn one(client: &mut MeshClient<Channel>, position: u64, format: Format) -> Outcome<Exit> {
    let request = v1::ReadLogRequest {
        after: position.saturating_sub(1),
        limit: 1,
        until: Some(Moment::Position(position).wire()),
        ..v1::ReadLogRequest::default()
    };
    let events = read(client, request).await?;
    if events.is_empty() {
        return Err(
            Failure::fault(format!("there is no event {position}")).next("see the last ones with `weft log`")
        );
    }
    // One event with its payload is no table.
    let format = if format == Format::Table { Format::Yaml } else { format };
    print(&shown(&events, format)?)?;
    Ok(Exit::Ok)
}

/// The position that a moment stands for: of a time, the last event recorded at or before it.
async fn position_at(client: &mut MeshClient<Channel>, moment: Moment) -> Outcome<u64> {
    if let Moment::Position(position) = moment {
        return Ok(position);
    }
    let request =
        v1::GetRequest { kind: v1::Kind::MeshDefaults.into(), name: String::new(), at: Some(moment.wire()) };
    let as_of = answer(client.get(request).await)?.as_of;
    moment.check(as_of)?;
    Ok(as_of.unwrap_or_default().position)
}

fn shown(events: &[Event], format: Format) -> Outcome<String> {
    match format {
        Format::Table => Ok(table(events).render()),
        // One per line, so that a log of any length can be read as it comes.
        Format::Json => events
            .iter()
            .map(|event| serde_json::to_string(event).map(|line| line + "\n"))
            .collect::<Result<_, _>>()
            .map_err(|error| Failure::from_error(&error)),
        Format::Yaml => {
            let documents: Vec<String> = events.iter().map(yaml).collect::<Outcome<_>>()?;
            Ok(documents.join("---\n"))
        }
    }
}

const HEADINGS: [&str; 7] = ["POSITION", "TIME", "TYPE", "SCOPE", "VERSION", "BY", "REASON"];

/// Events as a table.
pub(crate) fn table(events: &[Event]) -> Table {
    let mut table = Table::new(&HEADINGS);
    for event in events {
        table.row(cells(event));
    }
    table
}

fn cells(event: &Event) -> [String; 7] {
    [
        event.position.to_string(),
        event.recorded_at.clone(),
        event.event_type.clone(),
        event.scope.clone(),
        event.version.to_string(),
        short_actor(&event.actor),
        event.reason.clone(),
    ]
}

/// A row whose columns fit what is usual.
fn line([position, time, event_type, scope, version, by, reason]: &[String; 7]) -> String {
    let row =
        format!("{position:<9}  {time:<24}  {event_type:<21}  {scope:<34}  {version:<7}  {by:<20}  {reason}");
    printable_lines(row.trim_end()) + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> Event {
        Event::from(v1::LogEvent {
            epoch: 1,
            position: 7,
            scope: "security/default/db".into(),
            version: 2,
            r#type: "SecurityPolicySet".into(),
            schema: 1,
            actor: "spiffe://weft.local/operator/admin/admin".into(),
            reason: "audit\u{1b}[2J".into(),
            recorded_at_us: 1_772_366_400_123_456,
            payload: "{\"policy\":{}}".into(),
            hash: vec![0xab].into(),
            ..v1::LogEvent::default()
        })
    }

    #[test]
    fn an_event_is_a_row() {
        let text = table(&[event()]).render();
        let row = text.lines().nth(1).unwrap();
        assert!(row.starts_with("7          2026-03-01T12:00:00.123Z   SecurityPolicySet"), "{text}");
        assert!(!text.contains('\u{1b}'));
        assert!(!line(&cells(&event())).contains('\u{1b}'));
    }

    #[test]
    fn json_has_one_event_per_line_and_payloads_are_json() {
        let text = shown(&[event(), event()], Format::Json).unwrap();
        assert_eq!(text.lines().count(), 2);
        let value: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(value["payload"]["policy"], serde_json::json!({}));
        assert_eq!(value["hash"], "ab");
        assert_eq!(value.get("cause"), None);
    }
}
