//! Moving an application's bytes between two connections until both directions ended.
//!
//! Invariants (I9): bytes leave in the order in which they came, none twice, none invented; an end of stream is passed on
//! after every byte before it, and the other direction goes on; if one connection breaks, the other is broken too, never
//! ended cleanly (the caller resets what is left). One task polls both directions, so no lock and no channel lies
//! between them.
//!
//! No buffer is held while a connection is idle: bytes are read into a buffer that all connections of a thread share and
//! written on at once. Only what the receiver does not take is kept, at most [`SCRATCH_BYTES`] for each direction.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// Bytes read at once: four TLS records, so that a system call moves much. Also the most that is held for a receiver that
/// does not take it; the rest waits in the sender's socket.
const SCRATCH_BYTES: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice());
}

/// How much moved, readable while it moves.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Bytes from the downstream to the upstream.
    pub(crate) up: AtomicU64,
    /// Bytes from the upstream to the downstream.
    pub(crate) down: AtomicU64,
    /// Microseconds from the start to the first byte for the downstream, plus one; zero if there was none yet.
    first_byte: AtomicU64,
}

impl Counters {
    /// How long the upstream's first byte took; none if none came.
    pub(crate) fn first_byte(&self) -> Option<Duration> {
        self.first_byte.load(Ordering::Relaxed).checked_sub(1).map(Duration::from_micros)
    }

    fn count_down(&self, bytes: u64, started: Instant) {
        if self.down.fetch_add(bytes, Ordering::Relaxed) == 0 {
            let took = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX - 1);
            self.first_byte.store(took + 1, Ordering::Relaxed);
        }
    }
}

/// One end of a copied connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Who opened it.
    Downstream,
    /// Who serves it.
    Upstream,
}

/// How copying ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Both directions ended cleanly; who ended first.
    Cleanly(Side),
    /// One connection broke.
    Broken(Side, io::Error),
}

/// Copies both directions until they ended or one connection breaks. `started` is when the connection was opened.
pub(crate) async fn copy<D, U>(
    downstream: &mut D,
    upstream: &mut U,
    counters: &Counters,
    started: Instant,
) -> Ended
where
    D: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let mut up = Pipe::default();
    let mut down = Pipe::default();
    let mut first = None;
    let count_up = |bytes| {
        counters.up.fetch_add(bytes, Ordering::Relaxed);
    };
    let count_down = |bytes| counters.count_down(bytes, started);
    poll_fn(|cx| {
        let up_done = match up.poll(cx, downstream, upstream, count_up) {
            Poll::Ready(Err(fault)) => return Poll::Ready(fault.ended(Side::Downstream, Side::Upstream)),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        let down_done = match down.poll(cx, upstream, downstream, count_down) {
            Poll::Ready(Err(fault)) => return Poll::Ready(fault.ended(Side::Upstream, Side::Downstream)),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        if first.is_none() {
            first =
                if up.saw_end() { Some(Side::Downstream) } else { down.saw_end().then_some(Side::Upstream) };
        }
        if up_done && down_done {
            Poll::Ready(Ended::Cleanly(first.unwrap_or(Side::Downstream)))
        } else {
            Poll::Pending
        }
    })
    .await
}

/// Which of a direction's two connections broke.
enum Fault {
    Reading(io::Error),
    Writing(io::Error),
}

impl Fault {
    fn ended(self, from: Side, to: Side) -> Ended {
        match self {
            Self::Reading(error) => Ended::Broken(from, error),
            Self::Writing(error) => Ended::Broken(to, error),
        }
    }
}

/// One direction.
#[derive(Default)]
struct Pipe {
    /// What the receiver did not take yet, from `sent` on.
    held: Vec<u8>,
    sent: usize,
    /// Bytes may lie in the writer's own buffer.
    unflushed: bool,
    stage: Stage,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Open,
    /// The sender ended; the receiver is to be told after what is held.
    Ending,
    Ended,
}

impl Pipe {
    fn saw_end(&self) -> bool {
        self.stage != Stage::Open
    }

    /// Moves what can be moved. Ready when the end was passed on.
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        count: impl Fn(u64),
    ) -> Poll<Result<(), Fault>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            ready!(self.poll_held(cx, to)).map_err(Fault::Writing)?;
            match self.stage {
                Stage::Open => {}
                Stage::Ending => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(Fault::Writing)?;
                    self.stage = Stage::Ended;
                }
                Stage::Ended => return Poll::Ready(Ok(())),
            }
            if self.stage == Stage::Open {
                let moved = SCRATCH.with_borrow_mut(|scratch| self.poll_move(cx, from, to, scratch, &count));
                if moved?.is_pending() {
                    if self.unflushed && self.held.is_empty() {
                        ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(Fault::Writing)?;
                        self.unflushed = false;
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    /// Gives the receiver what is held for it.
    fn poll_held<W: AsyncWrite + Unpin>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>> {
        while self.sent < self.held.len() {
            let taken = ready!(Pin::new(&mut *to).poll_write(cx, &self.held[self.sent..]))?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += taken;
            self.unflushed = true;
        }
        // Its memory is given back: the connection may be idle for hours.
        self.held = Vec::new();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }

    /// Reads as much as there is, up to the buffer's size, and writes it. Pending if nothing could be read.
    fn poll_move<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        scratch: &mut [u8],
        count: impl Fn(u64),
    ) -> Result<Poll<()>, Fault>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut buffer = ReadBuf::new(scratch);
        // A TLS stream gives one record at a time; several make one write.
        while self.stage == Stage::Open && buffer.remaining() > 0 {
            let before = buffer.filled().len();
            match Pin::new(&mut *from).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if buffer.filled().len() == before => self.stage = Stage::Ending,
                Poll::Ready(Ok(())) => {}
                // What was read before the failure is not passed on: the receiver's connection is reset anyway.
                Poll::Ready(Err(error)) => return Err(Fault::Reading(error)),
                Poll::Pending if before == 0 => return Ok(Poll::Pending),
                Poll::Pending => break,
            }
        }
        let bytes = buffer.filled();
        count(bytes.len() as u64);
        let mut written = 0;
        while written < bytes.len() {
            match Pin::new(&mut *to).poll_write(cx, &bytes[written..]) {
                Poll::Ready(Ok(0)) => return Err(Fault::Writing(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(taken)) => {
                    written += taken;
                    self.unflushed = true;
                }
                Poll::Ready(Err(error)) => return Err(Fault::Writing(error)),
                Poll::Pending => break,
            }
        }
        self.held.extend_from_slice(&bytes[written..]);
        Ok(Poll::Ready(()))
    }
}
