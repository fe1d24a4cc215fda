//! Moving a stream's bytes between an application's connection and a tunnel, until both directions ended.
//!
//! Invariants (I9): bytes leave in the order in which they came, none twice, none invented; an end of stream is passed on
//! after every byte before it, and the other direction goes on; if one connection breaks, the other is broken too, never
//! ended cleanly (the caller resets what is left). One task polls both directions, so no lock and no channel lies
//! between them.
//!
//! No buffer is held while a connection is idle: bytes are read into a buffer that all connections of a thread share, sealed or
//! opened where they lie, and written on at once. Only what the receiver does not take is kept, at most a buffer's worth
//! for each direction, and what a peer sends behind the end of a stream, as much again; the rest waits in the sender's socket.

mod receiving;
mod sending;

use super::frame::{FrameError, HEADER as FRAME_HEADER};
use super::{Tunnel, nonblocking};
use crate::tls::handshake::{INPUT_MAX, broken};
use crate::tls::record::{self, CONTENT_MAX, RECORD_MAX, TRAILER};
use receiving::Receiving;
use sending::Sending;
use socket2::SockRef;
use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Poll, ready};
use std::time::Duration;
use tokio::io::{Interest, Ready};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::rustls::Error;

/// Bytes of the application in one record: a DATA frame that fills it but for the room of an END behind it.
const DATA_MAX: usize = CONTENT_MAX - 2 * FRAME_HEADER;

/// Where the application's bytes begin in a record that is to be sealed.
const fn data_at(framed: bool) -> usize {
    if framed { record::HEADER + FRAME_HEADER } else { record::HEADER }
}

/// A full record. Records lie one behind the other in the buffer, so that they are sent in one call.
const fn stride(framed: bool) -> usize {
    data_at(framed) + DATA_MAX + TRAILER
}

/// Records that are sealed at once when there is much to send, so that a system call moves much.
const RECORDS: usize = 8;

/// Moves of one direction before others of the thread get their turn.
const MOVES_MAX: usize = 8;

/// What all connections of a thread read into: the records that are sealed at once, an END behind the last one, and what came
/// before a stream, which is read outside of it.
const SCRATCH_BYTES: usize = RECORDS * stride(true) + RECORD_MAX;

// What is kept of a tunnel between two messages is copied here.
const _: () = assert!(SCRATCH_BYTES > 2 * RECORD_MAX && SCRATCH_BYTES > INPUT_MAX);

/// See [`SCRATCH_BYTES`].
struct Scratch {
    bytes: Box<[u8]>,
    /// Where opened bytes of the application lie. At most one for each five bytes, if a peer sends the smallest frames that there are.
    pieces: Vec<Range<usize>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        bytes: vec![0; SCRATCH_BYTES].into_boxed_slice(),
        pieces: Vec::new(),
    });
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
    /// One direction has ended.
    half_open: AtomicBool,
}

impl Counters {
    /// How long the upstream's first byte took; none if none came.
    pub(crate) fn first_byte(&self) -> Option<Duration> {
        self.first_byte.load(Ordering::Relaxed).checked_sub(1).map(Duration::from_micros)
    }

    /// Bytes of both directions.
    pub(crate) fn total(&self) -> u64 {
        self.up.load(Ordering::Relaxed).wrapping_add(self.down.load(Ordering::Relaxed))
    }

