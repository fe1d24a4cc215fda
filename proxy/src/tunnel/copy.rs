//! Moving a stream's bytes between an application's connection and a tunnel, until both directions ended.
//!
//! Invariants (I9): bytes leave in the order in which they came, none twice, none invented; an end of stream is passed on
//! after every byte before it, and the other direction goes on; if one connection breaks, the other is broken too, never
//! ended cleanly (the caller resets what is left). One task polls both directions, so no lock and no channel lies
//! between them.
//!
//! No buffer is held while a connection is idle: bytes are read into a buffer that all connections of a thread share, sealed or
//! opened where they lie, and written on at once. Only what the receiver does not take is kept, at most a buffer's worth
//! for each direction; the rest waits in the sender's socket.

use super::Tunnel;
use super::frame::{FrameError, HEADER as FRAME_HEADER, Head, Kind};
use crate::tls::handshake::broken;
use crate::tls::record::{self, CONTENT_MAX, Opened, RECORD_MAX, TRAILER};
use std::array;
use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::rustls::Error;

/// Bytes of the application in one record: a DATA frame that fills it but for the room of an END behind it.
const DATA_MAX: usize = CONTENT_MAX - 2 * FRAME_HEADER;

/// Where the application's bytes begin in a record that is to be sealed.
const DATA_AT: usize = record::HEADER + FRAME_HEADER;

/// A full record. Records lie one behind the other in the buffer, so that they are sent in one call.
const STRIDE: usize = DATA_AT + DATA_MAX + TRAILER;

/// Records that are sealed at once when there is much to send, so that a system call moves much.
const RECORDS: usize = 8;

/// Moves of one direction before others of the thread get their turn.
const MOVES_MAX: usize = 8;

/// Pieces that one system call writes: a full buffer of a sidecar's records has fewer.
const SLICES_MAX: usize = 16;

