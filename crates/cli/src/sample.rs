//! The sample services of the local mesh: small enough to read, real enough to show what the mesh does.
//!
//! `web` calls `api` for each request, `api` asks `db`, and every answer names the instance that gave it. They know
//! nothing of the mesh: each talks plain HTTP or PostgreSQL to a port on its own machine.

mod api;
mod web;

use crate::failure::{Exit, Failure, Outcome};
use axum::Router;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// Longest that a sample service works on one request, its own upstream included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    service: Service,
}

#[derive(Debug, clap::Subcommand)]
enum Service {
    /// Calls api for each request
    Web(web::Args),
    /// Asks the database for each request
    Api(api::Args),
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Where to listen
    #[arg(long, value_name = "IP:PORT")]
    listen: SocketAddr,
    /// The instance's name, shown in every answer
    #[arg(long)]
    name: String,
}

pub(crate) async fn run(args: Args) -> Outcome<Exit> {
    match args.service {
        Service::Web(args) => web::run(args).await,
        Service::Api(args) => api::run(args).await,
    }
}

/// Serves until somebody wants the end.
async fn serve(common: &Common, router: Router) -> Outcome<Exit> {
    let address = common.listen;
    let listener = TcpListener::bind(address).await.map_err(|error| {
        Failure::fault(format!("{} cannot listen on {address}: {error}", common.name))
            .next("choose another --listen")
    })?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| Failure::from_error(&error))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| Failure::from_error(&error))?;
    eprintln!("{} listens on {address}", common.name);
    let router = router.route("/healthz", axum::routing::get(|| async { "ok\n" }));
    tokio::select! {
        served = axum::serve(listener, router) => served.map_err(|error| Failure::from_error(&error))?,
        // Nobody's data hangs on an answer that is lost now; a stop that waits for idle clients helps nobody.
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(Exit::Ok)
}

/// An answer as JSON on one line, as a terminal shows it best.
fn answer(value: Result<Value, String>, name: &str) -> Response {
    let (status, body) = match value {
        Ok(body) => (StatusCode::OK, body),
        Err(error) => (StatusCode::BAD_GATEWAY, json!({ "instance": name, "error": error })),
    };
    (status, [("content-type", "application/json")], format!("{body}\n")).into_response()
}
