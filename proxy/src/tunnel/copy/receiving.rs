//! From the tunnel to the application.

use super::{Fault, MOVES_MAX, SCRATCH, Scratch, Stage, malformed, reading};
use crate::socket;
use crate::tls::handshake::broken;
use crate::tls::record::{self, Opened};
use crate::tunnel::frame::{FrameError, HEADER as FRAME_HEADER, Head, Kind};
use crate::tunnel::{Tunnel, nonblocking};
use std::array;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::task::{Context, Poll, ready};
use tokio::net::TcpStream;

/// Pieces that one system call writes: a full buffer of a sidecar's records has fewer.
const SLICES_MAX: usize = 16;

/// From the tunnel to the application.
#[derive(Default)]
pub(super) struct Receiving {
    pub(super) stage: Stage,
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
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        app: &TcpStream,
        tunnel: &mut Tunnel,
        last: bool,
        count: impl Fn(usize),
    ) -> Poll<Result<(), Fault>> {
        for _ in 0..MOVES_MAX {
            ready!(self.poll_held(cx, app)).map_err(Fault::Writing)?;
            if self.stage == Stage::Ending {
                // If nothing comes from the application any more, its connection is closed next, which says the same.
                if !last {
                    socket::end_sending(app).map_err(Fault::Writing)?;
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
    fn poll_held(&mut self, cx: &mut Context<'_>, app: &TcpStream) -> Poll<io::Result<()>> {
        while self.given < self.held.len() {
            self.given += ready!(nonblocking::poll_write(cx, app, &self.held[self.given..]))?;
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
        app: &TcpStream,
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
                    if !tunnel.framed {
                        pieces.push(content);
                        at += length;
                        continue;
                    }
                    let end = self.unframe(bytes, content.clone(), pieces).map_err(malformed)?;
                    tunnel.plain.extend_from_slice(&bytes[end..content.end]);
                }
                Opened::Closed if tunnel.framed => return Err(io::ErrorKind::UnexpectedEof.into()),
                Opened::Closed => self.stage = Stage::Ending,
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
        app: &TcpStream,
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
                [one] => nonblocking::poll_write(cx, app, one),
                many => nonblocking::poll_write_vectored(cx, app, many),
            };
            match written {
                Poll::Ready(Ok(taken)) => given += taken,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Fault::Writing(error))),
                Poll::Pending => {
                    self.held.reserve_exact(rest.iter().map(Range::len).sum::<usize>() - given);
                    for piece in rest {
                        self.held.extend_from_slice(&bytes[piece.start + given..piece.end]);
                        given = 0;
                    }
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
    let whole = record::length(&tunnel.received).map_err(broken)?.is_some_and(|length| length <= before);
    let mut filled = before;
    if !whole {
        filled += ready!(nonblocking::poll_read(cx, &tunnel.socket, &mut bytes[before..]))?;
        if filled == before {
            return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
        }
    }
    bytes[..before].copy_from_slice(&tunnel.received);
    tunnel.received = Vec::new();
    Poll::Ready(Ok(filled))
}

#[cfg(test)]
mod fuzz;
