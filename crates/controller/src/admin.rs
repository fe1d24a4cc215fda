//! /live, /ready and /metrics, on loopback and without certificates.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use weft_model::Chain;
use weft_projector::View;

use crate::history::History;

#[derive(Clone)]
struct Admin {
    view: View,
    metrics: Option<Arc<PrometheusHandle>>,
    serving: Serving,
}

/// Whether the API is there for others.
#[derive(Clone)]
pub(crate) struct Serving {
    /// Set once it takes connections: the log is folded by then, and the root in it.
    pub(crate) begun: CancellationToken,
    /// Set when it takes no more.
    pub(crate) drain: CancellationToken,
    /// Whether the log lost its end, which is said and does not stop it from serving.
    pub(crate) history: History,
}

/// Serves until `ended`.
pub(crate) async fn serve(
    socket: TcpListener,
    view: View,
    metrics: Option<Arc<PrometheusHandle>>,
    serving: Serving,
    ended: CancellationToken,
) {
    let admin = Admin { view, metrics, serving };
    let router = Router::new()
        .route("/live", get(|| async { "ok\n" }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics_text))
        .with_state(admin);
    let served = axum::serve(socket, router).with_graceful_shutdown(ended.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::error!(%error, "the admin port ended");
    }
}

async fn ready(State(admin): State<Admin>) -> (StatusCode, String) {
    let reason = if admin.serving.drain.is_cancelled() {
        "shutting down".into()
    } else if let Some(fault) = admin.view.fault() {
        Chain(&*fault).to_string()
    } else if admin.serving.begun.is_cancelled() {
        return (StatusCode::OK, ready_text(&admin.serving.history));
    } else {
        let folded = admin.view.read(|projection| projection.version().position);
        format!("starting; the log is folded up to event {folded}")
    };
    (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n"))
}

fn ready_text(history: &History) -> String {
    match &*history.standing.borrow() {
        None => "ready\n".into(),
        Some(rewind) => format!(
            "ready, but LOG_REWOUND: {} has seen event {}, and the log ended at {}; no change is taken until an operator \
             restores what was lost or runs `weft log adopt-history`\n",
            rewind.witness,
            rewind.seen.version(),
            rewind.found
        ),
    }
}

async fn metrics_text(State(admin): State<Admin>) -> (StatusCode, String) {
    match &admin.metrics {
        Some(metrics) => {
            metrics.run_upkeep();
            (StatusCode::OK, metrics.render())
        }
        None => (StatusCode::NOT_FOUND, "this process records no metrics\n".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_means_that_it_serves() {
        let serving = Serving {
            begun: CancellationToken::new(),
            drain: CancellationToken::new(),
            history: History::default(),
        };
        let admin = Admin { view: View::new(), metrics: None, serving: serving.clone() };
        let ready = async || ready(State(admin.clone())).await.0;
        assert_eq!(ready().await, StatusCode::SERVICE_UNAVAILABLE);
        serving.begun.cancel();
        assert_eq!(ready().await, StatusCode::OK);
        serving.drain.cancel();
        assert_eq!(ready().await, StatusCode::SERVICE_UNAVAILABLE);
    }
}
