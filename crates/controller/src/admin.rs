//! /live, /ready and /metrics, on loopback and without certificates.

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use weft_projector::{Chain, View};

#[derive(Clone)]
struct Admin {
    view: View,
    metrics: Option<Arc<PrometheusHandle>>,
    drain: CancellationToken,
}

/// Serves until `ended`. `drain` makes it unready before that.
pub(crate) async fn serve(
    socket: TcpListener,
    view: View,
    metrics: Option<Arc<PrometheusHandle>>,
    drain: CancellationToken,
    ended: CancellationToken,
) {
    let admin = Admin { view, metrics, drain };
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
    if admin.drain.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n".into());
    }
    match admin.view.fault() {
        None => (StatusCode::OK, "ready\n".into()),
        Some(fault) => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", Chain(&*fault))),
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
