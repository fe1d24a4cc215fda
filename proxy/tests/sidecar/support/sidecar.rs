//! A running sidecar.

use super::{Controller, LIMIT};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weft_model::{ConfigVersion, Port, ServiceName};
use weft_proxy::config::{ConnectionLog, Outside, Probe, Upstream};
use weft_proxy::{Config, Proxy, StartError};
use weft_testkit::wait_until;

/// The metrics of this process, which all its sidecars share.
pub(crate) fn metrics() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| weft_proxy::metrics::install().unwrap()).clone()
}

/// A configuration for `instance` on free ports, with a token.
pub(crate) fn config(controller: &Controller, instance: &str, dir: &Path) -> Config {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    Config {
        controllers: vec![controller.address.to_string().parse().unwrap()],
        instance: instance.parse().unwrap(),
        join_token: Some(controller.token(instance)),
        state_dir: dir.join("state"),
        inbound_listen: any,
        advertise: None,
        metadata: BTreeMap::new(),
        apps: BTreeMap::new(),
        proxy_protocol: false,
        upstreams: Vec::new(),
        on_demand: Vec::new(),
        all_upstreams: false,
        loopback_addresses: false,
        dns_listen: None,
        dns_upstreams: Vec::new(),
        redirect_listen: Vec::new(),
        outside: Outside::Refuse,
        admin_listen: any,
        connection_log: ConnectionLog::File(dir.join("connections.jsonl")),
        probe: Probe {
            interval: Duration::from_millis(50),
            timeout: Duration::from_secs(1),
            rise: 1,
            fall: 2,
        },
        drain_deadline: Duration::from_secs(5),
        tunnels_idle_max: 64,
        upgrade: false,
        notify_socket: None,
        threads: NonZeroUsize::new(2).unwrap(),
    }
}

/// An upstream with a local address of its own.
pub(crate) fn upstream(service: &str, port: u16) -> Upstream {
    Upstream {
        service: service.parse().unwrap(),
        port: Port::new(port).unwrap(),
        listen: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
    }
}

/// See the module's documentation. Stopped, if it was not, when its test's runtime ends.
pub(crate) struct Sidecar {
    pub(crate) inbound: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) dns: Option<SocketAddr>,
    pub(crate) redirected: Vec<SocketAddr>,
    pub(crate) config: Config,
    outbound: BTreeMap<(ServiceName, Port), SocketAddr>,
    log: PathBuf,
    stop: CancellationToken,
    running: JoinHandle<Result<(), StartError>>,
    dir: Arc<TempDir>,
}

impl Sidecar {
    /// Starts a sidecar; `change` says what is special about it.
    pub(crate) async fn start(
        controller: &Controller,
        instance: &str,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let mut config = config(controller, instance, dir.path());
        change(&mut config);
        Self::start_in(dir, config).await
    }

    async fn start_in(dir: Arc<TempDir>, config: Config) -> Self {
        let proxy = Proxy::bind(config.clone(), metrics()).await.unwrap();
        let stop = CancellationToken::new();
        Self {
            inbound: proxy.inbound_addr(),
            admin: proxy.admin_addr(),
            dns: proxy.dns_addr(),
            redirected: proxy.redirect_addrs(),
            config,
            outbound: proxy.outbound_addrs(),
            log: dir.path().join("connections.jsonl"),
            running: TaskTracker::new().spawn(proxy.run(stop.clone())),
            stop,
            dir,
        }
    }

    /// A sidecar of `service` with `app` behind it, once it serves.
    pub(crate) async fn serving(controller: &Controller, instance: &str, port: u16, app: SocketAddr) -> Self {
        let sidecar = Self::start(controller, instance, |config| {
            config.apps.insert(Port::new(port).unwrap(), app);
        })
        .await;
        sidecar.ready().await;
        sidecar
    }

    /// A sidecar that connects to a port of a service, once it sees `endpoints` that can be used.
    pub(crate) async fn calling(
        controller: &Controller,
        instance: &str,
        service: &str,
        port: u16,
        endpoints: usize,
    ) -> Self {
        let sidecar =
            Self::start(controller, instance, |config| config.upstreams.push(upstream(service, port))).await;
        sidecar.sees(service, endpoints).await;
        sidecar
    }

