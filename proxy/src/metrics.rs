//! Every metric, in one place: its name, its labels, what it counts. Names and labels are part of the surface.

use crate::connections::{Connection, Direction, Registry};
use crate::outlier::Step;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, PrometheusBuilder, PrometheusHandle};
use std::sync::atomic::Ordering;
use std::time::Duration;
use weft_model::{CloseReason, ConfigVersion, Timestamp};

const OPENED: &str = "weft_connections_opened_total";
const CLOSED: &str = "weft_connections_closed_total";
const LIVE: &str = "weft_connections_live";
const FORBIDDEN: &str = "weft_connections_forbidden";
const BYTES: &str = "weft_bytes_total";
const CONNECT_SECONDS: &str = "weft_connect_seconds";
const ATTEMPTS: &str = "weft_connect_attempts_total";
const AUTHORIZATIONS: &str = "weft_authorizations_total";
const HANDSHAKES_FAILED: &str = "weft_tls_handshakes_failed_total";
const ACCEPT_ERRORS: &str = "weft_accept_errors_total";
const CONFIG_POSITION: &str = "weft_config_position";
const CONFIG_STALE: &str = "weft_config_stale";
const CONFIG_REFUSED: &str = "weft_config_refused_total";
const LOG_REWOUND: &str = "weft_log_rewound";
const CONTROLLER_CONNECTED: &str = "weft_controller_connected";
const LEAF_EXPIRY: &str = "weft_leaf_expiry_timestamp_seconds";
const RECORDS_DROPPED: &str = "weft_records_dropped_total";
const LISTENERS_FAILED: &str = "weft_listeners_failed";
const APP_HEALTHY: &str = "weft_app_healthy";
const SELF_DOUBT: &str = "weft_self_doubt";
const UPSTREAMS_ADDED: &str = "weft_upstreams_added_total";
const PANIC: &str = "weft_services_in_panic";
const PANIC_PICKS: &str = "weft_panic_picks_total";
const LOCALITY_PICKS: &str = "weft_locality_picks_total";
const RETRIES: &str = "weft_connect_retries_total";
const CIRCUIT_OPEN: &str = "weft_circuit_open_total";
const EJECTED: &str = "weft_endpoints_ejected";
const EJECTIONS: &str = "weft_endpoint_ejections_total";
const EJECTIONS_KEPT: &str = "weft_endpoint_ejections_kept_total";
const RETURNS: &str = "weft_endpoint_returns_total";
const REDIRECTED: &str = "weft_redirected_total";
const DNS_QUERIES: &str = "weft_dns_queries_total";

/// From a loopback connect to the longest connect timeout that a policy may give.
const CONNECT_BUCKETS: [f64; 12] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 60.0];

/// Makes the `metrics` crate count for this process. To be called once, by the binary.
///
/// # Errors
/// If something else in the process counts already.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let matcher = metrics_exporter_prometheus::Matcher::Full(CONNECT_SECONDS.to_owned());
    let handle =
        PrometheusBuilder::new().set_buckets_for_metric(matcher, &CONNECT_BUCKETS)?.install_recorder()?;
    describe();
    Ok(handle)
}

