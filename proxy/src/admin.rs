//! Pages for operators and tools, on a loopback address only: they tell who talks to whom.
//!
//! `/ready` (200, or 503 with the reasons), `/live`, `/metrics` (Prometheus), `/config` (exactly what is applied) and
//! `/connections` (what is live).

use crate::clock;
use crate::connections::ConnectionView;
use crate::metrics;
use crate::outbound::Target;
use crate::routes::Routes;
use crate::shared::Shared;
use crate::status::{Inner, Status};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use weft_routing::shard::{EndpointsShard, InboundShard, PolicyLayer};

/// What the pages show.
#[derive(Clone)]
pub(crate) struct Pages {
    pub(crate) shared: Arc<Shared>,
    pub(crate) status: Arc<Status>,
    pub(crate) metrics: PrometheusHandle,
}

/// The pages as a service.
pub(crate) fn router(pages: Pages) -> Router {
    Router::new()
        .route("/ready", get(ready))
        .route("/live", get(async || "live\n"))
        .route("/metrics", get(render_metrics))
        .route("/config", get(config))
        .route("/connections", get(connections))
        .with_state(pages)
}

async fn ready(State(pages): State<Pages>) -> Response {
    let told = pages.status.read();
    let reasons = unready(&pages.shared, &told);
    let warnings: Vec<_> = told.failures.into_values().chain(told.rewound).collect();
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({ "ready": reasons.is_empty(), "reasons": reasons, "warnings": warnings });
    (status, Json(body)).into_response()
}

/// Why the sidecar cannot serve. Fixed listeners are bound before any page is served; of those that follow from the snapshot it counts
/// that they were tried, since one that somebody else holds is no reason to hold up an app.
fn unready(shared: &Shared, told: &Inner) -> Vec<&'static str> {
    let identity = shared.tls.identity().map(|identity| identity.current().expires_at());
    let leaf = match identity {
        None => Some("no identity yet: it has not joined the mesh"),
        Some(expires) if clock::now() > expires => Some("its leaf has expired"),
        Some(_) => None,
    };
    let snapshot = shared.snapshot().is_none().then_some("no snapshot yet: no controller has sent one");
    let addresses = (told.addresses_due && snapshot.is_none())
        .then_some("its local addresses for upstream services are not there yet");
    let draining = shared.draining().then_some("it is stopping");
    [leaf, snapshot, addresses, draining].into_iter().flatten().collect()
}

async fn render_metrics(State(pages): State<Pages>) -> String {
    metrics::refresh(&pages.shared.connections);
    metrics::endpoints_ejected(pages.shared.routes().as_ref().map_or(0, |routes| routes.ejected()));
    pages.metrics.render()
}

async fn connections(State(pages): State<Pages>) -> Json<Vec<ConnectionView>> {
    let mut live = Vec::new();
    pages.shared.connections.for_each(|connection| live.push(connection.view()));
    Json(live)
}

async fn config(State(pages): State<Pages>) -> Json<Value> {
    let status = pages.status.read();
    let routes = pages.shared.routes();
    let leaf = pages.shared.tls.identity().map(|identity| {
        let current = identity.current();
        json!({
            "identity": current.spiffe_id().to_string(),
            "serial": current.identity().serial,
            "expires": clock::rfc3339(current.expires_at()),
        })
    });
    let mut body = json!({
        "instance": pages.shared.own,
        "region": pages.shared.home.region,
        "zone": pages.shared.home.zone,
        "leaf": leaf,
        "draining": pages.shared.draining(),
        "listeners": listeners(&status.listeners),
        "loopback_listeners": listeners(&status.loopback),
        "failed_listeners": status.failures,
        "apps": pages.shared.apps.iter().map(|(port, app)| (port.to_string(), app)).collect::<BTreeMap<_, _>>(),
    });
    merge(&mut body, control(&status));
    merge(&mut body, routes.as_deref().map_or_else(|| json!({ "version": null }), applied));
    Json(body)
}

fn merge(body: &mut Value, more: Value) {
    if let (Value::Object(body), Value::Object(more)) = (body, more) {
        body.extend(more);
    }
}

fn control(status: &Inner) -> Value {
    json!({
        "connected": status.connected,
        "wanted": status.wanted.map(|version| version.to_string()),
        "head": status.head.map(|version| version.to_string()),
        "stale": status.stale_since.map(|since| json!({ "since": clock::rfc3339(since) })),
        "control_error": status.control_error,
        "refused": status.refused,
        "log_rewound": status.rewound,
    })
}

fn listeners(listeners: &BTreeMap<SocketAddr, Target>) -> Value {
    let entry = |(address, target): (&SocketAddr, &Target)| {
        (address.to_string(), json!(format!("{}:{}", target.service, target.port)))
    };
    Value::Object(listeners.iter().map(entry).collect())
}

fn applied(routes: &Routes) -> Value {
    let snapshot = &*routes.snapshot;
    let shards = snapshot.manifest.entries().map(|(key, entry)| {
        json!({ "key": key.to_string(), "hash": entry.hash.to_string(), "position": entry.position })
    });
    json!({
        "version": snapshot.version.to_string(),
        "manifest_hash": snapshot.manifest_hash.to_string(),
        "trust_domain": snapshot.trust.trust_domain,
        "shards": shards.collect::<Vec<_>>(),
        "endpoints": snapshot.endpoints.values().map(|shard| endpoints(shard, routes)).collect::<Vec<_>>(),
        "inbound": inbound(&snapshot.inbound),
    })
}

fn endpoints(shard: &EndpointsShard, routes: &Routes) -> Value {
    let list = shard.endpoints.iter().zip(routes.views(&shard.service)).map(|(endpoint, counted)| {
        json!({
            "counted": counted,
            "instance": endpoint.instance,
            "address": endpoint.address,
            "draining": endpoint.draining,
            "health": endpoint.health,
            "position": endpoint.position,
            "region": endpoint.locality.region,
            "zone": endpoint.locality.zone,
            "labels": endpoint.labels,
        })
    });
    json!({
        "service": shard.service,
        "address": shard.address,
        "ports": shard.ports,
        "endpoints": list.collect::<Vec<_>>(),
        "traffic": shard.traffic.as_ref().map(|resolved| &resolved.policy),
        "overrides": shard.overrides.iter().map(|(source, resolved)| (source.to_string(), &resolved.policy))
            .collect::<BTreeMap<_, _>>(),
    })
}

fn inbound(shard: &InboundShard) -> Value {
    let layer = |layer: &PolicyLayer| {
        json!({
            "scope": layer.scope.to_string(),
            "version": layer.source.version,
            "position": layer.source.position,
            "policy": layer.policy,
        })
    };
    json!({
        "service": shard.service,
        "ports": shard.ports,
        "policies": shard.layers.iter().map(layer).collect::<Vec<_>>(),
        "mesh_default": shard.mesh_default,
    })
}
