//! Moving bytes between two plain connections until both directions ended.
//!
//! What holds for tunnels ([`crate::tunnel::copy`]) holds here: order, nothing twice, an end of stream passed on after every byte before
//! it while the other direction goes on, and a connection that breaks breaks the other (the caller resets what is left). One task
//! polls both directions.
//!
//! The first [`SPLICE_AFTER`] bytes of a direction are copied through a buffer that the connections of a thread share; what comes
//! after them is a bulk of data, and the kernel moves it from socket to socket (`splice`) without it ever being here. That takes a pipe for
//! each direction; if there are [`PIPES_MAX`] already, or the kernel will not, copying goes on. Nothing is held while nothing moves, but
//! for the pipe.

use crate::socket;
use crate::tunnel::copy::{Counters, Ended, Fault, Side, Stage};
use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, splice};
use nix::unistd::pipe2;
use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// Copied before it is worth a pipe, which costs as much as some copies.
const SPLICE_AFTER: u64 = 64 * 1024;

/// What one call copies.
const COPY_BYTES: usize = 64 * 1024;

/// What one call moves into a pipe: what a pipe holds, unless somebody made it larger.
const PIPE_BYTES: usize = 64 * 1024;

/// Pipes at once, in the whole process: two descriptors each, and 32 MiB in the kernel if all are full. It gives a user 64.
const PIPES_MAX: usize = 512;

/// Moves of one direction before others of the thread get their turn.
const MOVES_MAX: usize = 8;

static PIPES: Semaphore = Semaphore::const_new(PIPES_MAX);

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; COPY_BYTES].into_boxed_slice());
}

/// Copies both directions until they ended or one connection breaks. `started` is when the connection was opened.
pub(super) async fn copy(
    app: &TcpStream,
    upstream: &TcpStream,
    counters: &Counters,
    started: Instant,
) -> Ended {
    let mut up = Flow::new(app, upstream);
    let mut down = Flow::new(upstream, app);
    let mut first = None;
    poll_fn(|cx| {
        let sent = match up.poll(cx, |bytes| counters.count(Side::Downstream, bytes, started)) {
            Poll::Ready(Err(fault)) => return Poll::Ready(fault.ended(Side::Downstream)),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        let received = match down.poll(cx, |bytes| counters.count(Side::Upstream, bytes, started)) {
            Poll::Ready(Err(fault)) => return Poll::Ready(fault.ended(Side::Upstream)),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        if first.is_none() {
            first = match (up.stage, down.stage) {
                (Stage::Open, Stage::Open) => None,
                (Stage::Open, _) => Some(Side::Upstream),
                _ => Some(Side::Downstream),
            };
        }
        if sent && received {
            Poll::Ready(Ended::Cleanly(first.unwrap_or(Side::Downstream)))
        } else {
            Poll::Pending
        }
    })
    .await
}

/// How bytes get across.
enum Way {
    /// With what the receiver did not take yet.
    Copied { held: Vec<u8>, sent: usize },
    /// With how much is in the pipe.
    Spliced { pipe: Pipe, inside: usize },
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    _place: SemaphorePermit<'static>,
}

impl Pipe {
    /// None if there are too many, in this process or on the machine.
    fn new() -> Option<Self> {
        let place = PIPES.try_acquire().ok()?;
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).ok()?;
        Some(Self { read, write, _place: place })
    }
}

/// A wait for a connection's breaking, as a box: most connections need none.
type Breaking<'a> = Pin<Box<dyn Future<Output = io::Result<tokio::io::Ready>> + Send + 'a>>;

/// One direction.
struct Flow<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    stage: Stage,
    way: Way,
    moved: u64,
    may_splice: bool,
    /// Once the sender ended, nothing is read from it that would tell that it broke after all.
    breaking: Option<Breaking<'a>>,
}

impl<'a> Flow<'a> {
    fn new(from: &'a TcpStream, to: &'a TcpStream) -> Self {
        let way = Way::Copied { held: Vec::new(), sent: 0 };
        Self { from, to, stage: Stage::Open, way, moved: 0, may_splice: true, breaking: None }
    }