fn describe() {
    describe_counter!(OPENED, "Connections accepted, by direction");
    describe_counter!(UPSTREAMS_ADDED, "Upstreams on demand that were asked for, by result");
    describe_counter!(CLOSED, "Connections ended or refused, by direction and close reason");
    describe_gauge!(LIVE, "Connections that are open now, by direction");
    describe_gauge!(
        FORBIDDEN,
        "Live inbound connections that policies do not permit any more, by what spares them"
    );
    describe_counter!(
        BYTES,
        "Application bytes, by direction of the connection and of the bytes, while they move"
    );
    describe_histogram!(
        CONNECT_SECONDS,
        "From an accepted connection to one that carries bytes, by direction"
    );
    describe_counter!(ATTEMPTS, "Attempts to open a connection to an endpoint, by result");
    describe_counter!(AUTHORIZATIONS, "Verdicts on inbound connections, by verdict and mode");
    describe_counter!(HANDSHAKES_FAILED, "TLS handshakes that failed, by direction and fault");
    describe_counter!(ACCEPT_ERRORS, "Connections that could not be accepted");
    describe_gauge!(CONFIG_POSITION, "Log position of the configuration, wanted and applied");
    describe_gauge!(CONFIG_STALE, "1 while no notice came for two heartbeats");
    describe_counter!(CONFIG_REFUSED, "Snapshots that were refused");
    describe_gauge!(
        LOG_REWOUND,
        "1 while controllers refuse this sidecar because the log lost what it has seen"
    );
    describe_gauge!(CONTROLLER_CONNECTED, "1 while a controller sends notices");
    describe_gauge!(LEAF_EXPIRY, "When the leaf expires, in seconds since 1970");
    describe_counter!(
        RECORDS_DROPPED,
        "Connection records dropped because the log was not written fast enough"
    );
    describe_gauge!(LISTENERS_FAILED, "Local addresses of upstream services that cannot be listened on");
    describe_gauge!(APP_HEALTHY, "1 if the last probes of the local app succeeded, 0 if they failed");
    describe_gauge!(SELF_DOUBT, "How much the sidecar doubts its own view of the app's health, 0 to 7");
    describe_gauge!(PANIC, "Upstream services so few of whose endpoints are healthy that all are tried");
    describe_counter!(
        PANIC_PICKS,
        "Endpoints chosen whatever their health, because their service is in panic"
    );
    describe_counter!(
        LOCALITY_PICKS,
        "Endpoints chosen by a policy that prefers near ones, by how near they are"
    );
    describe_counter!(RETRIES, "Failed connects that were to be tried again, by what became of that");
    describe_counter!(CIRCUIT_OPEN, "Connections refused because a circuit limit is reached, by limit");
    describe_gauge!(EJECTED, "Endpoints that are passed over because they fail, or tried again after it");
    describe_counter!(EJECTIONS, "Endpoints ejected, by cause and by the state that they were in");
    describe_counter!(
        EJECTIONS_KEPT,
        "Endpoints not ejected because too many of their service are, by cause"
    );
    describe_counter!(RETURNS, "Endpoints that work again after an ejection, by the state that they were in");
    describe_counter!(REDIRECTED, "Connections that the kernel redirected here, by what became of them");
    describe_counter!(DNS_QUERIES, "DNS queries, by transport and by what became of them");
}

pub(crate) fn opened(direction: Direction) {
    counter!(OPENED, "direction" => direction.as_str()).increment(1);
}

pub(crate) fn closed(connection: &Connection, reason: CloseReason) {
    let direction = connection.direction.as_str();
    counter!(CLOSED, "direction" => direction, "reason" => reason.as_str()).increment(1);
    moved(connection);
}

/// Adds the bytes that moved since the last call for this connection.
pub(crate) fn moved(connection: &Connection) {
    let direction = connection.direction.as_str();
    let counters = &connection.counters;
    let ways =
        [("up", &counters.up, &connection.reported.0), ("down", &counters.down, &connection.reported.1)];
    for (way, total, reported) in ways {
        let total = total.load(Ordering::Relaxed);
        let before = reported.fetch_max(total, Ordering::Relaxed);
        if total > before {
            counter!(BYTES, "direction" => direction, "bytes" => way).increment(total - before);
        }
    }
}

pub(crate) fn connected(direction: Direction, took: Duration) {
    histogram!(CONNECT_SECONDS, "direction" => direction.as_str()).record(took);
}

/// A controller was asked for an upstream on demand.
pub(crate) fn upstream_added(result: &'static str) {
    counter!(UPSTREAMS_ADDED, "result" => result).increment(1);
}

/// `failure` is none for an attempt that succeeded.
pub(crate) fn attempt(failure: Option<CloseReason>) {
    counter!(ATTEMPTS, "result" => failure.map_or("opened", CloseReason::as_str)).increment(1);
}

pub(crate) fn authorized(permitted: bool, mode: &'static str) {
    let verdict = if permitted { "allow" } else { "deny" };
    counter!(AUTHORIZATIONS, "verdict" => verdict, "mode" => mode).increment(1);
}

pub(crate) fn handshake_failed(direction: Direction, fault: &'static str) {
    counter!(HANDSHAKES_FAILED, "direction" => direction.as_str(), "fault" => fault).increment(1);
}

pub(crate) fn accept_failed() {
    counter!(ACCEPT_ERRORS).increment(1);
}