    /// Whether one direction has ended.
    pub(crate) fn half_open(&self) -> bool {
        self.half_open.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(crate) fn moved(&self, bytes: u64) {
        self.up.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn set_half_open(&self) {
        self.half_open.store(true, Ordering::Relaxed);
    }

    /// Bytes that came from a side.
    pub(crate) fn count(&self, from: Side, bytes: u64, started: Instant) {
        match from {
            Side::Downstream => {
                self.up.fetch_add(bytes, Ordering::Relaxed);
            }
            Side::Upstream => {
                if self.down.fetch_add(bytes, Ordering::Relaxed) == 0 && bytes > 0 {
                    let took = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX - 1);
                    self.first_byte.store(took + 1, Ordering::Relaxed);
                }
            }
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

impl Side {
    pub(crate) const fn other(self) -> Self {
        match self {
            Self::Downstream => Self::Upstream,
            Self::Upstream => Self::Downstream,
        }
    }
}

/// How copying ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Both directions ended cleanly; who ended first. The tunnel is free for the next stream.
    Cleanly(Side),
    /// One connection broke.
    Broken(Side, io::Error),
}

/// Copies both directions until they ended or one connection breaks. `app_is` says which side the application is,
/// `started` when the connection was opened.
pub(crate) async fn copy(
    app: &TcpStream,
    app_is: Side,
    tunnel: &mut Tunnel,
    counters: &Counters,
    started: Instant,
) -> Ended {
    let mut sending = Sending::default();
    let mut receiving = Receiving::default();
    let mut watch: Option<Watch<'_>> = None;
    let mut watch_client: Option<Watch<'static>> = None;
    let mut first = None;
    let count_sent = |bytes: usize| counters.count(app_is, bytes as u64, started);
    let count_received = |bytes: usize| counters.count(app_is.other(), bytes as u64, started);
    poll_fn(|cx| {
        let sent = match sending.poll(cx, app, tunnel, count_sent) {
            Poll::Ready(Err(fault)) => return Poll::Ready(fault.ended(app_is)),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        if first.is_none() && sending.stage != Stage::Open {
            first = Some(app_is);
            counters.set_half_open();
        }
        let received = match receiving.poll(cx, app, tunnel, sent, count_received) {
            Poll::Ready(Err(fault)) => return Poll::Ready(fault.ended(app_is.other())),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        if first.is_none() && receiving.stage != Stage::Open {
            first = Some(app_is.other());
            counters.set_half_open();
        }
        match (sent, received) {
            (true, true) => Poll::Ready(Ended::Cleanly(first.unwrap_or(app_is))),
            // Who has ended is not read any more, and may break all the same.
            (true, false) => {
                let watch = watch.get_or_insert_with(|| Box::pin(app.ready(Interest::ERROR)));
                let _ = ready!(watch.as_mut().poll(cx));
                let error = app.take_error().ok().flatten();
                let error = error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
                Poll::Ready(Ended::Broken(app_is, error))
            }
            // A standard client may close its half of the TCP connection too, and read on; or break.
            (false, true) if !tunnel.framed => {
                let watch = watch_client.get_or_insert_with(|| broken_connection(&tunnel.socket));
                let error = ready!(watch.as_mut().poll(cx)).err();
                let error = error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
                Poll::Ready(Ended::Broken(app_is.other(), error))
            }
            (false, true) => {
                // It may have come together with the END.
                if !(tunnel.received.is_empty() && tunnel.plain.is_empty()) {
                    return Poll::Ready(Ended::Broken(app_is.other(), malformed(FrameError::AfterEnd)));
                }
                let read = ready!(nonblocking::poll_read(cx, &tunnel.socket, &mut [0]));
                Poll::Ready(Ended::Broken(app_is.other(), after_end(read)))
            }
            (false, false) => Poll::Pending,
        }
    })
    .await
}

/// Waits until the application's connection breaks. Made only when one of its directions has ended.
type Watch<'a> = Pin<Box<dyn Future<Output = io::Result<Ready>> + Send + 'a>>;

/// Waits until a connection breaks, beside everything else that is done with it. If the system has no descriptor for that, writing finds it out.
fn broken_connection(socket: &TcpStream) -> Watch<'static> {
    let also = SockRef::from(socket).try_clone().map(std::net::TcpStream::from);
    let also = also.and_then(TcpStream::from_std);
    Box::pin(async move {
        let Ok(also) = also else { return std::future::pending().await };
        let ready = also.ready(Interest::ERROR).await;
        also.take_error()?.map_or(ready, Err)
    })
}

/// What is wrong with what came behind an END while the other direction goes on.
fn after_end(read: io::Result<usize>) -> io::Error {
    match read {
        Ok(0) => io::ErrorKind::UnexpectedEof.into(),
        Ok(_) => malformed(FrameError::AfterEnd),
        Err(error) => error,
    }
}

/// Which of a direction's two connections broke.
pub(crate) enum Fault {
    Reading(io::Error),
    Writing(io::Error),
}

impl Fault {
    /// How it ends a direction that goes from a side to the other one.
    pub(crate) fn ended(self, from: Side) -> Ended {
        match self {
            Self::Reading(error) => Ended::Broken(from, error),
            Self::Writing(error) => Ended::Broken(from.other(), error),
        }
    }
}

/// How far a direction is.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Stage {
    #[default]
    Open,
    /// The sender ended; the receiver is to be told after what is held.
    Ending,
    Ended,
}

fn malformed(error: FrameError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn reading(error: FrameError) -> Fault {
    Fault::Reading(malformed(error))
}

fn writing(error: Error) -> Fault {
    Fault::Writing(broken(error))
}
