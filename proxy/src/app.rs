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
use crate::drain::{self, Leaving};
use crate::health;
use crate::limits::{self, Limits};
use crate::listeners::{self, Bound, Loopback, Reach};
use crate::metrics;
use crate::outbound::Target;
use crate::records::{self, Writer};
use crate::redirect::Redirect;
use crate::shared::{Rechecked, Shared};
use crate::socket::{self, ListenError};
use crate::status::Status;
use crate::upgrade::inherited::Inherited;
use crate::upgrade::lock::Lock;
use crate::upgrade::offers::Way;
use crate::upgrade::{self, Asked, Host, Succession, UpgradeError};
use crate::worker::{self, Listener, Purpose, Thread};
use metrics_exporter_prometheus::PrometheusHandle;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{self, JoinSet};
use tokio::time::{interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use weft_client::Backoff;
use weft_client::take::{self, Refusal};
use weft_identity::credential::Credential;
use weft_identity::tls::TlsIdentity;
use weft_model::{Chain, Port, ServiceName};
use weft_routing::Snapshot;

/// How often what histograms have gathered is summed up, so that it stays small if nobody scrapes.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// How long what is being written may take before another process writes. A healthy disk takes milliseconds.
const WRITTEN_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a stop waits for a controller to tell it to, if it comes before there is one.
const SESSION_WAIT: Duration = Duration::from_secs(1);

/// How often it is looked whether local addresses are there.
const ADDRESSES_POLL: Duration = Duration::from_millis(5);

/// How often a process that drains looks for a snapshot of the one that has its place: a denial shall be a matter of a second.
const SUCCESSOR_POLL: Duration = Duration::from_millis(100);

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
    /// It cannot have the place that it is to take.
    #[error("no place to take")]
    Upgrade(#[from] UpgradeError),
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
    admin: Admin,
    dns: Option<dns::Bound>,
    redirect: Arc<Redirect>,
    redirected: Vec<Bound>,
    writer: Writer,
    asker: Asker,
    succession: Option<Succession>,
    inherited: Inherited,
}

/// The socket of the admin pages.
struct Admin {
    address: SocketAddr,
    listener: TcpListener,
    /// The same socket, to be handed over.
    offered: Arc<std::net::TcpListener>,
}

/// What closes the listeners.
#[derive(Debug, Default)]
pub(crate) struct Stops {
    pub(crate) inbound: CancellationToken,
    pub(crate) outbound: CancellationToken,
    /// The admin pages and the names.
    pub(crate) pages: CancellationToken,
}

impl Proxy {
    /// Binds every fixed address, with the sockets of the process whose place it is to take, and opens the connection log. `metrics` is what [`crate::metrics::install`] gave.
    ///
    /// # Errors
    /// If an address is used, the log cannot be opened, or the other process does not hand over. Nothing is left behind.
    pub async fn bind(config: Config, metrics: PrometheusHandle) -> Result<Self, StartError> {
        let failed = |flag| move |source| StartError::Listen { flag, source };
        let found = if config.upgrade { Succession::begin(&config).await? } else { None };
        let (succession, mut inherited) =
            found.map_or_else(Default::default, |(succession, inherited)| (Some(succession), inherited));
        let inbound =
            listeners::bind(config.inbound_listen, Purpose::Inbound, config.threads, &mut inherited)
                .map_err(failed("--inbound-listen"))?;
        let mut outbound = Vec::new();
        let named = config.upstreams.iter().map(|upstream| ("--upstream", upstream));
        for (flag, upstream) in named.chain(config.on_demand.iter().map(|it| ("--upstream-on-demand", it))) {
            let Some(address) = upstream.listen else { continue };
            let target = Target { service: upstream.service.clone(), port: upstream.port };
            let purpose = Purpose::Outbound(Arc::new(target.clone()));
            let bound =
                listeners::bind(address, purpose, config.threads, &mut inherited).map_err(failed(flag))?;
            outbound.push((bound, target));
        }
        let admin = Admin::bind(config.admin_listen, &mut inherited)?;
        let dns = config
            .dns_listen
            .map(|address| dns::bind(address, &mut inherited).map_err(failed("--dns-listen")));
        let dns = dns.transpose()?;
        let redirect = Redirect::new(config.outside, Reach::of(&config));
        let redirected = config.redirect_listen.iter().map(|address| {
            let purpose = Purpose::Redirected(Arc::clone(&redirect));
            listeners::bind(*address, purpose, config.threads, &mut inherited)
                .map_err(failed("--redirect-listen"))
        });
        let redirected = redirected.collect::<Result<Vec<_>, _>>()?;
        let (records, writer) = records::start(&config.connection_log).map_err(StartError::ConnectionLog)?;
        let (demand, asker) = demand::channel(&config.on_demand);
        // A socket for each thread; the admin pages have two, and so have names.
        let per_thread = 1 + outbound.len() + redirected.len();
        let listeners = per_thread * config.threads.get() + 2 + dns.as_ref().map_or(0, |_| 2);
        let limits = Limits::new(limits::open_files(), listeners, config.tunnels_idle_max);
        let shared = Shared::new(&config, limits, records, demand);
        shared.offers.add(admin_way(config.admin_listen), &admin.offered);
        if let (Some(bound), Some(asked)) = (&dns, config.dns_listen) {
            bound.offer(asked, &shared.offers);
        }
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
            dns,
            redirect,
            redirected,
            writer,
            asker,
            succession,
            inherited,
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
        self.admin.address
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

    /// Serves until `stop` or until another process has its place, then drains. Returns when nothing is left.
    ///
    /// # Errors
    /// If the sidecar gets no identity and waiting does not help, it is not given another one's place, or the system gives it no threads.
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
            dns,
            redirect,
            redirected,
            writer,
            asker,
            succession,
            inherited,
        } = self;
        let advertised = config.advertise.unwrap_or(inbound.address);
        tracing::info!(instance = %config.instance, inbound = %inbound.address, admin = %admin.address, connections_max = limits.connections, "starting");

        let halt = CancellationToken::new();
        let threads = start_threads(&config, limits, &shared, &halt).map_err(StartError::System)?;
        let senders: Vec<_> = threads.iter().map(|thread| thread.listeners.clone()).collect();
        let (sessions, session) = watch::channel(None);
        let control = Control { config, shared, status, advertised, sessions, senders };
        // Who takes another one's place serves from its first connection on.
        let own = match &succession {
            Some(_) => Some(control.become_ready().await?),
            None => None,
        };

        // The data path: it accepts from here on, and refuses until there is an identity and a snapshot.
        let stops = Stops::default();
        listeners::hand_over(inbound, &control.senders, &stops.inbound).await;
        let redirects = !redirected.is_empty();
        for bound in outbound.into_iter().map(|(bound, _)| bound).chain(redirected) {
            listeners::hand_over(bound, &control.senders, &stops.outbound).await;
        }

        // What is asked about it.
        let mut tasks = JoinSet::new();
        let pages = admin::Pages {
            shared: Arc::clone(&control.shared),
            status: Arc::clone(&control.status),
            metrics: metrics.clone(),
        };
        tasks.spawn(serve_admin(admin, pages, stops.pages.clone()));
        tasks.spawn(keep_metrics_small(metrics));
        tasks.spawn(Arc::clone(&control.shared).end_graces());
        if redirects {
            tasks.spawn(redirect.follow(control.shared.subscribe()));
        }
        if let Some(bound) = dns {
            let upstreams = dns::upstreams(&control.config.dns_upstreams, bound.address);
            let (shared, reach) = (Arc::clone(&control.shared), Reach::of(&control.config));
            let listening = (!redirects).then(|| Arc::clone(&control.status));
            let close = stops.pages.clone();
            tasks.spawn(dns::Responder::run(shared, listening, reach, upstreams, bound, close));
        }

        // What it runs by: who it is, what it ran last, what it is to run.
        tasks.spawn(asker.run(control.config.instance.clone(), session.clone()));
        let succeeds = succession.is_some();
        let placed = tokio::select! {
            placed = control.take_place(succession, own, inherited, &mut tasks, &stops.outbound) => placed.map(Some),
            () = stop.cancelled() => Ok(None),
        };
        let (own, leaving, result) = match placed {
            Ok(Some(mut place)) => {
                let leaving = control.watch(&mut place, &mut tasks, &stop).await;
                if leaving == Leaving::Mesh && place.known {
                    // Asked to stop just after it took over: nobody but this process can take the instance out of the mesh.
                    let mut sessions = session.clone();
                    let _ = timeout(SESSION_WAIT, sessions.wait_for(Option::is_some)).await;
                }
                (Some(place), leaving, Ok(()))
            }
            // Another one has the place that it was to take.
            Ok(None) if succeeds => (None, Leaving::Place, Ok(())),
            Err(error) if succeeds => (None, Leaving::Place, Err(error)),
            Ok(None) => (None, Leaving::Mesh, Ok(())),
            Err(error) => (None, Leaving::Mesh, Err(error)),
        };

        // And out again.
        let draining =
            drain::drain(&control.shared, &session, &stops, control.config.drain_deadline, leaving);
        if leaving == Leaving::Place {
            tokio::select! {
                () = draining => {}
                () = control.follow_successor() => {}
            }
        } else {
            draining.await;
        }
        tasks.shutdown().await;
        drop((control, own));
        halt.cancel();
        for thread in threads {
            thread.join().await;
        }
        writer.finish().await;
        result
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

/// The place of the instance's sidecar: what only one process may do at a time.
struct Place {
    own: Arc<Own>,
    lock: Option<Lock>,
    host: Option<Host>,
    led: Led,
    /// An earlier process made the instance known to the mesh.
    known: bool,
}

/// The tasks that follow the controller and write the state directory.
struct Led {
    tasks: JoinSet<()>,
    /// Ends by itself when the others are gone, after what it writes.
    writing: JoinSet<()>,
}

impl Led {
    /// Ends them, and waits until what they write is on disk.
    async fn end(&mut self, own: &Own) -> Result<(), String> {
        self.tasks.shutdown().await;
        let written = async {
            while self.writing.join_next().await.is_some() {}
            own.written().await;
        };
        let late = |_| format!("the disk does not take what is being written within {WRITTEN_TIMEOUT:?}");
        timeout(WRITTEN_TIMEOUT, written).await.map_err(late)
    }
}

impl Control {
    /// Gets an identity, and takes the last snapshot from the disk.
    async fn become_somebody(&self) -> Result<Arc<Own>, StartError> {
        let credential = join::obtain(&self.config, &mut rand::make_rng::<rand::rngs::SmallRng>()).await?;
        let identity = TlsIdentity::new(credential);
        self.shared.tls.set(identity.clone());
        let own = Arc::new(Own::new(identity, join::identity_dir(&self.config)));
        self.load_snapshot(&own).await;
        Ok(own)
    }

    /// The same for who takes another one's place: with a snapshot, or not at all. Nothing is written: the directory is still the other's.
    async fn become_ready(&self) -> Result<Arc<Own>, StartError> {
        let identity_dir = join::identity_dir(&self.config);
        let credential = join::stored(&self.config)?;
        let identity = TlsIdentity::new(credential);
        self.shared.tls.set(identity.clone());
        let own = Arc::new(Own::new(identity, identity_dir));
        match self.stored_snapshot(&own.tls.current()) {
            Ok(Some(snapshot)) => {
                self.shared.install(Arc::new(snapshot));
                Ok(own)
            }
            Ok(None) => Err(UpgradeError::NoSnapshot.into()),
            Err(error) => {
                tracing::error!(error, "the snapshot in the state directory cannot be used");
                Err(UpgradeError::NoSnapshot.into())
            }
        }
    }

    /// Becomes the instance's sidecar: from nothing, or in the place of another process. Starts everything that follows the controller.
    async fn take_place(
        &self,
        succession: Option<Succession>,
        own: Option<Arc<Own>>,
        inherited: Inherited,
        tasks: &mut JoinSet<()>,
        stop_outbound: &CancellationToken,
    ) -> Result<Place, StartError> {
        let own = match own {
            Some(own) => own,
            None => self.become_somebody().await?,
        };
        if self.config.loopback_addresses {
            let loopback = Loopback {
                reach: Reach::of(&self.config),
                threads: self.senders.clone(),
                count: self.config.threads,
                status: Arc::clone(&self.status),
                inherited,
            };
            tasks.spawn(loopback.run(self.shared.subscribe(), stop_outbound.clone()));
        }
        let Some(succession) = succession else {
            let lock = self.lock()?;
            let led = self.lead(&own, false);
            let host = self.host(lock.as_ref());
            return Ok(Place { own, lock, host, led, known: false });
        };
        // It has accepted on every address before the other one stops.
        while self.status.read().addresses_due {
            sleep(ADDRESSES_POLL).await;
        }
        let mut yours = succession.finish(&self.config.state_dir).await?;
        self.catch_up(&own).await;
        let lock = yours.lock.take();
        let known = yours.registered.is_some();
        let led = self.lead(&own, yours.registered.as_ref() == Some(&self.registration()));
        let host = self.host(lock.as_ref());
        yours.took().await;
        tracing::info!("this process is the sidecar now");
        if let Some(socket) = &self.config.notify_socket {
            upgrade::notify(socket);
        }
        Ok(Place { own, lock, host, led, known })
    }

    /// The lock of the state directory. Goes on without one where the file system has none.
    fn lock(&self) -> Result<Option<Lock>, StartError> {
        let dir = &self.config.state_dir;
        match Lock::take(dir) {
            Ok(Some(lock)) => Ok(Some(lock)),
            Ok(None) => Err(UpgradeError::InUse(dir.clone()).into()),
            Err(error) => {
                tracing::warn!(%error, "the state directory cannot be locked; this sidecar cannot be upgraded in place");
                Ok(None)
            }
        }
    }

    fn host(&self, lock: Option<&Lock>) -> Option<Host> {
        lock?;
        let host = Host::listen(&self.config.state_dir);
        host.inspect_err(|error| tracing::warn!(%error, "this sidecar cannot be upgraded in place")).ok()
    }

    /// As what the instance is made known, for a process that takes this one's place.
    fn registration(&self) -> String {
        let upstreams: BTreeSet<_> =
            self.config.upstreams.iter().map(|upstream| upstream.service.to_string()).collect();
        format!("{} {} {upstreams:?}", self.advertised, self.config.all_upstreams)
    }

    /// Follows the controller. `registered` says whether the instance is known as what it is.
    fn lead(&self, own: &Arc<Own>, registered: bool) -> Led {
        let mut tasks = JoinSet::new();
        let witnesses = Witnesses::load(self.config.state_dir.clone(), &own.tls.current());
        let current = Arc::clone(own);
        tasks.spawn(witnesses.clone().keep(move || current.tls.current()));

        let (config, shared) = (Arc::clone(&self.config), Arc::clone(&self.shared));
        let (renewed, sessions) = (Arc::clone(own), self.sessions.subscribe());
        tasks.spawn(async move {
            let mut rng = rand::make_rng::<rand::rngs::SmallRng>();
            join::keep_fresh(&config, &renewed, &shared, &sessions, &mut rng).await;
        });
        tasks.spawn(health::run(
            Arc::clone(&self.shared),
            Arc::clone(&self.status),
            self.config.probe,
            self.sessions.subscribe(),
        ));
        let (keeper, write) = Keeper::new(self.config.state_dir.clone(), self.config.instance.clone());
        let mut writing = JoinSet::new();
        writing.spawn(write);
        let subscriber = Subscriber {
            config: Arc::clone(&self.config),
            advertised: self.advertised,
            shared: Arc::clone(&self.shared),
            status: Arc::clone(&self.status),
            own: Arc::clone(own),
            sessions: self.sessions.clone(),
            rng: rand::make_rng(),
            registered,
            keeper,
            witnesses,
            canary: Canary::default(),
            backoff: Backoff::new(),
        };
        tasks.spawn(subscriber.run());
        Led { tasks, writing }
    }

    /// Waits for the stop, or until another process has the place. A control task that breaks is said aloud, and connections go on (I5).
    async fn watch(&self, place: &mut Place, tasks: &mut JoinSet<()>, stop: &CancellationToken) -> Leaving {
        loop {
            let asked = tokio::select! {
                () = stop.cancelled() => return Leaving::Mesh,
                Some(ended) = tasks.join_next() => {
                    self.tell_broken(ended);
                    continue;
                }
                Some(ended) = place.led.tasks.join_next() => {
                    self.tell_broken(ended);
                    continue;
                }
                asked = upgrade::asked(place.host.as_ref()) => asked,
            };
            match self.hand_over(asked, place, stop).await {
                Ok(()) => {
                    tracing::info!("another process has taken this one's place");
                    // Who asked here and not there is told so by the end of it.
                    place.host = None;
                    return Leaving::Place;
                }
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "no upgrade; going on as before");
                    if !place.host.as_ref().is_some_and(Host::is_found) {
                        place.host = self.host(place.lock.as_ref());
                    }
                }
            }
        }
    }

    /// Lets another process take this one's place.
    async fn hand_over(
        &self,
        asked: Asked,
        place: &mut Place,
        stop: &CancellationToken,
    ) -> Result<(), UpgradeError> {
        let breaker = asked.breaker()?;
        let ready = tokio::select! {
            given = asked.give(&self.config.instance, &self.shared.offers) => given?,
            () = stop.cancelled() => {
                // One that is gone is as good.
                let _ = breaker.shutdown(Shutdown::Both);
                return Err(UpgradeError::Refused("this sidecar stops".to_owned()));
            }
        };
        let known = self.sessions.borrow().is_some();
        if let Err(why) = place.led.end(&place.own).await {
            place.led = self.lead(&place.own, known);
            ready.refuse(why.clone()).await;
            return Err(UpgradeError::Refused(why));
        }
        let yielded = tokio::select! {
            yielded = ready.yield_to(place.lock.as_ref(), known.then(|| self.registration())) => yielded,
            // It was told that the place is its own; it lives, or else the answer would be there.
            () = stop.cancelled() => Ok(()),
        };
        match yielded {
            Ok(()) => place.lock = None,
            Err(_) => place.led = self.lead(&place.own, known),
        }
        yielded
    }

    fn tell_broken(&self, ended: Result<(), task::JoinError>) {
        if let Err(error) = ended {
            tracing::error!(%error, "a control task broke; restart the sidecar");
            self.status.disconnected("a control task broke; restart the sidecar");
            self.status.set_stale(clock::now());
        }
    }

    /// What the old process wrote after this one had read it.
    async fn catch_up(&self, own: &Own) {
        match join::stored(&self.config) {
            Ok(credential) => {
                if let Err(error) = own.tls.replace(credential) {
                    tracing::error!(%error, "the identity in the state directory is somebody else's");
                }
            }
            Err(error) => {
                tracing::error!(error = %Chain(&error), "the identity in the state directory cannot be read again");
            }
        }
        self.install_newer(own.tls.current().as_ref());
        if let Some(snapshot) = self.shared.snapshot() {
            metrics::config("applied", snapshot.version);
            own.trust(&snapshot.trust).await;
        }
    }

    /// While this process drains, the snapshots of the one that has its place hold here too: what is denied is cut (I8). It reads them from
    /// the disk and writes nothing.
    async fn follow_successor(&self) {
        let mut ticks = interval(SUCCESSOR_POLL);
        let mut seen = None;
        loop {
            ticks.tick().await;
            let stamp = disk::stamp(&self.config.state_dir);
            if stamp == seen {
                continue;
            }
            seen = stamp;
            if let Some(identity) = self.shared.tls.identity() {
                self.install_newer(&identity.current());
            }
        }
    }

    /// The snapshot on disk, if it is newer than the one in use.
    fn install_newer(&self, credential: &Credential) {
        match self.stored_snapshot(credential) {
            Ok(Some(snapshot))
                if self.shared.snapshot().is_none_or(|ours| ours.version < snapshot.version) =>
            {
                let version = snapshot.version;
                let Rechecked { cut, spared } = self.shared.install(Arc::new(snapshot));
                tracing::info!(%version, cut, spared, "snapshot applied from the disk");
            }
            Ok(_) => {}
            Err(error) => tracing::error!(error, "the snapshot on disk cannot be used"),
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

impl Admin {
    fn bind(address: SocketAddr, inherited: &mut Inherited) -> Result<Self, StartError> {
        let handed = inherited.tcp(&admin_way(address)).pop();
        let socket = match handed {
            Some(socket) => socket,
            None => socket::listen(address, NonZeroUsize::MIN)
                .map_err(|source| StartError::Listen { flag: "--admin-listen", source })?
                .pop()
                .ok_or_else(|| StartError::System(io::ErrorKind::AddrNotAvailable.into()))?,
        };
        let made = || {
            let (address, offered) = (socket.local_addr()?, socket.try_clone()?);
            Ok(Self { address, listener: TcpListener::from_std(socket)?, offered: Arc::new(offered) })
        };
        made().map_err(StartError::System)
    }
}

fn admin_way(asked: SocketAddr) -> Way {
    Way { purpose: "admin".to_owned(), asked }
}

async fn serve_admin(admin: Admin, pages: admin::Pages, close: CancellationToken) {
    let Admin { listener, offered, .. } = admin;
    let served = axum::serve(listener, admin::router(pages)).with_graceful_shutdown(async move {
        close.cancelled().await;
        drop(offered);
    });
    if let Err(error) = served.await {
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
