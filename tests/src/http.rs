//! HTTP requests as a shell would make them: each on a connection of its own, so each is one connection of the mesh.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::time::timeout;

/// How long an answer may take: a chain of services with all their retries.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// Largest answer that is taken; the largest are a sidecar's metrics.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// The status code and the body.
///
/// # Errors
///
/// Nobody answers in time.
pub async fn get(address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let asking = async {
        let client: Client<_, Empty<&[u8]>> =
            Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http();
        let response = client.get(format!("http://{address}{path}").parse()?).await?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!(error))?.to_bytes();
        anyhow::Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    let answer = timeout(ANSWER_LIMIT, asking).await.context("no answer in time");
    answer.flatten().with_context(|| format!("GET http://{address}{path}"))
}

/// The body of a successful answer.
///
/// # Errors
///
/// Nobody answers in time, or the answer is not 200.
pub async fn body(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let (status, body) = get(address, path).await?;
    anyhow::ensure!(status == 200, "GET http://{address}{path} was answered {status}: {}", body.trim());
    Ok(body)
}
