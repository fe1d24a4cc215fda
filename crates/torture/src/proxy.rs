//! A proxy between a process and its PostgreSQL, where faults happen.
//!
//! What can go wrong between two steps of a transaction is decided on the wire and not in the process: so what is tested is
//! the program that users run, with no line in it for the sake of a test. The proxy takes messages one by one, knows
//! what each does ([`frame`](crate::frame)), and at an armed [`Point`] kills the process or cuts its connection.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI32, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::frame::{Message, Statements, Step, read};

/// A place in a transaction that appends or projects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Point {
    /// The message that begins it has come and is not passed on.
    BeforeLock,
    /// The server has inserted; the commit is not passed on.
    AfterInsert,
    /// The commit has come and is not passed on.
    BeforeCommit,
    /// The commit is passed on, and nobody waits for what becomes of it.
    DuringCommit,
    /// The server has committed; its answer is not delivered.
    AfterCommit,
    /// The answer is delivered, and the process ends before it can tell anybody.
    BeforeReply,
    /// The projector's rows and checkpoint are sent; their commit is not passed on.
    Projecting,
}

impl Point {
    /// Those of an append.
    pub(crate) const APPEND: [Self; 6] = [
        Self::BeforeLock,
        Self::AfterInsert,
        Self::BeforeCommit,
        Self::DuringCommit,
        Self::AfterCommit,
        Self::BeforeReply,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::BeforeLock => "before-lock",
            Self::AfterInsert => "after-insert",
            Self::BeforeCommit => "before-commit",
            Self::DuringCommit => "during-commit",
            Self::AfterCommit => "after-commit",
            Self::BeforeReply => "before-reply",
            Self::Projecting => "projecting",
        }
    }
}

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// SIGKILL for the process.
    Kill,
    /// The connection ends, on both sides.
    Cut,
}

#[derive(Clone, Copy, Debug)]
struct Order {
    point: Point,
    fault: Fault,
    /// So often the point is passed first.
    skip: u32,
}

/// A fault, and the process that it happens to.
#[derive(Clone, Copy, Debug)]
struct Happening {
    fault: Fault,
    process: i32,
}

impl Happening {
    /// To a connection, whosever it is.
    const CUT: Self = Self { fault: Fault::Cut, process: 0 };
}

/// Cuts at random, for as long as some are left.
#[derive(Debug)]
struct Storm {
    rng: StdRng,
    left: u64,
}

#[derive(Debug)]
struct Shared {
    server: AtomicU16,
    process: AtomicI32,
    /// Counts the processes that were expected.
    life: AtomicU64,
    order: Mutex<Option<Order>>,
    storm: Mutex<Option<Storm>>,
    delays: Mutex<Option<(StdRng, u64)>>,
    fired: watch::Sender<u64>,
    cuts: AtomicU64,
}

/// See the module's documentation. Ends with the value.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    _accepting: JoinSet<()>,
}

