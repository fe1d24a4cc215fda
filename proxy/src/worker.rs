//! A data-plane thread: a runtime of its own, its own listeners, and every connection that they accept. Connections never
//! change threads.
//!
//! Listeners come and go at run time ([`crate::listeners`]); each has a token that closes it. When one is closed, what
//! the kernel had already accepted for it is still served.

use crate::inbound;
use crate::metrics;
use crate::outbound::{self, Target};
use crate::redirect::{self, Redirect};
use crate::shared::Shared;
use crate::tls::Connectors;
use crate::tunnel::pool::{self, Pool};
use crate::upgrade::offers::Way;
use futures_util::FutureExt;
use rand::RngExt;
use rand::rngs::SmallRng;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::{Builder, Uuid};

/// Listeners on their way to a thread. Whoever sends more waits for the thread, which takes them in microseconds.
const COMMANDS_MAX: usize = 64;

/// Pause after a failed accept: long enough not to burn a core while file descriptors are short, short enough not to be
/// noticed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// How long connections may take to notice that they were cut, when the thread stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// What a listener's connections are for.
#[derive(Clone, Debug)]
pub(crate) enum Purpose {
    /// Other sidecars connect here.
    Inbound,
    /// The app connects here, to reach this.
    Outbound(Arc<Target>),
    /// The kernel leads connections here that the app opened to anywhere.
    Redirected(Arc<Redirect>),
}

/// As the processes of an upgrade name it to one another.
impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inbound => f.write_str("inbound"),
            Self::Outbound(target) => write!(f, "upstream {}:{}", target.service, target.port),
            Self::Redirected(_) => f.write_str("redirect"),
        }
    }
}

/// A listening socket for one thread.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) socket: std::net::TcpListener,
    /// What it is handed over as.
    pub(crate) way: Way,
    pub(crate) purpose: Purpose,
    /// Closes it.
    pub(crate) stop: CancellationToken,
}

/// What the connections of a thread share.
pub(crate) struct Worker {
    pub(crate) shared: Arc<Shared>,
    pub(crate) connectors: Connectors,
    /// Tunnels to other sidecars that wait for their next stream.
    pub(crate) tunnels: Pool,
    rng: Mutex<SmallRng>,
    tasks: TaskTracker,
}

/// A running thread.
#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) listeners: mpsc::Sender<Listener>,
    thread: JoinHandle<()>,
}

impl Worker {
    /// A new connection's id: a UUID of version 7, from the thread's own randomness, so that no system call is made.
    pub(crate) fn connection_id(&self) -> Uuid {
        let now = u64::try_from(crate::clock::now().0).unwrap_or_default();
        let random = self.with_rng(SmallRng::random);
        Builder::from_unix_timestamp_millis(now, &random).into_uuid()
    }

    /// Uses the thread's randomness. Its lock is never contended: only this thread takes it.
    pub(crate) fn with_rng<T>(&self, use_it: impl FnOnce(&mut SmallRng) -> T) -> T {
        use_it(&mut self.rng.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Starts a thread that serves the listeners it is sent, until `stop`.
///
/// # Errors
/// If the system gives no thread or no event queue.
pub(crate) fn start(
    index: usize,
    shared: Arc<Shared>,
    tunnels_idle_max: usize,
    stop: CancellationToken,
) -> io::Result<Thread> {
    let (listeners, commands) = mpsc::channel(COMMANDS_MAX);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let worker = Arc::new(Worker {
        shared,
        connectors: Connectors::default(),
        tunnels: Pool::new(tunnels_idle_max),
        rng: Mutex::new(rand::make_rng()),
        tasks: TaskTracker::new(),
    });
    let run = move || runtime.block_on(worker.run(commands, stop));
    let thread = std::thread::Builder::new().name(format!("weft-data-{index}")).spawn(run)?;
    Ok(Thread { listeners, thread })
}

impl Thread {
    /// Waits until the thread has stopped.
    pub(crate) async fn join(self) {
        drop(self.listeners);
        let joined = tokio::task::spawn_blocking(move || self.thread.join());
        if !matches!(joined.await, Ok(Ok(()))) {
            tracing::error!("a data-plane thread panicked");
        }
    }
}

impl Worker {
    async fn run(self: Arc<Self>, mut commands: mpsc::Receiver<Listener>, stop: CancellationToken) {
        let mut sweeps = interval(pool::SWEEP);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = sweeps.tick() => self.tunnels.sweep(),
                listener = commands.recv() => match listener {
                    Some(listener) => self.listen(listener),
                    None => break,
                },
            }
        }
        self.tasks.close();
        let _ = tokio::time::timeout(STOP_TIMEOUT, self.tasks.wait()).await;
    }

    fn listen(self: &Arc<Self>, listener: Listener) {
        let Listener { socket, way, purpose, stop } = listener;
        match TcpListener::from_std(socket) {
            Ok(socket) => {
                let socket = Arc::new(socket);
                self.shared.offers.add(way, &socket);
                let worker = Arc::clone(self);
                self.tasks.spawn(worker.accept(socket, purpose, stop));
            }
            Err(error) => tracing::error!(%error, "a listener cannot be used"),
        }
    }

    async fn accept(self: Arc<Self>, listener: Arc<TcpListener>, purpose: Purpose, stop: CancellationToken) {
        let mut failing = false;
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, source)) => {
                    failing = false;
                    self.serve(stream, source, &purpose);
                }
                Err(error) => {
                    metrics::accept_failed();
                    // Once, until one is accepted again; the metric counts.
                    if !failing {
                        tracing::warn!(%error, "connections cannot be accepted");
                    }
                    failing = true;
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        // These clients are connected already, as far as they know.
        while let Some(Ok((stream, source))) = listener.accept().now_or_never() {
            self.serve(stream, source, &purpose);
        }
    }

    fn serve(self: &Arc<Self>, stream: TcpStream, source: SocketAddr, purpose: &Purpose) {
        match purpose {
            Purpose::Inbound => {
                self.tasks.spawn(inbound::serve(Arc::clone(self), stream, source));
            }
            Purpose::Outbound(target) => {
                self.tasks.spawn(outbound::serve(Arc::clone(self), stream, source, Arc::clone(target)));
            }
            Purpose::Redirected(redirect) => {
                self.tasks.spawn(redirect::serve(Arc::clone(self), stream, source, Arc::clone(redirect)));
            }
        }
    }
}
