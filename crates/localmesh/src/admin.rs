//! Asking a process how it is, over its loopback admin port.

use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use std::time::Duration;
use tokio::time::timeout;

/// How long an answer may take. It comes from the same machine.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest answer that is taken.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// GET over plain HTTP from this machine: the status code and the body, or why there is none.
pub(crate) async fn get(port: u16, path: &str) -> Result<(u16, String), String> {
    let ask = async {
        let client: Client<_, Empty<&[u8]>> = Client::builder(TokioExecutor::new()).build_http();
        let uri = format!("http://127.0.0.1:{port}{path}").parse().map_err(|_| "not a path".to_owned())?;
        let response = client.get(uri).await.map_err(|_| format!("nobody answers on port {port}"))?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    timeout(ANSWER_TIMEOUT, ask).await.unwrap_or_else(|_| Err(format!("no answer on port {port} in time")))
}

/// Whether it says that it is ready, and what it warns of; else why not.
pub(crate) async fn ready(port: u16) -> Result<Vec<String>, String> {
    match get(port, "/ready").await? {
        (200, answer) => Ok(texts(&answer, &["warnings"]).unwrap_or_default()),
        (_, answer) => Err(reasons(&answer)),
    }
}

/// The reasons and warnings of an answer that says no; all of it, if it has another form.
fn reasons(answer: &str) -> String {
    let told = texts(answer, &["reasons", "warnings"]).filter(|told| !told.is_empty());
    told.map_or_else(|| answer.trim().to_owned(), |told| told.join("; "))
}

/// The texts in these lists of an answer; none if it is no JSON.
fn texts(answer: &str, lists: &[&str]) -> Option<Vec<String>> {
    let answer: Value = serde_json::from_str(answer).ok()?;
    let lists = lists.iter().filter_map(|name| answer.get(name)?.as_array());
    Some(lists.flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect())
}

/// What a sidecar runs: `1.42`. None if it runs nothing yet or does not answer.
pub(crate) async fn config_version(port: u16) -> Option<String> {
    let (_, body) = get(port, "/config").await.ok()?;
    let config: Value = serde_json::from_str(&body).ok()?;
    config.get("version")?.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_read_out_of_an_answer_or_it_is_shown_as_it_is() {
        let answer = r#"{"ready":false,"reasons":["no snapshot yet"],"warnings":["no controller"]}"#;
        assert_eq!(reasons(answer), "no snapshot yet; no controller");
        assert_eq!(reasons("starting\n"), "starting");
        assert_eq!(reasons("{}"), "{}");
    }
}