    /// Moves what can be moved. Ready when the end was passed on.
    fn poll(&mut self, cx: &mut Context<'_>, count: impl Fn(u64)) -> Poll<Result<(), Fault>> {
        if let Some(breaking) = &mut self.breaking
            && breaking.as_mut().poll(cx).is_ready()
        {
            self.breaking = None;
            if let Ok(Some(error)) = self.from.take_error() {
                return Poll::Ready(Err(Fault::Reading(error)));
            }
        }
        for _ in 0..MOVES_MAX {
            ready!(self.flush(cx)).map_err(Fault::Writing)?;
            match self.stage {
                Stage::Ended => return Poll::Ready(Ok(())),
                Stage::Ending => {
                    socket::end_sending(self.to).map_err(Fault::Writing)?;
                    self.stage = Stage::Ended;
                    return Poll::Ready(Ok(()));
                }
                Stage::Open => {}
            }
            match ready!(self.fill(cx)).map_err(Fault::Reading)? {
                0 => {
                    self.stage = Stage::Ending;
                    let mut breaking: Breaking<'a> = Box::pin(self.from.ready(Interest::ERROR));
                    if breaking.as_mut().poll(cx).is_pending() {
                        self.breaking = Some(breaking);
                    }
                }
                bytes => {
                    count(bytes as u64);
                    self.moved += bytes as u64;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes some bytes from the sender; zero at its end.
    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.may_splice && self.moved >= SPLICE_AFTER && matches!(self.way, Way::Copied { .. }) {
            match Pipe::new() {
                Some(pipe) => self.way = Way::Spliced { pipe, inside: 0 },
                None => self.may_splice = false,
            }
        }
        loop {
            ready!(self.from.poll_read_ready(cx))?;
            let taken = match &mut self.way {
                Way::Copied { held, sent } => {
                    let taken = SCRATCH.with_borrow_mut(|scratch| {
                        let bytes = self.from.try_read(scratch)?;
                        held.extend_from_slice(written(self.to, &scratch[..bytes]));
                        Ok(bytes)
                    });
                    *sent = 0;
                    taken
                }
                Way::Spliced { pipe, inside } => {
                    let (from, to) = (self.from, &pipe.write);
                    let taken = self.from.try_io(Interest::READABLE, || moved(from, to, PIPE_BYTES));
                    *inside = taken.as_ref().map_or(0, |bytes| *bytes);
                    taken
                }
            };
            match taken {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) && self.spliced() => {
                    // Not between these two; nothing was moved.
                    self.may_splice = false;
                    self.way = Way::Copied { held: Vec::new(), sent: 0 };
                }
                done => return Poll::Ready(done),
            }
        }
    }

    const fn spliced(&self) -> bool {
        matches!(self.way, Way::Spliced { .. })
    }

    /// Gives the receiver what is held.
    fn flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let given = match &mut self.way {
                Way::Copied { held, sent } if *sent == held.len() => {
                    // Given back: an idle connection holds no buffer.
                    *held = Vec::new();
                    *sent = 0;
                    return Poll::Ready(Ok(()));
                }
                Way::Spliced { inside: 0, .. } => return Poll::Ready(Ok(())),
                Way::Copied { held, sent } => {
                    ready!(self.to.poll_write_ready(cx))?;
                    self.to.try_write(&held[*sent..]).map(|bytes| *sent += bytes)
                }
                Way::Spliced { pipe, inside } => {
                    ready!(self.to.poll_write_ready(cx))?;
                    let (from, to, bytes) = (&pipe.read, self.to, *inside);
                    let given = self.to.try_io(Interest::WRITABLE, || moved(from, to, bytes));
                    given.map(|bytes| *inside -= bytes)
                }
            };
            match given {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Poll::Ready(Err(error)),
                Ok(()) | Err(_) => {}
            }
        }
    }
}

/// Writes what the receiver takes at once, and returns the rest. An error shows again when that is flushed.
fn written<'b>(to: &TcpStream, bytes: &'b [u8]) -> &'b [u8] {
    &bytes[to.try_write(bytes).unwrap_or(0)..]
}

