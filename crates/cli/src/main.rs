//! `weft`: the command line of the mesh.
//!
//! [`args`] says what can be typed, [`command`] has one module per command, and everything that they share is beside
//! them: [`context`] (which mesh), [`moment`] (`--at`), [`resource`] (YAML), [`output`] (tables, JSON), [`failure`] (what
//! a person is told, and exit statuses). Answers go to standard output, everything else to standard error.
//!
//! Deliberately absent: rules of the mesh. They are the model's and the controller's; here they are only put into words.

mod args;
mod command;
mod context;
mod failure;
mod moment;
mod output;
mod resource;
mod sample;

use clap::Parser;
use failure::{Exit, Failure, Outcome};
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = match args::Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help is an answer; a mistyped command is a fault, and clap's own status for it means another thing here.
            let exit = if error.use_stderr() { Exit::Fault } else { Exit::Ok };
            let _ = error.print();
            return exit.into();
        }
    };
    match run(arguments) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            if failure.exit != Exit::Ok {
                // If nobody can be told, the exit status still says it.
                let _ = writeln!(std::io::stderr(), "{failure}");
            }
            failure.exit.into()
        }
    }
}

fn run(arguments: args::Arguments) -> Outcome<Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::from_error(&error))?;
    let result = runtime.block_on(Box::pin(command::run(arguments)));
    // A read of standard input or of a terminal cannot be interrupted, and nothing waits for it any more.
    runtime.shutdown_background();
    result
}
