//! `weft delete`: remove resources, by name or as files list them.

use crate::command::change::{self, ChangeArgs, Wanted};
use crate::context::ContextArgs;
use crate::failure::{Exit, Failure, Outcome};
use crate::resource::{Kind, files, wire};
use std::path::PathBuf;
use weft_model::{ExpectedVersion, Version};

/// What a person may not expect of an instance that is gone.
const REGISTERS_AGAIN: &str = "a sidecar that still runs registers its instance again: stop the sidecar first, then delete its instance";

#[derive(Debug, clap::Args)]
#[command(after_help = "A sidecar that still runs registers its instance again: stop the sidecar first.")]
pub(crate) struct Args {
    /// services, instances, traffic or security
    #[arg(required_unless_present = "files", requires = "name")]
    kind: Option<Kind>,
    /// Its name or scope
    name: Option<String>,
    /// Delete what the files list, whatever else they say; a file, a folder, or - for standard input
    #[arg(short = 'f', long = "file", value_name = "PATH", conflicts_with = "kind")]
    files: Vec<PathBuf>,
    /// Only if the resource is at this version
    #[arg(long, value_name = "VERSION", conflicts_with = "files")]
    if_version: Option<u64>,
    #[command(flatten)]
    change: ChangeArgs,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let undeletable = |error: wire::NotDeletable| Failure::fault(error.to_string());
    let resources = if args.files.is_empty() { Vec::new() } else { files::load(&args.files)? };
    let mut wanted = Vec::new();
    for resource in &resources {
        wanted.push(Wanted {
            label: format!("{} {}", resource.kind.word(), resource.name),
            change: wire::delete(resource.kind, &resource.name, resource.expected).map_err(undeletable)?,
            resource: Some(resource),
        });
    }
    if let (Some(kind), Some(name)) = (args.kind, &args.name) {
        let name = kind.full_name(name);
        let expected = args
            .if_version
            .map_or(ExpectedVersion::Any, |version| ExpectedVersion::exactly(Version(version)));
        wanted.push(Wanted {
            label: format!("{} {name}", kind.word()),
            change: wire::delete(kind, &name, expected).map_err(undeletable)?,
            resource: None,
        });
    }
    let instances =
        args.kind == Some(Kind::Instance) || resources.iter().any(|resource| resource.kind == Kind::Instance);
    let exit = change::run(context.load()?.client()?, wanted, args.change).await?;
    if instances {
        eprintln!("note: {REGISTERS_AGAIN}");
    }
    Ok(exit)
}