    /// The same sidecar again, after it stopped.
    pub(crate) async fn again(&self) -> Self {
        self.again_with(|config| config.join_token = None).await
    }

    /// The same sidecar again, after it stopped, told something else.
    pub(crate) async fn again_with(&self, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = self.config.clone();
        change(&mut config);
        Self::start_in(Arc::clone(&self.dir), config).await
    }

    /// Another process' sidecar for the same instance, which is to take this one's place.
    pub(crate) async fn upgraded(&self) -> Self {
        self.again_with(|config| {
            config.join_token = None;
            config.upgrade = true;
        })
        .await
    }

    pub(crate) fn state_dir(&self) -> &Path {
        &self.config.state_dir
    }

    pub(crate) async fn connect(&self, service: &str, port: u16) -> TcpStream {
        self.try_connect(service, port).await.unwrap()
    }

    /// A connection that is refused may be reset before it was told that there is one.
    pub(crate) async fn try_connect(&self, service: &str, port: u16) -> std::io::Result<TcpStream> {
        let address = self.outbound[&(service.parse().unwrap(), Port::new(port).unwrap())];
        TcpStream::connect(address).await
    }

    /// Connects, and expects a reset: while connecting, or soon after.
    pub(crate) async fn refuses(&self, service: &str, port: u16) {
        let address = self.outbound[&(service.parse().unwrap(), Port::new(port).unwrap())];
        match TcpStream::connect(address).await {
            Ok(mut stream) => super::app::expect_reset(&mut stream).await,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
        }
    }

    /// Asks it to stop, and does not wait.
    pub(crate) fn begin_stop(&self) {
        self.stop.cancel();
    }

    /// Waits until it has stopped.
    pub(crate) async fn stopped(&mut self) -> Result<(), StartError> {
        tokio::time::timeout(LIMIT, &mut self.running).await.expect("the sidecar stops").unwrap()
    }

    pub(crate) async fn stop(&mut self) {
        self.begin_stop();
        self.stopped().await.unwrap();
    }

    /// Every record so far.
    pub(crate) fn records(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.log).unwrap();
        // The last one may be under way.
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        whole.map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The first record with this close reason, as soon as there is one.
    pub(crate) async fn record(&self, reason: &str) -> Value {
        let mut found = None;
        wait_until(&format!("a record with {reason}"), LIMIT, async || {
            found = self.records().into_iter().find(|record| record["close_reason"] == reason);
            found.is_some()
        })
        .await;
        found.unwrap()
    }

    /// A page of the admin address: status and body.
    pub(crate) async fn page(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: sidecar\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    pub(crate) async fn json(&self, path: &str) -> Value {
        serde_json::from_str(&self.page(path).await.1).unwrap()
    }

    /// Waits until `/config` is as `condition` wants it.
    pub(crate) async fn config_is(&self, what: &str, condition: impl Fn(&Value) -> bool) {
        wait_until(what, LIMIT, async || condition(&self.json("/config").await)).await;
    }

    pub(crate) async fn ready(&self) {
        wait_until("a ready sidecar", LIMIT, async || self.page("/ready").await.0 == 200).await;
    }

    pub(crate) async fn runs(&self, version: ConfigVersion) {
        let version = version.to_string();
        self.config_is(&format!("version {version}"), |config| config["version"] == version).await;
    }

    /// Waits until so many endpoints of a service can be used.
    pub(crate) async fn sees(&self, service: &str, endpoints: usize) {
        self.config_is(&format!("{endpoints} endpoints of {service}"), |config| {
            eligible(config, service) == endpoints
        })
        .await;
    }
}

fn eligible(config: &Value, service: &str) -> usize {
    let shards = config["endpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
    let shard = shards.iter().find(|shard| shard["service"] == service);
    let endpoints =
        shard.and_then(|shard| shard["endpoints"].as_array()).map(Vec::as_slice).unwrap_or_default();
    endpoints
        .iter()
        .filter(|endpoint| endpoint["health"] == "healthy" && endpoint["draining"] == false)
        .count()
}
