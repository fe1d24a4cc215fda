//! `weft replay`: the state as the log makes it, folded again from the first event.

use crate::command::verify::{Progress, lost, unreadable};
use crate::context::ContextArgs;
use crate::failure::{Exit, Failure, Outcome, chain};
use crate::moment::Moment;
use crate::output::table::Table;
use crate::output::{Format, OutputArgs, json, print, yaml};
use serde::Serialize;
use std::collections::BTreeMap;
use weft_eventlog::{Reader, UnixMicros};
use weft_model::Position;
use weft_projector::{FoldFrom, FoldToError, Store, VerifyRowsError, fold_to, verify_rows};
use weft_proto::v1;
use weft_routing::Projection;

#[derive(Debug, clap::Args)]
#[command(after_help = "Two machines that print the same hashes for the same version folded the same log.")]
pub(crate) struct Args {
    /// Up to this version or time [default: the log's end]
    #[arg(long, value_name = "VERSION|TIME")]
    to: Option<Moment>,
    /// Fold incrementally and all at once, compare both, and compare with the stored rows if they are of this version
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// What the log makes of the mesh.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Report {
    version: String,
    services: usize,
    sidecars: usize,
    /// Canonical hashes, by shard.
    shards: BTreeMap<String, String>,
    /// Canonical hashes, by interest class.
    manifests: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    checks: Vec<Check>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Check {
    what: String,
    ok: bool,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let context = context.load()?;
    let reader = Reader::new(context.reader()?);
    let to = target(&reader, args.to).await?;
    let mut progress = Progress::new("folding");
    let folded =
        fold_to(&reader, to, FoldFrom::FirstEvent, |seen| progress.show(seen.folded.0, seen.of.0)).await;
    progress.end();
    let projection = folded.map_err(|error| unfolded(&error))?;
    let version = projection.version();
    if let Some(to) = args.to {
        to.check(Some(v1::ConfigVersion { epoch: version.epoch.0, position: version.position.0 }))?;
    }

    let mut report = Report::of(&projection);
    if args.check {
        report.checks.push(Check {
            what: "incremental and full computation give the same bytes".to_owned(),
            ok: projection == projection.recompute(),
        });
        let store = Store::reading(&context.reader_url()?).map_err(|error| Failure::from_error(&error))?;
        let rows = verify_rows(&reader, &store, |_| ()).await;
        store.close().await;
        report.checks.push(match rows {
            Ok(rows) => Check {
                // The rows are of one version only: proven there, they are proven to be this log's.
                what: match rows.checkpoint == version {
                    true => format!("{} stored rows of {} are equal", rows.rows, rows.checkpoint),
                    false => format!(
                        "{} stored rows, which are of {}, are equal to the fold there",
                        rows.rows, rows.checkpoint
                    ),
                },
                ok: rows.differences.is_empty(),
            },
            Err(VerifyRowsError::Fold(FoldToError::NotYet { wanted, head })) => {
                Check { what: lost(wanted, head), ok: false }
            }
            Err(VerifyRowsError::Fold(error)) => return Err(unfolded(&error)),
            Err(error @ VerifyRowsError::Store(_)) => return Err(unreadable(&error)),
        });
    }
    print(&match args.output.format {
        Format::Table => text(&report),
        Format::Json => json(&report)?,
        Format::Yaml => yaml(&report)?,
    })?;
    Ok(if report.checks.iter().all(|check| check.ok) { Exit::Ok } else { Exit::CheckFailed })
}

/// Why the log could not be folded up to where it should.
fn unfolded(error: &FoldToError) -> Failure {
    match error {
        FoldToError::Store(_) => unreadable(error),
        FoldToError::Fault(fault) => {
            Failure::new(Exit::CheckFailed, format!("the log cannot be folded: {}", chain(fault)))
                .next("see what is wrong with it with `weft verify`")
        }
        FoldToError::NotYet { head, .. } => {
            Failure::fault(error.to_string()).next(format!("name a version up to {head}, or leave --to out"))
        }
    }
}

async fn target(reader: &Reader, to: Option<Moment>) -> Outcome<Position> {
    let position = match to {
        Some(Moment::Position(position)) => return Ok(Position(position)),
        Some(Moment::Version(version)) => return Ok(version.position),
        Some(Moment::Time(ms)) => reader.position_at(UnixMicros::end_of_millis(ms)).await,
        None => reader.head().await.map(|head| head.position),
    };
    position.map_err(|error| unreadable(&error))
}

impl Report {
    fn of(projection: &Projection) -> Self {
        let shards = projection.shards().iter();
        let classes = projection.classes().values();
        Self {
            version: projection.version().to_string(),
            services: projection.state().services().count(),
            sidecars: projection.sidecars().count(),
            shards: shards.map(|(key, shard)| (key.to_string(), shard.hash.to_string())).collect(),
            manifests: classes
                .map(|class| (class.interest.to_string(), class.manifest.hash().to_string()))
                .collect(),
            checks: Vec::new(),
        }
    }
}

fn text(report: &Report) -> String {
    let mut text = format!(
        "folded to {}: {} services, {} sidecars, {} shards, {} manifests\n",
        report.version,
        report.services,
        report.sidecars,
        report.shards.len(),
        report.manifests.len()
    );
    for (heading, hashes) in [("SHARD", &report.shards), ("MANIFEST OF", &report.manifests)] {
        let mut table = Table::new(&[heading, "SHA-256"]);
        for (key, hash) in hashes {
            table.row([key.clone(), hash.clone()]);
        }
        if !table.is_empty() {
            text.push('\n');
            text.push_str(&table.render());
        }
    }
    if !report.checks.is_empty() {
        text.push('\n');
    }
    for check in &report.checks {
        text.push_str(&format!("{}  {}\n", if check.ok { "ok  " } else { "FAIL" }, check.what));
    }
    text
}
