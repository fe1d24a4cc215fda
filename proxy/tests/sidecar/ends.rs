//! How streams end: every order of ends and resets, through a new tunnel and through one that was used before, is what it
//! would be without sidecars.

use crate::support::sidecar::upstream;
use crate::support::{App, Controller, LIMIT, Sidecar};
use serde_json::json;
use socket2::SockRef;
use std::fmt;
use std::io::ErrorKind;
use std::num::NonZeroUsize;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use weft_testkit::wait_until;

/// Who does something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Client,
    Server,
}
use End::{Client, Server};

/// What an end does, after what came before it is done.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Sends so many bytes; they may still be under way afterwards.
    Send(End, usize),
    /// Ends its direction.
    Fin(End),
    /// Reads everything up to the other's end.
    Hears(End),
    /// Breaks the connection off.
    Reset(End),
    /// Closes without reading what came.
    Leave(End),
}
use Step::{Fin, Hears, Leave, Reset, Send};

const FEW: usize = 3_000;
const MANY: usize = 3 << 20;

const ORDERS: &[&[Step]] = &[
    &[Fin(Client), Fin(Server)],
    &[Fin(Server), Fin(Client)],
    &[Send(Client, FEW), Fin(Client), Hears(Server), Send(Server, FEW), Fin(Server)],
    &[Send(Server, FEW), Fin(Server), Hears(Client), Send(Client, FEW), Fin(Client)],
    &[Send(Client, FEW), Send(Server, FEW), Fin(Client), Send(Server, FEW), Fin(Server)],
    &[Send(Client, FEW), Send(Server, FEW), Fin(Server), Send(Client, FEW), Fin(Client)],
    &[Send(Client, MANY), Send(Server, MANY), Fin(Client), Fin(Server)],
    &[Send(Server, MANY), Fin(Server), Send(Client, MANY), Fin(Client)],
    &[Fin(Client), Send(Server, MANY), Fin(Server)],
    &[Fin(Server), Send(Client, MANY), Fin(Client)],
    &[Reset(Client)],
    &[Reset(Server)],
    &[Send(Client, FEW), Reset(Client)],
    &[Send(Server, FEW), Reset(Server)],
    &[Send(Client, MANY), Reset(Client)],
    &[Send(Server, MANY), Reset(Server)],
    &[Fin(Client), Hears(Server), Reset(Server)],
    &[Fin(Server), Hears(Client), Reset(Client)],
    &[Send(Client, FEW), Fin(Client), Hears(Server), Send(Server, FEW), Reset(Server)],
    &[Send(Server, FEW), Fin(Server), Hears(Client), Send(Client, FEW), Reset(Client)],
    &[Fin(Client), Hears(Server), Reset(Client)],
    &[Fin(Server), Hears(Client), Reset(Server)],
    &[Send(Client, FEW), Leave(Server)],
    &[Send(Server, FEW), Leave(Client)],
];

/// What an end has seen of the other one.
#[derive(Clone, PartialEq, Eq)]
enum Seen {
    /// Everything, and the end behind it.
    Whole(Vec<u8>),
    /// The connection broke; how much came before says nothing.
    Broken,
    /// It did not look: it broke the connection itself.
    Nothing,
}

impl fmt::Debug for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(bytes) => write!(f, "{} bytes and an end", bytes.len()),
            Self::Broken => f.write_str("a reset"),
            Self::Nothing => f.write_str("nothing"),
        }
    }
}

/// One end under way: it reads and writes on tasks of its own, so that both ends may send more than buffers hold.
struct Actor {
    reading: JoinHandle<Seen>,
    writing: JoinHandle<OwnedWriteHalf>,
}

