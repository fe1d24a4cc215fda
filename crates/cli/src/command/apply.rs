//! `weft apply`: make resources what files say.

use crate::command::change::{self, ChangeArgs, Wanted};
use crate::context::ContextArgs;
use crate::failure::{Exit, Failure, Outcome};
use crate::resource::{files, wire};
use std::path::PathBuf;
use weft_model::{ExpectedVersion, Version};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A file, a folder with .yaml files, or - for standard input; may be given several times
    #[arg(short = 'f', long = "file", required = true, value_name = "PATH")]
    files: Vec<PathBuf>,
    /// Only if the resource is at this version (0: only if it is new); for a single resource
    #[arg(long, value_name = "VERSION")]
    if_version: Option<u64>,
    #[command(flatten)]
    change: ChangeArgs,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let mut resources = files::load(&args.files)?;
    if let Some(version) = args.if_version {
        let count = resources.len();
        let [resource] = resources.as_mut_slice() else {
            return Err(Failure::fault(format!(
                "--if-version is for a single resource, and there are {count}"
            ))
            .next("write `version:` into each document instead"));
        };
        resource.expected = ExpectedVersion::exactly(Version(version));
    }
    let wanted = resources.iter().map(|resource| Wanted {
        label: format!("{} {}", resource.kind.word(), resource.name),
        change: wire::put(resource),
        resource: Some(resource),
    });
    change::run(context.load()?.client()?, wanted.collect(), args.change).await
}
