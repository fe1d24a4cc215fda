//! The sample `web` service.

use crate::failure::{Exit, Outcome};
use crate::sample::{ANSWER_TIMEOUT, Common, answer, serve};
use axum::Router;
use axum::http::Uri;
use axum::routing::get;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::time::timeout;

/// Largest answer that is taken from api.
const ANSWER_BYTES_MAX: usize = 64 << 10;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
    /// Where api is
    #[arg(long, value_name = "URL")]
    api: Uri,
}

pub(super) async fn run(args: Args) -> Outcome<Exit> {
    let (name, api) = (Arc::<str>::from(args.common.name.as_str()), args.api);
    let handler = move || {
        let (name, api) = (Arc::clone(&name), api.clone());
        async move {
            let asked = timeout(ANSWER_TIMEOUT, ask(api)).await;
            let asked = asked.unwrap_or_else(|_| Err("api does not answer in time".to_owned()));
            answer(asked.map(|api| json!({ "web": &*name, "api": api })), &name)
        }
    };
    serve(&args.common, Router::new().route("/", get(handler))).await
}

/// One request over a connection of its own, so that each one shows which instance the mesh chose.
async fn ask(api: Uri) -> Result<Value, String> {
    let client: Client<_, Empty<&[u8]>> =
        Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http();
    let response =
        client.get(api).await.map_err(|error| format!("api: {}", crate::failure::chain(&error)))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| format!("api: {error}"))?.to_bytes();
    let value: Value =
        serde_json::from_slice(&body).map_err(|_| format!("api answers {status}, not JSON"))?;
    if status.is_success() { Ok(value) } else { Err(format!("api answers {status}: {value}")) }
}