impl Actor {
    fn new(stream: TcpStream, end: End, order: &[Step]) -> Self {
        let resets = order.iter().any(|step| matches!(step, Reset(who) if *who == end));
        let leaves = order.iter().any(|step| matches!(step, Leave(who) if *who == end));
        if resets {
            SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
        let (mut read, write) = stream.into_split();
        let reading = spawn(async move {
            if leaves {
                read.readable().await.unwrap();
                return Seen::Nothing;
            }
            let mut bytes = Vec::new();
            match read.read_to_end(&mut bytes).await {
                Ok(_) => Seen::Whole(bytes),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => Seen::Broken,
                Err(error) => panic!("{end:?}: {error}"),
            }
        });
        Self { reading, writing: spawn(async move { write }) }
    }

    /// Writes on, once what it writes already is written.
    fn write<F>(self, then: impl FnOnce(OwnedWriteHalf) -> F + std::marker::Send + 'static) -> Self
    where
        F: Future<Output = OwnedWriteHalf> + std::marker::Send,
    {
        let Self { reading, writing } = self;
        Self { reading, writing: spawn(async move { then(writing.await.unwrap()).await }) }
    }

    async fn step(mut self, step: Step) -> Self {
        match step {
            Send(end, bytes) => self.write(async move |mut half| {
                // Fails if the other one has broken the connection.
                let _ = half.write_all(&pattern(end, bytes)).await;
                half
            }),
            Fin(_) => self.write(async move |mut half| {
                let _ = half.shutdown().await;
                half
            }),
            Hears(_) => {
                let seen = timeout(LIMIT, &mut self.reading).await.unwrap().unwrap();
                self.reading = spawn(async move { seen });
                self
            }
            Reset(_) => {
                self.reading.abort();
                self.writing.abort();
                let _ = tokio::join!(self.reading, self.writing);
                Self { reading: spawn(async { Seen::Nothing }), writing: spawn(std::future::pending()) }
            }
            Leave(_) => {
                let seen = timeout(LIMIT, &mut self.reading).await.unwrap().unwrap();
                drop(self.writing.await.unwrap());
                Self { reading: spawn(async { seen }), writing: spawn(std::future::pending()) }
            }
        }
    }

    async fn seen(self) -> Seen {
        let seen = timeout(LIMIT, self.reading).await.expect("an end").unwrap();
        self.writing.abort();
        seen
    }
}

/// What an end says: the two say different things.
fn pattern(end: End, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 + at / 251 + end as usize).to_le_bytes()[0]).collect()
}

fn spawn<T: std::marker::Send + 'static>(
    work: impl Future<Output = T> + std::marker::Send + 'static,
) -> JoinHandle<T> {
    TaskTracker::new().spawn(work)
}

/// Plays an order, and says what client and server have seen.
async fn play(client: TcpStream, server: TcpStream, order: &[Step]) -> (Seen, Seen) {
    let mut client = Actor::new(client, Client, order);
    let mut server = Actor::new(server, Server, order);
    for step in order {
        let (Send(end, _) | Fin(end) | Hears(end) | Reset(end) | Leave(end)) = *step;
        match end {
            Client => client = client.step(*step).await,
            Server => server = server.step(*step).await,
        }
    }
    (client.seen().await, server.seen().await)
}

/// Greets on a new connection, and finds its other end.
async fn meet(mut client: TcpStream, accepted: &mut mpsc::Receiver<TcpStream>) -> (TcpStream, TcpStream) {
    client.write_all(b"!").await.unwrap();
    loop {
        let mut server = timeout(LIMIT, accepted.recv()).await.unwrap().unwrap();
        // A probe says nothing.
        if server.read_exact(&mut [0]).await.is_ok() {
            return (client, server);
        }
    }
}

async fn accepting() -> (App, mpsc::Receiver<TcpStream>) {
    let (give, accepted) = mpsc::channel(64);
    let app = App::serve(move |stream| {
        let give = give.clone();
        async move {
            let _ = give.send(stream).await;
        }
    });
    (app.await, accepted)
}

/// Every order, without sidecars and with them.
async fn all_orders(reused: bool) {
    let (app, mut accepted) = accepting().await;
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[8080]);
    controller.allow("default/db", &["default/web"]);
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let web = Sidecar::start(&controller, "default/web/web-1", |config| {
        config.upstreams.push(upstream("default/db", 5432));
        // One thread, so that the next connection finds the tunnel of the last one.
        config.threads = NonZeroUsize::MIN;
        if !reused {
            config.tunnels_idle_max = 0;
        }
    })
    .await;
    web.sees("default/db", 1).await;
    let mut ended = 0;
    for order in ORDERS {
        let direct = TcpStream::connect(app.address).await.unwrap();
        let (client, server) = meet(direct, &mut accepted).await;
        let expected = play(client, server, order).await;

        if reused {
            let (client, server) = meet(web.connect("default/db", 5432).await, &mut accepted).await;
            play(client, server, &[Fin(Client), Fin(Server)]).await;
            ended += 1;
            wait_until("the tunnel is free", LIMIT, async || web.records().len() == ended).await;
        }
        let (client, server) = meet(web.connect("default/db", 5432).await, &mut accepted).await;
        let found = play(client, server, order).await;
        assert_eq!(found, expected, "{order:?}");
        ended += 1;
        wait_until("a record", LIMIT, async || web.records().len() == ended).await;
        let record = web.records().pop().unwrap();
        assert_eq!(record["tunnel_reused"], reused, "{order:?}");
        assert_eq!((&record["tls"], &record["key_exchange"]), (&json!("TLSv1_3"), &json!("X25519MLKEM768")));
    }
    drop(db);
}

#[tokio::test]
async fn a_new_tunnel_ends_streams_as_tcp_does() {
    all_orders(false).await;
}

#[tokio::test]
async fn a_tunnel_that_was_used_before_ends_streams_as_tcp_does() {
    all_orders(true).await;
}
