//! The sidecar as a whole: what is bound first, what is started in which order, and how it stops. Read [`Proxy::run`].

use crate::admin;
use crate::clock;
use crate::config::Config;
use crate::demand::{self, Asker};
use crate::discovery::canary::Canary;
use crate::discovery::join::{self, JoinError};
use crate::discovery::keep::Keeper;
use crate::discovery::own::{self, Own};
use crate::discovery::subscribe::Subscriber;
use crate::discovery::witness::Witnesses;
use crate::discovery::{Session, disk};
use crate::dns;
use crate::drain;
use crate::health;
use crate::limits::{self, Limits};
use crate::listeners::{self, Bound, Loopback, Reach};
use crate::metrics;
use crate::outbound::Target;
use crate::records::{self, Writer};
use crate::redirect::Redirect;
use crate::shared::Shared;
use crate::socket::ListenError;
use crate::status::Status;
use crate::worker::{self, Listener, Purpose, Thread};
use metrics_exporter_prometheus::PrometheusHandle;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;
use weft_client::Backoff;
use weft_client::take::{self, Refusal};
use weft_identity::credential::Credential;
use weft_identity::tls::TlsIdentity;
use weft_model::{Chain, Port, ServiceName};
use weft_routing::Snapshot;

/// How often what histograms have gathered is summed up, so that it stays small if nobody scrapes.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// The sidecar cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened on.
    #[error("{flag} cannot be used")]
    Listen {
        /// The flag that gives the address.
        flag: &'static str,
        /// Why.
        #[source]
        source: ListenError,
    },
    /// The connection log cannot be opened.
    #[error("--connection-log cannot be written")]
    ConnectionLog(#[source] io::Error),
    /// The system gives no threads or sockets.
    #[error("the system refuses a thread or a socket")]
    System(#[source] io::Error),
    /// It cannot become who it is to be.
    #[error("no identity")]
    Join(#[from] JoinError),
}

/// A sidecar with its addresses bound, not yet serving.
pub struct Proxy {
    config: Arc<Config>,
    shared: Arc<Shared>,
    limits: Limits,
    status: Arc<Status>,
    metrics: PrometheusHandle,
    inbound: Bound,
    outbound: Vec<(Bound, Target)>,
    admin: TcpListener,
    admin_address: SocketAddr,
    dns: Option<dns::Bound>,
    redirect: Arc<Redirect>,
    redirected: Vec<Bound>,
    writer: Writer,
    asker: Asker,
}

impl Proxy {
    /// Binds every fixed address and opens the connection log. `metrics` is what [`crate::metrics::install`] gave.
    ///
    /// # Errors
    /// If an address is used, or the log cannot be opened. Nothing is left behind.
    #[expect(clippy::unused_async, reason = "needs a runtime to run in, and says so by being async")]
    pub async fn bind(config: Config, metrics: PrometheusHandle) -> Result<Self, StartError> {
        let failed = |flag| move |source| StartError::Listen { flag, source };
        let inbound = listeners::bind(config.inbound_listen, Purpose::Inbound, config.threads)
            .map_err(failed("--inbound-listen"))?;
        let mut outbound = Vec::new();
        let named = config.upstreams.iter().map(|upstream| ("--upstream", upstream));
        for (flag, upstream) in named.chain(config.on_demand.iter().map(|it| ("--upstream-on-demand", it))) {
            let Some(address) = upstream.listen else { continue };
            let target = Target { service: upstream.service.clone(), port: upstream.port };
            let purpose = Purpose::Outbound(Arc::new(target.clone()));
            let bound = listeners::bind(address, purpose, config.threads).map_err(failed(flag))?;
            outbound.push((bound, target));
        }
        let admin = crate::socket::listen(config.admin_listen, NonZeroUsize::MIN)
            .map_err(failed("--admin-listen"))?
            .pop()
            .ok_or_else(|| StartError::System(io::ErrorKind::AddrNotAvailable.into()))?;
        let admin = TcpListener::from_std(admin).map_err(StartError::System)?;
        let admin_address = admin.local_addr().map_err(StartError::System)?;
        let dns = config.dns_listen.map(|address| dns::bind(address).map_err(failed("--dns-listen")));
        let dns = dns.transpose()?;
        let redirect = Redirect::new(config.outside, Reach::of(&config));
        let redirected = config.redirect_listen.iter().map(|address| {
            let purpose = Purpose::Redirected(Arc::clone(&redirect));
            listeners::bind(*address, purpose, config.threads).map_err(failed("--redirect-listen"))
        });
        let redirected = redirected.collect::<Result<Vec<_>, _>>()?;
        let (records, writer) = records::start(&config.connection_log).map_err(StartError::ConnectionLog)?;
        let (demand, asker) = demand::channel(&config.on_demand);
        // A socket for each thread; the admin pages have one, and names two.
        let per_thread = 1 + outbound.len() + redirected.len();
        let listeners = per_thread * config.threads.get() + 1 + dns.as_ref().map_or(0, |_| 2);
        let limits = Limits::new(limits::open_files(), listeners, config.tunnels_idle_max);
        let shared = Shared::new(&config, limits, records, demand);
        let status = Arc::new(Status::default());
        if config.loopback_addresses {
            status.expect_loopback();
        }
        status
            .set_listeners(outbound.iter().map(|(bound, target)| (bound.address, target.clone())).collect());
        let config = Arc::new(config);
        Ok(Self {
            config,
            shared,
            limits,
            status,
            metrics,
            inbound,
            outbound,
            admin,
            admin_address,
            dns,
            redirect,
            redirected,
            writer,
            asker,
        })
    }

    /// Where other sidecars connect to.
    #[must_use]
    pub const fn inbound_addr(&self) -> SocketAddr {
        self.inbound.address
    }

    /// Where the admin pages are.
    #[must_use]
    pub const fn admin_addr(&self) -> SocketAddr {
        self.admin_address
    }

    /// Where redirected connections are taken.
    #[must_use]
    pub fn redirect_addrs(&self) -> Vec<SocketAddr> {
        self.redirected.iter().map(|bound| bound.address).collect()
    }

    /// Where names are answered, if they are.
    #[must_use]
    pub fn dns_addr(&self) -> Option<SocketAddr> {
        self.dns.as_ref().map(|bound| bound.address)
    }

    /// The explicit local addresses, by what they lead to.
    #[must_use]
    pub fn outbound_addrs(&self) -> BTreeMap<(ServiceName, Port), SocketAddr> {
        let entry =
            |(bound, target): &(Bound, Target)| ((target.service.clone(), target.port), bound.address);
        self.outbound.iter().map(entry).collect()
    }

    /// Serves until `stop`, then drains. Returns when nothing is left.
    ///
    /// # Errors
    /// If the sidecar gets no identity and waiting does not help, or the system gives it no threads.
    pub async fn run(self, stop: CancellationToken) -> Result<(), StartError> {
        let Self {
            config,
            shared,
            limits,
            status,
            metrics,
            inbound,
            outbound,
            admin,
            admin_address,
            dns,
            redirect,
            redirected,
            writer,
            asker,
        } = self;
        let advertised = config.advertise.unwrap_or(inbound.address);
        tracing::info!(instance = %config.instance, inbound = %inbound.address, admin = %admin_address, connections_max = limits.connections, "starting");

        // The data path: it accepts from here on, and refuses until there is an identity and a snapshot.
        let halt = CancellationToken::new();
        let threads = start_threads(&config, limits, &shared, &halt).map_err(StartError::System)?;
        let senders: Vec<_> = threads.iter().map(|thread| thread.listeners.clone()).collect();
        let (stop_inbound, stop_outbound) = (CancellationToken::new(), CancellationToken::new());
        listeners::hand_over(inbound, &senders, &stop_inbound).await;
        let redirects = !redirected.is_empty();
        for bound in outbound.into_iter().map(|(bound, _)| bound).chain(redirected) {
            listeners::hand_over(bound, &senders, &stop_outbound).await;
        }

        // What is asked about it.
        let mut tasks = JoinSet::new();
        let pages = admin::Pages {
            shared: Arc::clone(&shared),
            status: Arc::clone(&status),
            metrics: metrics.clone(),
        };
        tasks.spawn(serve_admin(admin, pages));
        tasks.spawn(keep_metrics_small(metrics));
        tasks.spawn(Arc::clone(&shared).end_graces());
        if redirects {
            tasks.spawn(redirect.follow(shared.subscribe()));
        }
        if let Some(bound) = dns {
            let upstreams = dns::upstreams(&config.dns_upstreams, bound.address);
            let (shared, reach) = (Arc::clone(&shared), Reach::of(&config));
            let listening = (!redirects).then(|| Arc::clone(&status));
            tasks.spawn(dns::Responder::run(shared, listening, reach, upstreams, bound));
        }

        // What it runs by: who it is, what it ran last, what it is to run.
        let (sessions, session) = watch::channel(None);
        tasks.spawn(asker.run(config.instance.clone(), sessions.subscribe()));
        let control = Control { config, shared, status, advertised, sessions, senders };
        let joined = tokio::select! {
            joined = control.start(&mut tasks, &stop_outbound) => joined,
            () = stop.cancelled() => Ok(()),
        };
        if joined.is_ok() {
            control.watch(&mut tasks, &stop).await;
        }

        // And out again.
        drain::drain(&control.shared, &session, &stop_inbound, &stop_outbound, control.config.drain_deadline)
            .await;
        tasks.shutdown().await;
        drop(control);
        halt.cancel();
        for thread in threads {
            thread.join().await;
        }
        writer.finish().await;
        joined
    }
}

/// What the control tasks need.
struct Control {
    config: Arc<Config>,
    shared: Arc<Shared>,
    status: Arc<Status>,
    advertised: SocketAddr,
    sessions: watch::Sender<Option<Session>>,
    senders: Vec<mpsc::Sender<Listener>>,
}

impl Control {
    /// Gets an identity, takes the last snapshot from the disk, and starts everything that follows the controller.
    async fn start(
        &self,
        tasks: &mut JoinSet<()>,
        stop_outbound: &CancellationToken,
    ) -> Result<(), StartError> {
        let credential = join::obtain(&self.config, &mut rand::make_rng::<rand::rngs::SmallRng>()).await?;
        let identity = TlsIdentity::new(credential);
        self.shared.tls.set(identity.clone());
        let own = Arc::new(Own::new(identity, join::identity_dir(&self.config)));
        self.load_snapshot(&own).await;
        let witnesses = Witnesses::load(self.config.state_dir.clone(), &own.tls.current());
        let current = Arc::clone(&own);
        tasks.spawn(witnesses.clone().keep(move || current.tls.current()));

        let (config, shared) = (Arc::clone(&self.config), Arc::clone(&self.shared));
        let (renewed, sessions) = (Arc::clone(&own), self.sessions.subscribe());
        tasks.spawn(async move {
            let mut rng = rand::make_rng::<rand::rngs::SmallRng>();
            join::keep_fresh(&config, &renewed, &shared, &sessions, &mut rng).await;
        });
        if self.config.loopback_addresses {
            let loopback = Loopback {
                reach: Reach::of(&self.config),
                threads: self.senders.clone(),
                count: self.config.threads,
                status: Arc::clone(&self.status),
            };
            tasks.spawn(loopback.run(self.shared.subscribe(), stop_outbound.clone()));
        }
        tasks.spawn(health::run(
            Arc::clone(&self.shared),
            Arc::clone(&self.status),
            self.config.probe,
            self.sessions.subscribe(),
        ));
        let (keeper, writing) = Keeper::new(self.config.state_dir.clone(), self.config.instance.clone());
        tasks.spawn(writing);
        let subscriber = Subscriber {
            config: Arc::clone(&self.config),
            advertised: self.advertised,
            shared: Arc::clone(&self.shared),
            status: Arc::clone(&self.status),
            own,
            sessions: self.sessions.clone(),
            rng: rand::make_rng(),
            registered: false,
            keeper,
            witnesses,
            canary: Canary::default(),
            backoff: Backoff::new(),
        };
        tasks.spawn(subscriber.run());
        Ok(())
    }

    /// Waits for the stop. A control task that breaks is said aloud, and connections go on (I5).
    async fn watch(&self, tasks: &mut JoinSet<()>, stop: &CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(ended) = tasks.join_next() => if let Err(error) = ended {
                    tracing::error!(%error, "a control task broke; restart the sidecar");
                    self.status.disconnected("a control task broke; restart the sidecar");
                    self.status.set_stale(clock::now());
                },
            }
        }
    }

    /// The last good snapshot. One that cannot be read is not used, and nothing passes until a controller sends one.
    async fn load_snapshot(&self, own: &Own) {
        match self.stored_snapshot(&own.tls.current()) {
            Ok(Some(snapshot)) => {
                tracing::info!(version = %snapshot.version, "serving the snapshot from the disk");
                metrics::config("applied", snapshot.version);
                own.trust(&snapshot.trust).await;
                self.shared.install(Arc::new(snapshot));
            }
            Ok(None) => {}
            Err(error) => {
                tracing::error!(error, "nothing passes until a controller sends a snapshot");
            }
        }
    }

    fn stored_snapshot(&self, credential: &Credential) -> Result<Option<Snapshot>, String> {
        let Config { state_dir, instance, .. } = &*self.config;
        let stored = disk::load(state_dir, instance).map_err(|error| Chain(&error).to_string())?;
        if let Some(snapshot) = &stored {
            take::belongs(snapshot, instance, &credential.spiffe_id().trust_domain)
                .and_then(|()| {
                    let same = own::same_authority(credential, &snapshot.trust);
                    if same { Ok(()) } else { Err(Refusal::Authority) }
                })
                .map_err(|refusal| refusal.to_string())?;
        }
        Ok(stored)
    }
}

fn start_threads(
    config: &Config,
    limits: Limits,
    shared: &Arc<Shared>,
    halt: &CancellationToken,
) -> io::Result<Vec<Thread>> {
    let threads = config.threads.get();
    let tunnels = limits.idle_tunnels.div_ceil(threads);
    (0..threads).map(|index| worker::start(index, Arc::clone(shared), tunnels, halt.clone())).collect()
}

async fn serve_admin(listener: TcpListener, pages: admin::Pages) {
    if let Err(error) = axum::serve(listener, admin::router(pages)).await {
        tracing::error!(%error, "the admin pages are gone");
    }
}

async fn keep_metrics_small(metrics: PrometheusHandle) {
    let mut ticks = interval(METRICS_UPKEEP);
    loop {
        ticks.tick().await;
        metrics.run_upkeep();
    }
}
