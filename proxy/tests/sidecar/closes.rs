//! How a peer's sidecar may end a tunnel: by `close_notify`, by the end of TCP without it, and by a reset, before and after the END of
//! each direction. To the app it is what TCP would be if the one at its other end had ended or broken the connection: nothing cut short
//! looks whole, however politely it was cut. The peer is made by hand, at either end, on a new tunnel and on one that was used before.

use crate::support::sidecar::upstream;
use crate::support::tunnel::{self, Frame, Opened};
use crate::support::{App, Controller, LIMIT, Sidecar};
use socket2::SockRef;
use std::io::ErrorKind;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufStream};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tokio_util::task::TaskTracker;
use weft_identity::tls::{ClientAuth, ExpectedPeer, TlsIdentity};
use weft_testkit::wait_until;

/// What happens, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The peer sends so many bytes of its app.
    Says(usize),
    /// The peer ends its app's direction.
    Ends,
    /// The peer announces a frame, and sends half of it.
    SaysHalf,
    /// The peer sends the beginning of a TLS record.
    BeginsRecord,
    /// The peer reads up to the END of the app's direction.
    Hears,
    /// The peer sends the alert that ends TLS; its TCP connection stays.
    Notifies,
    /// The peer ends its direction of TCP.
    Fins,
    /// The peer breaks its TCP connection off.
    Resets,
    /// The peer does several things, and what it sends goes out at once.
    Together(&'static [Self]),
    /// The app sends so many bytes; they may still be under way afterwards.
    AppSays(usize),
    /// The app ends its direction.
    AppEnds,
    /// The app reads up to an end, which there is to be.
    AppHears,
}
use Step::*;

const FEW: usize = 3_000;
const MANY: usize = 3 << 20;

const ORDERS: &[&[Step]] = &[
    // Before any END: cut short, and nothing is whole.
    &[Notifies],
    &[Fins],
    &[Resets],
    &[Together(&[Notifies, Fins])],
    &[Says(FEW), Notifies],
    &[Says(FEW), Fins],
    &[Says(FEW), Resets],
    &[Together(&[Says(FEW), Notifies])],
    &[Together(&[Says(FEW), Notifies, Fins])],
    &[Says(MANY), Notifies],
    &[Says(MANY), Fins],
    &[SaysHalf, Notifies],
    &[SaysHalf, Fins],
    &[Says(FEW), BeginsRecord, Fins],
    &[AppSays(MANY), Notifies],
    &[AppSays(MANY), Fins],
    // After the peer's END, while the app goes on: what the app still sends reaches nobody.
    &[Ends, AppHears, Notifies],
    &[Says(FEW), Ends, AppHears, Fins],
    &[Says(FEW), Ends, AppHears, Resets],
    &[Together(&[Says(FEW), Ends, Notifies]), AppHears],
    &[Together(&[Says(FEW), Ends, Notifies, Fins]), AppHears],
    &[Says(MANY), Ends, AppHears, AppSays(MANY), Notifies],
    // After the app's END, while the peer goes on.
    &[AppEnds, Hears, Notifies],
    &[AppEnds, Hears, Fins],
    &[AppEnds, Hears, Says(FEW), Notifies],
    &[AppSays(MANY), AppEnds, Hears, Says(MANY), Fins],
    &[AppEnds, Hears, SaysHalf, Notifies, Fins],
    // After both: the stream was whole, however the tunnel ends.
    &[Says(FEW), Ends, AppHears, AppSays(FEW), AppEnds, Hears, Notifies],
    &[AppSays(FEW), AppEnds, Hears, Says(FEW), Ends, AppHears, Fins],
    &[AppEnds, Hears, Together(&[Says(FEW), Ends, Notifies, Fins]), AppHears],
    &[Says(MANY), Ends, AppSays(MANY), AppEnds, Hears, AppHears, Resets],
];

/// What the app sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    /// So many bytes and an end; none if the connection broke, when it says nothing how much came before.
    whole: Option<usize>,
    /// Its sending broke, if it had not ended that itself.
    sending_broke: bool,
}

/// The app: it reads and writes on tasks of its own.
struct Actor {
    reading: JoinHandle<Option<usize>>,
    writing: JoinHandle<OwnedWriteHalf>,
    ended: bool,
    /// The kernel tells of a reset once: whoever reads after a write that was told sees an end.
    reset: Arc<AtomicBool>,
}

impl Actor {
    fn new(stream: TcpStream) -> Self {
        let (read, write) = stream.into_split();
        Self {
            reading: spawn(read_all(read)),
            writing: spawn(async { write }),
            ended: false,
            reset: Arc::default(),
        }
    }

