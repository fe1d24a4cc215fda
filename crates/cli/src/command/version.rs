//! `weft version`: of this program, and where the mesh's log is.

use crate::command::answer;
use crate::context::ContextArgs;
use crate::failure::{Exit, Outcome};
use crate::output::{Format, OutputArgs, json, print, yaml};
use serde::Serialize;
use weft_proto::v1;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Serialize)]
struct Versions {
    weft: &'static str,
    /// Where the mesh is and what its log's end is; none if there is no mesh that answers.
    mesh: Option<MeshVersion>,
}

#[derive(Debug, Serialize)]
struct MeshVersion {
    controllers: String,
    head: String,
}

pub(crate) async fn run(args: Args, context: &ContextArgs) -> Outcome<Exit> {
    let versions = Versions { weft: env!("CARGO_PKG_VERSION"), mesh: mesh(context).await.ok() };
    print(&match args.output.format {
        Format::Table => match &versions.mesh {
            Some(mesh) => {
                format!("weft {}\nmesh at {}, log at {}\n", versions.weft, mesh.controllers, mesh.head)
            }
            None => format!("weft {}\nno mesh answers\n", versions.weft),
        },
        Format::Json => json(&versions)?,
        Format::Yaml => yaml(&versions)?,
    })?;
    Ok(Exit::Ok)
}

async fn mesh(context: &ContextArgs) -> Outcome<MeshVersion> {
    let context = context.load()?;
    let status = answer(context.client()?.status(v1::StatusRequest { at: None }).await)?;
    let head = status.head.unwrap_or_default();
    Ok(MeshVersion { controllers: context.controllers(), head: format!("{}.{}", head.epoch, head.position) })
}