fn moved(from: &impl AsFd, to: &impl AsFd, bytes: usize) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    Ok(splice(from, None, to, None, bytes, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpSocket;
    use tokio::time::timeout;
    use tokio_util::task::{AbortOnDropHandle, TaskTracker};

    const LIMIT: Duration = Duration::from_secs(20);

    /// Two ends of a connection. Their buffers are small and stay so, so that both are often full and often empty.
    async fn pair() -> (TcpStream, TcpStream) {
        let socket = || {
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_send_buffer_size(64 * 1024).unwrap();
            socket.set_recv_buffer_size(64 * 1024).unwrap();
            socket
        };
        let listener = socket();
        listener.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = listener.listen(1).unwrap();
        let client = socket().connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    /// A client and a server with a copy between them, which ends as redirected connections do.
    async fn between() -> (TcpStream, TcpStream, AbortOnDropHandle<(Ended, u64, u64)>) {
        let ((client, app), (upstream, server)) = (pair().await, pair().await);
        let copied = TaskTracker::new().spawn(async move {
            socket::reset_on_drop(&app);
            socket::reset_on_drop(&upstream);
            let counters = Counters::default();
            let ended = copy(&app, &upstream, &counters, Instant::now()).await;
            if matches!(ended, Ended::Cleanly(_)) {
                socket::end_on_drop(&app);
                socket::end_on_drop(&upstream);
            }
            let load =
                |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
            (ended, load(&counters.up), load(&counters.down))
        });
        (client, server, AbortOnDropHandle::new(copied))
    }

    fn pattern(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|n| u8::try_from(n * 31 % 251).unwrap()).collect()
    }

    #[tokio::test]
    async fn every_byte_arrives_once_and_in_order_both_ways_at_once() {
        let (client, server, copied) = between().await;
        let sent = pattern(5_000_003);
        let (mut client_reads, mut client_writes) = client.into_split();
        let (mut server_reads, mut server_writes) = server.into_split();
        let (mut up, mut down) = (Vec::new(), Vec::new());
        let send = async |to: &mut tokio::net::tcp::OwnedWriteHalf, bytes: &[u8]| {
            to.write_all(bytes).await.unwrap();
            to.shutdown().await.unwrap();
        };
        let all = async {
            tokio::join!(
                send(&mut client_writes, &sent),
                send(&mut server_writes, &sent[1..]),
                async { server_reads.read_to_end(&mut up).await.unwrap() },
                async { client_reads.read_to_end(&mut down).await.unwrap() },
            )
        };
        timeout(LIMIT, all).await.unwrap();
        assert!(up == sent && down == sent[1..]);
        let (ended, up, down) = copied.await.unwrap();
        assert!(matches!(ended, Ended::Cleanly(_)), "{ended:?}");
        assert_eq!((up, down), (sent.len() as u64, sent.len() as u64 - 1));
    }

    #[tokio::test]
    async fn an_end_is_passed_on_while_the_other_direction_goes_on() {
        for bulk in [0, 1_000_000] {
            let (mut client, mut server, copied) = between().await;
            let sent = pattern(bulk);
            let mut got = Vec::new();
            timeout(LIMIT, async {
                tokio::join!(
                    async {
                        client.write_all(&sent).await.unwrap();
                        client.shutdown().await.unwrap();
                    },
                    server.read_to_end(&mut got)
                )
            })
            .await
            .unwrap()
            .1
            .unwrap();
            assert!(got == sent);
            server.write_all(b"still here").await.unwrap();
            drop(server);
            let mut answer = String::new();
            timeout(LIMIT, client.read_to_string(&mut answer)).await.unwrap().unwrap();
            assert_eq!(answer, "still here");
            assert!(matches!(copied.await.unwrap().0, Ended::Cleanly(Side::Downstream)));
        }
    }

    /// Writes until that is refused.
    async fn refused(stream: &mut TcpStream) -> io::Error {
        loop {
            if let Err(error) = stream.write_all(b"!").await {
                return error;
            }
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_reset_is_a_reset_at_the_other_end() {
        for half_closed in [false, true] {
            let (mut client, mut server, copied) = between().await;
            client.write_all(b"?").await.unwrap();
            server.read_u8().await.unwrap();
            if half_closed {
                client.shutdown().await.unwrap();
                assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
            }
            socket::reset_on_drop(&client);
            drop(client);
            let (ended, ..) = timeout(LIMIT, copied).await.expect("the end is noticed").unwrap();
            assert!(matches!(ended, Ended::Broken(Side::Downstream, _)), "{ended:?}");
            let error = timeout(LIMIT, refused(&mut server)).await.unwrap();
            assert!(
                matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe),
                "{error}"
            );
        }
    }

    #[tokio::test]
    async fn a_receiver_that_takes_nothing_holds_the_sender_up() {
        let (mut client, mut server, copied) = between().await;
        let sent = pattern(8_000_000);
        // Until no more goes in: the sockets' buffers and one pipe are all there is.
        let mut written = 0;
        while let Ok(bytes) = timeout(Duration::from_millis(300), client.write(&sent[written..])).await {
            written += bytes.unwrap();
            assert!(written < sent.len(), "nothing holds the sender up");
        }
        client.shutdown().await.unwrap();
        let mut got = Vec::new();
        timeout(LIMIT, server.read_to_end(&mut got)).await.unwrap().unwrap();
        assert!(got == sent[..written]);
        drop((client, server));
        assert!(matches!(copied.await.unwrap().0, Ended::Cleanly(Side::Downstream)));
    }
}
