//! The start order, and its reverse.

use anyhow::{Context as _, bail};
use futures_util::FutureExt;
use metrics_exporter_prometheus::PrometheusHandle;
use std::fs::{File, TryLockError};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use uuid::Uuid;
use weft_api::acks::Acks;
use weft_api::commands::{self, Change, Commands};
use weft_api::status::ApiError;
use weft_api::witness::Witnesses;
use weft_api::{Clock, Context};
use weft_eventlog::{ConnectConfig, EventLog, LogConfig, MigrateError, OpenError, migrate};
use weft_identity::ca::CertificateAuthority;
use weft_identity::spiffe::{SpiffeId, Subject};
use weft_identity::tls::{ClientAuth, ExpectedPeer, TlsIdentity};
use weft_model::ca::RootAdded;
use weft_model::version::ExpectedVersion;
use weft_model::{Chain, Command};
use weft_projector::{Projector, Store, View};

use crate::admin::Serving;
use crate::config::Config;
use crate::history::{History, Kept, Watch};
use crate::listener::Listener;
use crate::operator::AdminCredential;
use crate::{admin, clock, operator, renewal};

/// How long a start waits for the database: as long as one takes to recover from a crash, and people to wait.
const DATABASE_WAIT_MAX: Duration = Duration::from_secs(30);
/// Pause between two attempts to reach it.
const DATABASE_RETRY: Duration = Duration::from_millis(250);
/// How long requests under way may take once the process is told to end.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// How long all the rest may take after that.
const STOP_MAX: Duration = Duration::from_secs(8);
/// Calls and streams of one connection: two for each sidecar that is introduced on it. An operator's tool needs a few.
const STREAMS_PER_CONNECTION_MAX: u32 = 2_048;
/// A connection ends, gracefully, while its leaf is still good: leaves live an hour and are renewed from half of it, so
/// calls always come on a connection whose leaf has not ended.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(600);
/// Quiet connections are checked so often, and dropped when no answer comes.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(10));
/// What a client may send ahead on one stream.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;

/// A controller that runs.
#[derive(Debug)]
pub struct Controller {
    address: SocketAddr,
    admin_address: SocketAddr,
    admin_credential: PathBuf,
    log: EventLog,
    store: Store,
    view: View,
    history: History,
    /// Told first: nothing new is accepted, streams end.
    drain: CancellationToken,
    /// Told when requests are done, which until then need the fold: the lease is given back, what sidecars said is written.
    quiesce: CancellationToken,
    /// Told last: the admin port ends.
    ended: CancellationToken,
    server: JoinSet<()>,
    background: JoinSet<()>,
    last: JoinSet<()>,
    /// Nobody else goes by this name meanwhile.
    _name: File,
}

