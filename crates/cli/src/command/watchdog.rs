//! `weft watchdog`: stops a local mesh whose owner was killed. Started by the local mesh, not by people.

use crate::failure::{Exit, Failure, Outcome};
use std::path::PathBuf;
use weft_localmesh::home::Home;
use weft_localmesh::leftover;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    home: PathBuf,
    #[arg(long)]
    owner: u32,
}

pub(crate) fn run(args: &Args) -> Outcome<Exit> {
    leftover::watch(&Home::at(&args.home), args.owner).map_err(|error| Failure::from_error(&error))?;
    Ok(Exit::Ok)
}