impl Proxy {
    /// A proxy before the server on this loopback port.
    pub(crate) async fn before(port: u16) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            server: AtomicU16::new(port),
            process: AtomicI32::new(0),
            life: AtomicU64::new(0),
            order: Mutex::new(None),
            storm: Mutex::new(None),
            delays: Mutex::new(None),
            fired: watch::Sender::new(0),
            cuts: AtomicU64::new(0),
        });
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, _accepting: accepting })
    }

    pub(crate) const fn port(&self) -> u16 {
        self.address.port()
    }

    /// The server came back elsewhere.
    pub(crate) fn follow(&self, port: u16) {
        self.shared.server.store(port, Ordering::SeqCst);
    }

    /// A new process is about to start: what connections of earlier ones do is of no interest any more.
    pub(crate) fn expect_process(&self) {
        self.shared.process.store(0, Ordering::SeqCst);
        self.shared.life.fetch_add(1, Ordering::SeqCst);
    }

    /// It started: whom [`Fault::Kill`] is for.
    pub(crate) fn guard(&self, process: i32) {
        self.shared.process.store(process, Ordering::SeqCst);
    }

    /// Lets a fault happen once, when the point was passed `skip` times.
    pub(crate) fn arm(&self, point: Point, fault: Fault, skip: u32) {
        *lock(&self.shared.order) = Some(Order { point, fault, skip });
    }

    /// Waits until what was armed has happened. False if it did not in time; then it will not any more.
    pub(crate) async fn fired(&self, limit: Duration) -> bool {
        let mut fired = self.shared.fired.subscribe();
        let armed = || lock(&self.shared.order).is_some();
        let wait = async {
            while armed() {
                if fired.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = timeout(limit, wait).await;
        lock(&self.shared.order).take().is_none()
    }

    /// Cuts every second commit or so, on either side of it, so many times in all.
    pub(crate) fn storm(&self, seed: u64, cuts: u64) {
        *lock(&self.shared.storm) = Some(Storm { rng: StdRng::seed_from_u64(seed), left: cuts });
    }

    /// How many commits were cut.
    pub(crate) fn cuts(&self) -> u64 {
        self.shared.cuts.load(Ordering::SeqCst)
    }

    /// Holds each begin and each commit up for at most so long.
    pub(crate) fn delay(&self, seed: u64, ms_max: u64) {
        *lock(&self.shared.delays) = Some((StdRng::seed_from_u64(seed), ms_max));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Whether something is to happen here, and what; to which process.
    fn take(&self, point: Point, place: &Place) -> Option<Happening> {
        let process = self.process.load(Ordering::SeqCst);
        if process <= 0 || place.life != self.life.load(Ordering::SeqCst) {
            return None;
        }
        let mut order = lock(&self.order);
        let armed = order.as_mut().filter(|order| order.point == point)?;
        if armed.skip > 0 {
            armed.skip -= 1;
            return None;
        }
        order.take().map(|order| Happening { fault: order.fault, process })
    }

    fn is_armed(&self, point: Point) -> bool {
        lock(&self.order).is_some_and(|order| order.point == point && order.skip == 0)
    }

    /// Whether a storm cuts here.
    fn strikes(&self, point: Point) -> bool {
        let mut storm = lock(&self.storm);
        let Some(storm) = storm.as_mut().filter(|storm| storm.left > 0) else { return false };
        let share = if point == Point::AfterCommit { 0.5 } else { 0.3 };
        let strikes = storm.rng.random_bool(share);
        storm.left -= u64::from(strikes);
        strikes
    }

    fn happens(&self, Happening { fault, process }: Happening) {
        match fault {
            Fault::Kill => {
                let process = nix::unistd::Pid::from_raw(process);
                // It may be gone already.
                let _ = nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL);
            }
            Fault::Cut => {
                self.cuts.fetch_add(1, Ordering::SeqCst);
            }
        }
        self.fired.send_modify(|fired| *fired += 1);
    }

    async fn hold_up(&self) {
        let pause = lock(&self.delays).as_mut().map(|(rng, max)| rng.random_range(0..=*max));
        if let Some(pause) = pause {
            sleep(Duration::from_millis(pause)).await;
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            let server = ("127.0.0.1", shared.server.load(Ordering::SeqCst));
            // A server that is away is what its client shall see.
            if let Ok(server) = TcpStream::connect(server).await {
                pass(client, server, &shared).await;
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

/// Where a connection's transactions are, as its two directions tell each other.
#[derive(Debug, Default)]
struct Place {
    /// Of the process whose connection it is.
    life: u64,
    /// What the server answers by being ready for the next: sent, and answered.
    sent: AtomicU64,
    answered: watch::Sender<u64>,
    /// Whether the connection ever inserted events: of others no commit is of interest.
    writes: std::sync::atomic::AtomicBool,
    /// Whether the transaction whose answers come now has inserted.
    appends: std::sync::atomic::AtomicBool,
}

async fn pass(client: TcpStream, server: TcpStream, shared: &Shared) {
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let place = Place { life: shared.life.load(Ordering::SeqCst), ..Place::default() };
    // Whichever ends first ends both: that is what a cut is.
    tokio::select! {
        _ = requests(from_client, to_server, shared, &place) => {}
        _ = answers(from_server, to_client, shared, &place) => {}
    }
}

async fn requests(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    shared: &Shared,
    place: &Place,
) -> io::Result<()> {
    let mut statements = Statements::default();
    let (mut first, mut inserts, mut projects) = (true, false, false);
    // Which of what was sent is the insert of this transaction.
    let mut insert = 0;
    while let Some(message) = read(&mut from, first).await? {
        // The beginning of a connection is answered so, a simple query, and the end of an extended one.
        if first || matches!(message.kind, b'Q' | b'S') {
            place.sent.fetch_add(1, Ordering::SeqCst);
        }
        first = false;
        match statements.step(&message) {
            Step::Begin => {
                (inserts, projects) = (false, false);
                shared.hold_up().await;
                if let Some(fault) = shared.take(Point::BeforeLock, place) {
                    shared.happens(fault);
                    return Ok(());
                }
            }
            Step::Insert => {
                inserts = true;
                place.writes.store(true, Ordering::SeqCst);
                insert = place.sent.load(Ordering::SeqCst) + 1;
            }
            Step::Project => projects = true,
            Step::Commit => {
                shared.hold_up().await;
                if let Some(fault) = before_commit(shared, place, inserts.then_some(insert), projects).await {
                    shared.happens(fault);
                    return Ok(());
                }
                if inserts && let Some(fault) = during_commit(shared, place) {
                    to.write_all(message.bytes()).await?;
                    shared.happens(fault);
                    return Ok(());
                }
            }
            Step::Other => {}
        }
        to.write_all(message.bytes()).await?;
    }
    Ok(())
}

/// `insert` is which of what was sent inserts; none if nothing does.
async fn before_commit(
    shared: &Shared,
    place: &Place,
    insert: Option<u64>,
    projects: bool,
) -> Option<Happening> {
    if projects && let Some(happening) = shared.take(Point::Projecting, place) {
        return Some(happening);
    }
    let insert = insert?;
    if let Some(happening) = shared.take(Point::BeforeCommit, place) {
        return Some(happening);
    }
    if !shared.is_armed(Point::AfterInsert) {
        return shared.take(Point::AfterInsert, place);
    }
    // The server answers, unless it is away; and it may have refused.
    let mut answered = place.answered.subscribe();
    let _ = timeout(Duration::from_secs(5), answered.wait_for(|done| *done >= insert)).await;
    if !place.appends.load(Ordering::SeqCst) {
        return None;
    }
    shared.take(Point::AfterInsert, place)
}

fn during_commit(shared: &Shared, place: &Place) -> Option<Happening> {
    shared
        .take(Point::DuringCommit, place)
        .or_else(|| shared.strikes(Point::DuringCommit).then_some(Happening::CUT))
}

async fn answers(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    shared: &Shared,
    place: &Place,
) -> io::Result<()> {
    let mut once_replied = None;
    while let Some(message) = read(&mut from, false).await? {
        let committed = note(&message, place);
        if committed {
            let fault = shared.take(Point::AfterCommit, place);
            let fault = fault.or_else(|| shared.strikes(Point::AfterCommit).then_some(Happening::CUT));
            if let Some(fault) = fault {
                shared.happens(fault);
                return Ok(());
            }
            once_replied = shared.take(Point::BeforeReply, place);
        }
        to.write_all(message.bytes()).await?;
        if message.kind == b'Z' {
            place.answered.send_modify(|answered| *answered += 1);
        }
        // The answer is whole once the server is ready for the next statement.
        if message.kind == b'Z'
            && let Some(fault) = once_replied.take()
        {
            shared.happens(fault);
            return Ok(());
        }
    }
    Ok(())
}

/// Whether the message says that events were committed.
fn note(message: &Message, place: &Place) -> bool {
    let Some(tag) = message.tag() else { return false };
    match tag {
        "BEGIN" => place.appends.store(false, Ordering::SeqCst),
        "COMMIT" => return place.appends.swap(false, Ordering::SeqCst),
        "ROLLBACK" => place.appends.store(false, Ordering::SeqCst),
        tag if tag.starts_with("INSERT") && place.writes.load(Ordering::SeqCst) => {
            place.appends.store(true, Ordering::SeqCst);
        }
        _ => {}
    }
    false
}
