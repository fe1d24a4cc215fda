//! One module per command: its arguments, what it asks, and how it shows the answer.

pub(crate) mod apply;
pub(crate) mod check;
pub(crate) mod completion;
pub(crate) mod delete;
pub(crate) mod describe;
pub(crate) mod down;
pub(crate) mod get;
pub(crate) mod log;
pub(crate) mod replay;
pub(crate) mod rollout;
pub(crate) mod sim;
pub(crate) mod sql;
pub(crate) mod status;
pub(crate) mod token;
pub(crate) mod up;
pub(crate) mod verify;
pub(crate) mod version;
pub(crate) mod watchdog;
pub(crate) mod why;

mod change;

use crate::args::{Arguments, Command};
use crate::failure::{Exit, Failure, Outcome};
use tonic::{Response, Status};
use weft_client::CallError;

/// Runs the command that was typed.
pub(crate) async fn run(arguments: Arguments) -> Outcome<Exit> {
    let context = &arguments.context;
    match arguments.command {
        Command::Up(args) => Box::pin(up::run(args)).await,
        Command::Down(args) => down::run(&args).await,
        Command::Check(args) => check::run(&args, context).await,
        Command::Status(args) => status::run(args, context).await,
        Command::Apply(args) => apply::run(args, context).await,
        Command::Get(args) => get::run(args, context).await,
        Command::Describe(args) => describe::run(args, context).await,
        Command::Delete(args) => delete::run(args, context).await,
        Command::Log(args) => log::run(args, context).await,
        Command::Rollout(args) => rollout::run(args, context).await,
        Command::Why(args) => why::run(args, context).await,
        Command::Replay(args) => Box::pin(replay::run(args, context)).await,
        Command::Verify(args) => Box::pin(verify::run(args, context)).await,
        Command::Sim(args) => Box::pin(sim::run(args, context)).await,
        Command::Token(args) => token::run(args, context).await,
        Command::Sql(args) => sql::run(args, context).await,
        Command::Version(args) => version::run(args, context).await,
        Command::Completion(args) => completion::run(&args),
        Command::Sample(args) => Box::pin(crate::sample::run(args)).await,
        Command::Watchdog(args) => watchdog::run(&args),
    }
}

/// The answer of a read. Not repeated when nobody answers: a person reads the error and decides.
fn answer<T>(answer: Result<Response<T>, Status>) -> Outcome<T> {
    answer.map(Response::into_inner).map_err(|status| Failure::from(CallError::from(status)))
}

/// Who an actor is, in short: `default/api/api-1`, `operator/admin`; the whole text if it is no identity of the mesh.
fn short_actor(actor: &str) -> String {
    use weft_identity::spiffe::{SpiffeId, Subject};
    match actor.parse::<SpiffeId>().map(|id| id.subject) {
        Ok(Subject::Instance(instance)) => instance.to_string(),
        Ok(Subject::Controller(name)) => format!("controller/{name}"),
        Ok(Subject::Operator { role, name }) => format!("{}/{name}", role.as_str()),
        Err(_) => actor.to_owned(),
    }
}