impl Controller {
    /// Starts, in this order, and returns once it serves. `clock` tells the time that leaves and tokens live by.
    ///
    /// # Errors
    /// What could not be started, why, and what to do about it. Nothing is left running.
    pub async fn start(
        config: Config,
        clock: Clock,
        metrics: Option<PrometheusHandle>,
    ) -> anyhow::Result<Self> {
        let listener = Listener::bind(config.listen)
            .with_context(|| format!("cannot listen on {}; choose another --listen", config.listen))?;
        let admin_socket = TcpListener::bind(config.admin_listen).await.with_context(|| {
            format!("cannot listen on {}; choose another --admin-listen", config.admin_listen)
        })?;
        let (address, admin_address) = (listener.local_addr()?, admin_socket.local_addr()?);

        let authority_dir = operator::authority_dir(&config.state_dir);
        let authority =
            CertificateAuthority::load_or_create(&authority_dir, &config.trust_domain, clock::now())
                .with_context(|| {
                    format!("cannot use the certificate authority in {}", authority_dir.display())
                })?;
        let authority = Arc::new(authority);
        let name = take_name(&config)?;
        let admin = AdminCredential::issue(&authority, &config.state_dir, clock::now())?;
        let admin_credential = admin.dir().to_owned();

        let connect: ConnectConfig = config.database_url.parse().context(
            "the database URL is malformed; its form is postgres://user:password@host:port/database",
        )?;
        reach_and_migrate(&connect).await?;
        let log = open_log(connect, config.allow_unsafe_database).await?;
        let store = Store::new(&config.database_url)?;

        let view = View::new();
        let drain = CancellationToken::new();
        let quiesce = CancellationToken::new();
        let ended = CancellationToken::new();
        let mut background = JoinSet::new();
        let process = Uuid::new_v4();
        let projector =
            Projector::new(log.reader(), store.clone(), view.clone(), config.name.to_string(), process);
        let projecting = projector.run(quiesce.clone());
        background.spawn(async move {
            // The view keeps the fault: /ready says it, and commands are refused with it.
            let _ = projecting.await;
        });

        let acks = Arc::new(Acks::new(view.clone()));
        let (acks_store, own) = (store.clone(), config.name.to_string());
        background.spawn(Arc::clone(&acks).run(acks_store, own, process, quiesce.clone()));
        let context = Context {
            view: view.clone(),
            appender: log.appender(),
            reader: log.reader(),
            store: store.clone(),
            authority: Arc::clone(&authority),
            clock,
            acks,
            flaps: Arc::default(),
            rollouts: Arc::default(),
            witnesses: Arc::new(Witnesses::new(view.clone(), log.reader(), Arc::clone(&authority))),
            drain: drain.clone(),
        };
        let flaps = Arc::clone(&context.flaps);
        background.spawn(flaps.run(context.clone(), actor(&config), drain.clone()));
        let rollouts = Arc::clone(&context.rollouts);
        background.spawn(rollouts.run(context.clone(), actor(&config), drain.clone()));
        let history = History::default();

        let mut last = JoinSet::new();
        let metrics = metrics.map(Arc::new);
        let serving =
            Serving { begun: CancellationToken::new(), drain: drain.clone(), history: history.clone() };
        last.spawn(admin::serve(admin_socket, view.clone(), metrics, serving.clone(), ended.clone()));

        let head = log.reader().head().await.context("cannot read the event log")?.position;
        wait_for_fold(&view, head).await;
        let kept = Kept::new(&config.state_dir, &config.name);
        check_kept(&context, &kept, &config).await?;
        announce_root(&context, &config, &authority).await?;
        let announce = (context.clone(), config.clone(), Arc::clone(&authority));
        let watch = Watch {
            context: context.clone(),
            name: config.name.clone(),
            lost: log.lost(),
            history: history.clone(),
            kept,
            announce: Box::new(move || {
                let (context, config, authority) = announce.clone();
                async move { announce_root(&context, &config, &authority).await }.boxed()
            }),
        };
        background.spawn(watch.run(quiesce.clone()));

        let own = renewal::own_credential(&authority, &config.name)
            .context("cannot issue this controller's leaf")?;
        let identity = TlsIdentity::new(own);
        background.spawn(renewal::keep_renewed(
            identity.clone(),
            Arc::clone(&authority),
            config.name.clone(),
            admin,
            quiesce.clone(),
        ));
        let tls = identity
            .resuming_server(ClientAuth::Optional, ExpectedPeer::Any, &[b"h2"])
            .context("the system has no random numbers for TLS")?;
        let connections = listener.run(&mut background, tls, drain.clone());
        let routes = weft_api::routes(&context).context("the protobuf descriptors are damaged")?;
        let server_task = Server::builder()
            .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
            .max_connection_age(CONNECTION_AGE_MAX)
            .http2_keepalive_interval(Some(KEEPALIVE.0))
            .http2_keepalive_timeout(Some(KEEPALIVE.1))
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .layer(weft_api::layer())
            .add_routes(routes)
            .serve_with_incoming_shutdown(connections, drain.clone().cancelled_owned());
        let mut server = JoinSet::new();
        server.spawn(async move {
            if let Err(error) = server_task.await {
                tracing::error!(error = %Chain(&error), "the server ended");
            }
        });
        serving.begun.cancel();
        tracing::info!(%address, admin = %admin_address, name = %config.name, position = %head, "serving");
        Ok(Self {
            address,
            admin_address,
            admin_credential,
            log,
            store,
            view,
            history,
            drain,
            quiesce,
            ended,
            server,
            background,
            last,
            _name: name,
        })
    }

    /// Where sidecars and operators connect.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where /live, /ready and /metrics are.
    #[must_use]
    pub const fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// The directory of the admin credential.
    #[must_use]
    pub const fn admin_credential(&self) -> &PathBuf {
        &self.admin_credential
    }

    /// The mesh in this controller's memory.
    #[must_use]
    pub const fn view(&self) -> &View {
        &self.view
    }

    /// Waits until this process has to be started anew, because it remembers a history of the log that was given up.
    pub async fn outdated(&self) {
        self.history.outdated.cancelled().await;
    }

    /// Ends: accepts nothing new, ends streams, finishes what is under way, gives the lease back, closes the log. Takes
    /// a few seconds at most.
    pub async fn stop(mut self) {
        tracing::info!("shutting down");
        self.drain.cancel();
        if timeout(DRAIN_MAX, join(&mut self.server)).await.is_err() {
            tracing::warn!("requests were still under way and are cut");
            self.server.abort_all();
        }
        self.quiesce.cancel();
        let rest = async {
            join(&mut self.background).await;
            self.log.shutdown().await;
            self.store.close().await;
            self.ended.cancel();
            join(&mut self.last).await;
        };
        if timeout(STOP_MAX, rest).await.is_err() {
            tracing::warn!("the database does not answer; ending without it");
        }
    }
}

async fn join(tasks: &mut JoinSet<()>) {
    while tasks.join_next().await.is_some() {}
}

/// This controller, as the log names it.
fn actor(config: &Config) -> String {
    let subject = Subject::Controller(config.name.clone());
    SpiffeId { trust_domain: config.trust_domain.clone(), subject }.to_string()
}