    /// Does something with its writing half, once what it writes already is written.
    async fn step(mut self, step: Step) -> Self {
        let writing = self.writing;
        self.writing = match step {
            AppSays(bytes) => {
                let reset = Arc::clone(&self.reset);
                spawn(async move {
                    let mut half = writing.await.unwrap();
                    let written = half.write_all(&vec![b'a'; bytes]).await;
                    if written.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset) {
                        reset.store(true, Ordering::SeqCst);
                    }
                    half
                })
            }
            AppEnds => spawn(async move {
                let mut half = writing.await.unwrap();
                let _ = half.shutdown().await;
                half
            }),
            _ => {
                let seen = timeout(LIMIT, self.reading).await.expect("the app hears an end").unwrap();
                self.reading = spawn(async move { seen });
                writing
            }
        };
        self.ended |= step == AppEnds;
        self
    }

    async fn seen(self) -> Seen {
        let whole = timeout(LIMIT, self.reading).await.expect("an end").unwrap();
        let sending_broke = !self.ended && {
            let broken = async {
                let mut half = self.writing.await.unwrap();
                while half.write_all(&[b'a'; 1000]).await.is_ok() {}
            };
            timeout(LIMIT, broken).await.expect("the app's sending breaks");
            true
        };
        Seen { whole: whole.filter(|_| !self.reset.load(Ordering::SeqCst)), sending_broke }
    }
}

async fn read_all(mut read: OwnedReadHalf) -> Option<usize> {
    let mut bytes = Vec::new();
    match read.read_to_end(&mut bytes).await {
        Ok(_) => {
            assert!(bytes.iter().all(|byte| *byte == b'p'), "what came is what the peer said");
            Some(bytes.len())
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
            None
        }
    }
}

/// The one at the other end: it has not much to do with how it says things.
trait Peer {
    async fn step(&mut self, step: Step);
}

/// Without sidecars. Whatever ends TLS before both directions are over is a reset here.
struct Direct {
    stream: Option<TcpStream>,
    ended: bool,
    heard: bool,
}

impl Peer for Direct {
    async fn step(&mut self, step: Step) {
        let Some(stream) = &mut self.stream else { return };
        match step {
            Says(bytes) => stream.write_all(&vec![b'p'; bytes]).await.unwrap(),
            SaysHalf | BeginsRecord => stream.write_all(b"pp").await.unwrap(),
            Ends => {
                stream.shutdown().await.unwrap();
                self.ended = true;
            }
            Hears => {
                stream.read_to_end(&mut Vec::new()).await.unwrap();
                self.heard = true;
            }
            Notifies | Fins | Resets => {
                let stream = self.stream.take().unwrap();
                if !(self.ended && self.heard) {
                    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                }
            }
            Together(steps) => {
                for step in steps {
                    Box::pin(self.step(*step)).await;
                }
            }
            AppSays(_) | AppEnds | AppHears => {}
        }
    }
}

/// What is written waits in the buffer until it is flushed.
type Tls = TlsStream<BufStream<TcpStream>>;

struct Tunnel(Option<Tls>);

impl Tunnel {
    async fn put(&mut self, step: Step) {
        let tls = self.0.as_mut().unwrap();
        let mut bytes = Vec::new();
        match step {
            // In frames that a record can hold, as a sidecar sends them.
            Says(length) => {
                for piece in vec![b'p'; length].chunks(8_000) {
                    tunnel::write(&mut bytes, &tunnel::data(piece)).await.unwrap();
                }
            }
            SaysHalf => bytes.extend_from_slice(&[0, 0, 0, 4, b'p', b'p']),
            Ends => tunnel::write(&mut bytes, &tunnel::end()).await.unwrap(),
            Notifies => tls.get_mut().1.send_close_notify(),
            BeginsRecord => tls.get_mut().0.write_all(&[23, 3, 3, 0, 100, 1, 2]).await.unwrap(),
            Together(steps) => {
                for step in steps {
                    Box::pin(self.put(*step)).await;
                }
                return;
            }
            Hears | Fins | Resets | AppSays(_) | AppEnds | AppHears => {}
        }
        // Fails only if the sidecar has broken the tunnel, which the app sees as well.
        let _ = tls.write_all(&bytes).await;
    }
}

impl Peer for Tunnel {
    async fn step(&mut self, step: Step) {
        self.put(step).await;
        let fins = matches!(step, Fins) || matches!(step, Together(steps) if steps.contains(&Fins));
        let tls = self.0.as_mut().unwrap();
        let _ = tls.flush().await;
        if fins {
            let _ = tls.get_mut().0.get_mut().shutdown().await;
        }
        match step {
            Hears => while !tunnel::read(tls).await.unwrap().end {},
            Resets => {
                SockRef::from(tls.get_ref().0.get_ref()).set_linger(Some(Duration::ZERO)).unwrap();
                self.0 = None;
            }
            _ => {}
        }
    }
}

fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    TaskTracker::new().spawn(work)
}

/// Plays an order, and says what the app has seen.
async fn play(app: TcpStream, peer: &mut impl Peer, order: &[Step]) -> Seen {
    let mut app = Actor::new(app);
    for step in order {
        match step {
            AppSays(_) | AppEnds | AppHears => app = app.step(*step).await,
            _ => timeout(LIMIT, peer.step(*step)).await.expect("the peer is done"),
        }
    }
    app.seen().await
}