/// What all connections of a thread read into.
struct Scratch {
    bytes: Box<[u8]>,
    /// Where opened bytes of the application lie.
    pieces: Vec<Range<usize>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        // Room for an END behind the last record, and for a record that came in part to become whole.
        bytes: vec![0; RECORDS * STRIDE + RECORD_MAX].into_boxed_slice(),
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
    fn count(&self, from: Side, bytes: u64, started: Instant) {
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
    const fn other(self) -> Self {
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
    app: &mut TcpStream,
    app_is: Side,
    tunnel: &mut Tunnel,
    counters: &Counters,
    started: Instant,
) -> Ended {
    let mut sending = Sending::default();
    let mut receiving = Receiving::default();
    let mut first = None;
    let count_sent = |bytes: usize| counters.count(app_is, bytes as u64, started);
    let count_received = |bytes: usize| counters.count(app_is.other(), bytes as u64, started);
    poll_fn(|cx| {
        let sent = match sending.poll(cx, app, tunnel, count_sent) {
            Poll::Ready(Err(fault)) => return Poll::Ready(fault.ended(app_is, app_is.other())),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        let received = match receiving.poll(cx, app, tunnel, sent, count_received) {
            Poll::Ready(Err(fault)) => return Poll::Ready(fault.ended(app_is.other(), app_is)),
            Poll::Ready(Ok(())) => true,
            Poll::Pending => false,
        };
        if first.is_none() {
            first = if sending.stage != Stage::Open {
                Some(app_is)
            } else {
                (receiving.stage != Stage::Open).then_some(app_is.other())
            };
            if first.is_some() {
                counters.set_half_open();
            }
        }
        if sent && received { Poll::Ready(Ended::Cleanly(first.unwrap_or(app_is))) } else { Poll::Pending }
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

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Open,
    /// The sender ended; the receiver is to be told after what is held.
    Ending,
    Ended,
}

/// From the application into the tunnel.
#[derive(Default)]
struct Sending {
    stage: Stage,
    /// The last read filled a whole record: there is much, and the next read takes many.
    bulk: bool,
}

impl Sending {
    /// Moves what can be moved. Ready when the end was passed on.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        app: &mut TcpStream,
        tunnel: &mut Tunnel,
        count: impl Fn(usize),
    ) -> Poll<Result<(), Fault>> {
        for _ in 0..MOVES_MAX {
            if let Some(record) = tunnel.session.due().map_err(writing)? {
                tunnel.unsent.extend_from_slice(&record);
            }
            ready!(tunnel.poll_flush(cx)).map_err(Fault::Writing)?;
            if self.stage != Stage::Open {
                self.stage = Stage::Ended;
                return Poll::Ready(Ok(()));
            }
            ready!(SCRATCH.with_borrow_mut(|scratch| self.poll_move(
                cx,
                app,
                tunnel,
                &mut scratch.bytes,
                &count
            )))?;
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads what there is, up to the buffer's size, seals it and sends it.
    fn poll_move(
        &mut self,
        cx: &mut Context<'_>,
        app: &mut TcpStream,
        tunnel: &mut Tunnel,
        scratch: &mut [u8],
        count: impl Fn(usize),
    ) -> Poll<Result<(), Fault>> {
        let bytes = if self.bulk {
            ready!(self.poll_read_many(cx, app, scratch))
        } else {
            ready!(self.poll_read(cx, app, &mut scratch[DATA_AT..DATA_AT + DATA_MAX]))
        };
        let bytes = bytes.map_err(Fault::Reading)?;
        self.bulk = bytes >= DATA_MAX;
        count(bytes);

        let mut sealed = 0;
        let mut left = bytes;
        while left > 0 || (sealed == 0 && self.stage == Stage::Ending) {
            let data = left.min(DATA_MAX);
            left -= data;
            let mut content = record::HEADER;
            let mut head = |scratch: &mut [u8], head: Head, behind: usize| {
                scratch[sealed + content..][..FRAME_HEADER].copy_from_slice(&head.encode());
                content += FRAME_HEADER + behind;
            };
            if data > 0 {
                head(scratch, Head::data(data), data);
            }
            if left == 0 && self.stage == Stage::Ending {
                head(scratch, Head::END, 0);
            }
            let record = &mut scratch[sealed..][..content + TRAILER];
            tunnel.session.seal(record).map_err(writing)?;
            sealed += record.len();
        }

        let mut sent = 0;
        while sent < sealed {
            match Pin::new(&mut tunnel.socket).poll_write(cx, &scratch[sent..sealed]) {
                Poll::Ready(Ok(0)) => {
                    return Poll::Ready(Err(Fault::Writing(io::ErrorKind::WriteZero.into())));
                }
                Poll::Ready(Ok(taken)) => sent += taken,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Fault::Writing(error))),
                Poll::Pending => {
                    tunnel.unsent.extend_from_slice(&scratch[sent..sealed]);
                    break;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads what fits into one record, and the end if it is there already.
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        app: &mut TcpStream,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(into);
        while buffer.remaining() > 0 {
            let before = buffer.filled().len();
            match Pin::new(&mut *app).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if buffer.filled().len() == before => {
                    self.stage = Stage::Ending;
                    break;
                }
                Poll::Ready(Ok(())) => {}
                // What was read before the failure is not passed on: the receiver's connection is reset anyway.
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending if before == 0 => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Reads into many records by one call.
    fn poll_read_many(
        &mut self,
        cx: &mut Context<'_>,
        app: &TcpStream,
        scratch: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut records = scratch.chunks_exact_mut(STRIDE);
        let mut slices: [_; RECORDS] = array::from_fn(|_| {
            let record = records.next().and_then(|record| record.get_mut(DATA_AT..DATA_AT + DATA_MAX));
            IoSliceMut::new(record.unwrap_or_default())
        });
        loop {
            ready!(app.poll_read_ready(cx))?;
            match app.try_read_vectored(&mut slices) {
                Ok(0) => {
                    self.stage = Stage::Ending;
                    return Poll::Ready(Ok(0));
                }
                Ok(bytes) => {
                    if bytes < RECORDS * DATA_MAX {
                        // The kernel has no more: it need not be asked again before it says so.
                        let empty = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
                        let _ = app.try_io(Interest::READABLE, empty);
                    }
                    return Poll::Ready(Ok(bytes));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

/// From the tunnel to the application.
#[derive(Default)]
struct Receiving {
    stage: Stage,
    /// What the application did not take yet, from `given` on.
    held: Vec<u8>,
    given: usize,
    /// The beginning of a frame's head.
    head: [u8; FRAME_HEADER],
    head_bytes: usize,
    /// Bytes of the DATA frame that are still to come.
    data: usize,
}

impl Receiving {
    /// Moves what can be moved. Ready when the end was passed on; the `last` thing to do is left to who closes the connection.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        app: &mut TcpStream,
        tunnel: &mut Tunnel,
        last: bool,
        count: impl Fn(usize),
    ) -> Poll<Result<(), Fault>> {
        for _ in 0..MOVES_MAX {
            ready!(self.poll_held(cx, app)).map_err(Fault::Writing)?;
            if self.stage == Stage::Ending {
                // If nothing comes from the application any more, its connection is closed next, which says the same.
                if !last {
                    ready!(Pin::new(&mut *app).poll_shutdown(cx)).map_err(Fault::Writing)?;
                }
                self.stage = Stage::Ended;
            }
            if self.stage == Stage::Ended {
                return Poll::Ready(Ok(()));
            }
            ready!(SCRATCH.with_borrow_mut(|scratch| self.poll_move(cx, app, tunnel, scratch, &count)))?;
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Gives the application what is held for it.
    fn poll_held(&mut self, cx: &mut Context<'_>, app: &mut TcpStream) -> Poll<io::Result<()>> {
        while self.given < self.held.len() {
            let taken = ready!(Pin::new(&mut *app).poll_write(cx, &self.held[self.given..]))?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.given += taken;
        }
        // Its memory is given back: the connection may be idle for hours.
        self.held = Vec::new();
        self.given = 0;
        Poll::Ready(Ok(()))
    }

    /// Reads what there is, up to the buffer's size, opens it and gives it to the application.
    fn poll_move(
        &mut self,
        cx: &mut Context<'_>,
        app: &mut TcpStream,
        tunnel: &mut Tunnel,
        scratch: &mut Scratch,
        count: impl Fn(usize),
    ) -> Poll<Result<(), Fault>> {
        let Scratch { bytes, pieces } = scratch;
        pieces.clear();
        if tunnel.plain.is_empty() {
            let filled = ready!(poll_fill(cx, tunnel, bytes)).map_err(Fault::Reading)?;
            self.open(tunnel, bytes, filled, pieces).map_err(Fault::Reading)?;
        } else {
            // Opened together with what came before the stream.
            let plain = std::mem::take(&mut tunnel.plain);
            bytes[..plain.len()].copy_from_slice(&plain);
            let end = self.unframe(bytes, 0..plain.len(), pieces).map_err(reading)?;
            tunnel.plain = plain[end..].to_vec();
        }
        count(pieces.iter().map(Range::len).sum());
        self.give(cx, app, bytes, pieces)
    }

    /// Opens the records in `bytes[..filled]`, up to the end of the stream.
    fn open(
        &mut self,
        tunnel: &mut Tunnel,
        bytes: &mut [u8],
        filled: usize,
        pieces: &mut Vec<Range<usize>>,
    ) -> io::Result<()> {
        let mut at = 0;
        while self.stage == Stage::Open
            && let Some(length) = record::length(&bytes[at..filled]).map_err(broken)?
            && at + length <= filled
        {
            match tunnel.session.open(&mut bytes[at..at + length]).map_err(broken)? {
                Opened::Data(content) => {
                    let content = at + content.start..at + content.end;
                    let end = self.unframe(bytes, content.clone(), pieces).map_err(malformed)?;
                    tunnel.plain.extend_from_slice(&bytes[end..content.end]);
                }
                Opened::Closed => return Err(io::ErrorKind::UnexpectedEof.into()),
                Opened::Nothing => {}
            }
            at += length;
        }
        tunnel.received = bytes[at..filled].to_vec();
        Ok(())
    }

    /// Finds the application's bytes among frames. Returns where the stream ends, or the end of `content`.
    fn unframe(
        &mut self,
        bytes: &[u8],
        content: Range<usize>,
        pieces: &mut Vec<Range<usize>>,
    ) -> Result<usize, FrameError> {
        let mut at = content.start;
        while at < content.end {
            if self.data > 0 {
                let here = self.data.min(content.end - at);
                pieces.push(at..at + here);
                self.data -= here;
                at += here;
                continue;
            }
            let here = (FRAME_HEADER - self.head_bytes).min(content.end - at);
            self.head[self.head_bytes..][..here].copy_from_slice(&bytes[at..at + here]);
            self.head_bytes += here;
            at += here;
            if self.head_bytes < FRAME_HEADER {
                break;
            }
            self.head_bytes = 0;
            let Head { kind, length } = Head::decode(self.head)?;
            match kind {
                Kind::Data => self.data = length,
                Kind::End => {
                    self.stage = Stage::Ending;
                    break;
                }
                Kind::Message(_) => return Err(FrameError::Message),
            }
        }
        Ok(at)
    }

    /// Writes the pieces, and keeps what is not taken.
    fn give(
        &mut self,
        cx: &mut Context<'_>,
        app: &mut TcpStream,
        bytes: &[u8],
        pieces: &[Range<usize>],
    ) -> Poll<Result<(), Fault>> {
        let mut rest = pieces;
        // Of the first piece.
        let mut given = 0;
        while !rest.is_empty() {
            let slices: [_; SLICES_MAX] = array::from_fn(|index| {
                let skipped = if index == 0 { given } else { 0 };
                IoSlice::new(rest.get(index).map_or(&[], |piece| &bytes[piece.start + skipped..piece.end]))
            });
            let count = rest.len().min(SLICES_MAX);
            let written = match &slices[..count] {
                [one] => Pin::new(&mut *app).poll_write(cx, one),
                many => Pin::new(&mut *app).poll_write_vectored(cx, many),
            };
            match written {
                Poll::Ready(Ok(0)) => {
                    return Poll::Ready(Err(Fault::Writing(io::ErrorKind::WriteZero.into())));
                }
                Poll::Ready(Ok(taken)) => given += taken,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Fault::Writing(error))),
                Poll::Pending => {
                    let left = rest.iter().enumerate().flat_map(|(index, piece)| {
                        &bytes[piece.start + if index == 0 { given } else { 0 }..piece.end]
                    });
                    self.held.extend(left);
                    break;
                }
            }
            while let Some(piece) = rest.first().filter(|piece| piece.len() <= given) {
                given -= piece.len();
                rest = &rest[1..];
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// Reads behind what came already, unless that has a whole record. Returns how many bytes lie in the buffer.
fn poll_fill(cx: &mut Context<'_>, tunnel: &mut Tunnel, bytes: &mut [u8]) -> Poll<io::Result<usize>> {
    let before = tunnel.received.len();
    bytes[..before].copy_from_slice(&tunnel.received);
    let whole = record::length(&bytes[..before]).map_err(broken)?.is_some_and(|length| length <= before);
    let mut filled = before;
    if !whole {
        let mut buffer = ReadBuf::new(&mut bytes[before..]);
        ready!(Pin::new(&mut tunnel.socket).poll_read(cx, &mut buffer))?;
        if buffer.filled().is_empty() {
            return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        filled += buffer.filled().len();
    }
    tunnel.received = Vec::new();
    Poll::Ready(Ok(filled))
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