pub(crate) fn config(kind: &'static str, version: ConfigVersion) {
    #[expect(clippy::cast_precision_loss, reason = "a gauge is a float; exact up to 2^53 events")]
    gauge!(CONFIG_POSITION, "kind" => kind).set(version.position.0 as f64);
}

pub(crate) fn config_refused() {
    counter!(CONFIG_REFUSED).increment(1);
}

pub(crate) fn stale(stale: bool) {
    gauge!(CONFIG_STALE).set(f64::from(u8::from(stale)));
}

pub(crate) fn log_rewound(rewound: bool) {
    gauge!(LOG_REWOUND).set(f64::from(u8::from(rewound)));
}

pub(crate) fn controller(connected: bool) {
    gauge!(CONTROLLER_CONNECTED).set(f64::from(u8::from(connected)));
}

pub(crate) fn leaf(expires: Timestamp) {
    #[expect(
        clippy::cast_precision_loss,
        reason = "a gauge is a float; seconds are exact for longer than needed"
    )]
    gauge!(LEAF_EXPIRY).set((expires.0 / 1000) as f64);
}

pub(crate) fn records_dropped(count: u64) {
    counter!(RECORDS_DROPPED).increment(count);
}

pub(crate) fn listeners_failed(count: usize) {
    #[expect(clippy::cast_precision_loss, reason = "a gauge is a float; there are at most some thousand")]
    gauge!(LISTENERS_FAILED).set(count as f64);
}

pub(crate) fn app_healthy(healthy: bool) {
    gauge!(APP_HEALTHY).set(f64::from(u8::from(healthy)));
}

pub(crate) fn self_doubt(score: u8) {
    gauge!(SELF_DOUBT).set(f64::from(score));
}

pub(crate) fn services_in_panic(count: usize) {
    #[expect(clippy::cast_precision_loss, reason = "a gauge is a float; there are at most some thousand")]
    gauge!(PANIC).set(count as f64);
}

pub(crate) fn panic_pick() {
    counter!(PANIC_PICKS).increment(1);
}

pub(crate) fn locality_pick(near: &'static str) {
    counter!(LOCALITY_PICKS, "locality" => near).increment(1);
}

/// A failed connect was to be tried again.
pub(crate) fn retry(result: &'static str) {
    counter!(RETRIES, "result" => result).increment(1);
}

pub(crate) fn circuit_open(limit: &'static str) {
    counter!(CIRCUIT_OPEN, "limit" => limit).increment(1);
}

pub(crate) fn endpoints_ejected(count: usize) {
    #[expect(clippy::cast_precision_loss, reason = "a gauge is a float; there are at most some thousand")]
    gauge!(EJECTED).set(count as f64);
}

pub(crate) fn outlier(step: &Step) {
    match step {
        Step::Ejected { from, cause, .. } => {
            counter!(EJECTIONS, "cause" => cause.as_str(), "from" => from.as_str()).increment(1);
        }
        Step::Kept { cause, .. } => counter!(EJECTIONS_KEPT, "cause" => cause.as_str()).increment(1),
        Step::Returned { from, .. } => counter!(RETURNS, "from" => from.as_str()).increment(1),
    }
}

pub(crate) fn redirected(result: &'static str) {
    counter!(REDIRECTED, "result" => result).increment(1);
}

pub(crate) fn dns_query(transport: &'static str, result: &'static str) {
    counter!(DNS_QUERIES, "transport" => transport, "result" => result).increment(1);
}

/// Brings what is counted on demand up to date; to be called before the metrics are rendered.
pub(crate) fn refresh(registry: &Registry) {
    let mut live = [0_u32; 2];
    let mut forbidden = [("grace", 0_u32), ("keep", 0_u32)];
    registry.for_each(|connection| {
        moved(connection);
        if let Some(spared) = &connection.facts().forbidden {
            forbidden
                .iter_mut()
                .filter(|(word, _)| *word == spared.on_change)
                .for_each(|(_, count)| *count += 1);
        }
        live[usize::from(connection.direction == Direction::Outbound)] += 1;
    });
    for (direction, count) in [Direction::Inbound, Direction::Outbound].into_iter().zip(live) {
        gauge!(LIVE, "direction" => direction.as_str()).set(f64::from(count));
    }
    for (on_change, count) in forbidden {
        gauge!(FORBIDDEN, "on_change" => on_change).set(f64::from(count));
    }
}