/// Takes the controller's name in its state directory for as long as the file is open: two processes of one name would write
/// over each other's witness, and people could not tell them apart.
fn take_name(config: &Config) -> anyhow::Result<File> {
    let path = config.state_dir.join(format!("{}.lock", config.name));
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!(
                "a controller called {} runs already in {}; choose another --name, or stop it",
                config.name,
                config.state_dir.display()
            )
        }
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Waits for the database, and brings its tables up to date.
async fn reach_and_migrate(connect: &ConnectConfig) -> anyhow::Result<()> {
    let deadline = Instant::now() + DATABASE_WAIT_MAX;
    let mut told = false;
    loop {
        match migrate(connect).await {
            Ok(()) => return Ok(()),
            Err(error @ MigrateError::Connect(_)) if Instant::now() < deadline => {
                if !told {
                    tracing::warn!(error = %Chain(&error), "waiting for the database");
                    told = true;
                }
                sleep(DATABASE_RETRY).await;
            }
            Err(error @ MigrateError::Connect(_)) => {
                return Err(error).with_context(|| {
                    format!("the database did not answer for {DATABASE_WAIT_MAX:?}; is it running, and is the URL right?")
                });
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn open_log(connect: ConnectConfig, allow_unsafe_settings: bool) -> anyhow::Result<EventLog> {
    let config = LogConfig { connect, allow_unsafe_settings };
    match EventLog::open(config).await {
        Ok(log) => Ok(log),
        Err(error @ OpenError::Unfit(_)) => Err(error).context(
            "the database is refused; repair it as said, or pass --allow-unsafe-database for throw-away data",
        ),
        Err(error) => Err(error.into()),
    }
}

/// Until the log is folded, or cannot be.
async fn wait_for_fold(view: &View, head: weft_model::Position) {
    while view.fault().is_none() && !view.wait_folded(head, DATABASE_WAIT_MAX).await {
        tracing::info!(of = %head, "still folding the log");
    }
}

/// Whether the log still has what an earlier process of this controller published. If not, that is recorded, and the
/// controller serves: reads, and sidecars that need what is there.
async fn check_kept(context: &Context, kept: &Kept, config: &Config) -> anyhow::Result<()> {
    let Some(witness) = kept.load() else { return Ok(()) };
    match context.witnesses.check(&witness, &format!("controller {}", config.name)).await {
        Ok(()) => Ok(()),
        Err(ApiError::Rewound(why)) => {
            tracing::error!(why, "serving without taking changes");
            Ok(())
        }
        Err(error) => bail!("the log cannot be compared with what was published of it: {error:?}"),
    }
}

/// Executes a command, again while it can only not be recorded now: the log may be held up by somebody, or the database restart.
async fn execute_patiently(context: &Context, request: &commands::Request) -> Result<(), ApiError> {
    let (commands, deadline) = (Commands::new(context), Instant::now() + DATABASE_WAIT_MAX);
    loop {
        match commands.execute(request).await {
            Ok(_) => return Ok(()),
            Err(ApiError::Unavailable(why)) if Instant::now() < deadline => {
                tracing::warn!(why, "a command of this start is not recorded yet, trying again");
            }
            Err(ApiError::Overloaded { .. }) if Instant::now() < deadline => {}
            Err(error) => return Err(error),
        }
        sleep(DATABASE_RETRY).await;
    }
}

/// Puts the root into the log, if it is not there. With a log that cannot be followed there is only reading.
async fn announce_root(
    context: &Context,
    config: &Config,
    authority: &CertificateAuthority,
) -> anyhow::Result<()> {
    if let Some(fault) = context.view.fault() {
        tracing::error!(error = %Chain(&*fault), "serving reads only");
        return Ok(());
    }
    let path =
        operator::authority_dir(&config.state_dir).join(weft_identity::ca::store::ROOT_CERTIFICATE_FILE);
    let certificate_pem =
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let sha256 = authority.root_fingerprint();
    let root =
        RootAdded { trust_domain: config.trust_domain.clone(), certificate_pem, sha256: sha256.to_string() };
    let request = commands::Request {
        command_id: Uuid::now_v7(),
        reason: Some("a controller started with this root".into()),
        actor: actor(config),
        fingerprint: *sha256.as_bytes(),
        changes: vec![Change::new(ExpectedVersion::Any, Command::Ca(root))],
    };
    match execute_patiently(context, &request).await {
        Ok(()) => Ok(()),
        // It is there, or comes when an operator has decided.
        Err(ApiError::Rewound(why)) => {
            tracing::error!(why, "the root is not announced");
            Ok(())
        }
        Err(error) => {
            let hint = match error {
                ApiError::Rejected { .. } => "; controllers of one mesh share one certificate authority",
                _ => "",
            };
            let status = tonic::Status::from(error);
            bail!(
                "the root in {} cannot be announced to the mesh: {}{hint}",
                path.display(),
                status.message()
            )
        }
    }
}