async fn directly(order: &[Step]) -> Seen {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    let mut peer = Direct { stream: Some(near.unwrap()), ended: false, heard: false };
    play(far.unwrap().0, &mut peer, order).await
}

fn mesh() -> Controller {
    let controller = Controller::start();
    controller.declare("default/db", &[5432]);
    controller.declare("default/web", &[8080]);
    controller.allow("default/db", &["default/web"]);
    controller
}

/// Gives away what it accepts.
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

/// The peer is the client's sidecar, the app a server.
async fn as_client(reused: bool) {
    let controller = mesh();
    let (app, mut accepted) = accepting().await;
    let db = Sidecar::serving(&controller, "default/db/db-1", 5432, app.address).await;
    let identity = TlsIdentity::new(controller.credential("default/web/web-1"));
    let tls = TlsConnector::from(identity.client_config(ExpectedPeer::Any, &[b"weft/1"]));
    for order in ORDERS {
        // Which one it is that does not end.
        eprintln!("{order:?}");
        let expected = directly(order).await;
        let socket =
            BufStream::with_capacity(1 << 16, 1 << 16, TcpStream::connect(db.inbound).await.unwrap());
        let tls = tls.connect("db.default".try_into().unwrap(), socket).await.unwrap();
        let mut tls = TlsStream::from(tls);
        if reused {
            let server = open(&mut tls, &mut accepted).await;
            let mut peer = Tunnel(Some(tls));
            play(server, &mut peer, &[Ends, AppHears, AppEnds, Hears]).await;
            tls = peer.0.unwrap();
        }
        let server = open(&mut tls, &mut accepted).await;
        let found = play(server, &mut Tunnel(Some(tls)), order).await;
        assert_eq!(found, expected, "{order:?}");
    }
}

/// Opens a stream, greets on it, and finds its other end.
async fn open(tls: &mut Tls, accepted: &mut mpsc::Receiver<TcpStream>) -> TcpStream {
    tunnel::write(tls, &tunnel::open("default/db", 5432)).await.unwrap();
    assert!(tunnel::read(tls).await.unwrap().opened.is_some());
    tunnel::write(tls, &tunnel::data(b"!")).await.unwrap();
    loop {
        let mut server = timeout(LIMIT, accepted.recv()).await.unwrap().unwrap();
        // A probe says nothing.
        if server.read_exact(&mut [0]).await.is_ok() {
            return server;
        }
    }
}

/// The peer is the server's sidecar, the app a client.
async fn as_server(reused: bool) {
    let controller = mesh();
    let (app, mut accepted) = accepting().await;
    controller.pretend("default/db/db-1", app.address);
    let identity = TlsIdentity::new(controller.credential("default/db/db-1"));
    let tls =
        TlsAcceptor::from(identity.server_config(ClientAuth::Required, ExpectedPeer::Any, &[b"weft/1"]));
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
    let mut records = 0;
    for order in ORDERS {
        // Which one it is that does not end.
        eprintln!("{order:?}");
        let expected = directly(order).await;
        let mut client = web.connect("default/db", 5432).await;
        let socket = timeout(LIMIT, accepted.recv()).await.unwrap().unwrap();
        let tls = tls.accept(BufStream::with_capacity(1 << 16, 1 << 16, socket)).await.unwrap();
        let mut tls = TlsStream::from(tls);
        if reused {
            opened(&mut tls).await;
            let mut peer = Tunnel(Some(tls));
            play(client, &mut peer, &[Ends, AppHears, AppEnds, Hears]).await;
            tls = peer.0.unwrap();
            records += 1;
            wait_until("the tunnel is free", LIMIT, async || web.records().len() == records).await;
            client = web.connect("default/db", 5432).await;
        }
        opened(&mut tls).await;
        let found = play(client, &mut Tunnel(Some(tls)), order).await;
        assert_eq!(found, expected, "{order:?}");
        records += 1;
        wait_until("a record", LIMIT, async || web.records().len() == records).await;
        assert_eq!(web.records().pop().unwrap()["tunnel_reused"], reused, "{order:?}");
    }
}

/// Takes the stream that is asked for.
async fn opened(tls: &mut Tls) {
    assert!(timeout(LIMIT, tunnel::read(tls)).await.expect("an OPEN").unwrap().open.is_some());
    tunnel::write(tls, &Frame { opened: Some(Opened {}), ..Frame::default() }).await.unwrap();
}

#[tokio::test]
async fn a_server_hears_of_a_tunnel_s_end_as_of_tcp_s() {
    as_client(false).await;
}

#[tokio::test]
async fn a_server_hears_of_a_used_tunnel_s_end_as_of_tcp_s() {
    as_client(true).await;
}

#[tokio::test]
async fn a_client_hears_of_a_tunnel_s_end_as_of_tcp_s() {
    as_server(false).await;
}

#[tokio::test]
async fn a_client_hears_of_a_used_tunnel_s_end_as_of_tcp_s() {
    as_server(true).await;
}
