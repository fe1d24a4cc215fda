//! From the application into the tunnel.

use super::{DATA_MAX, Fault, MOVES_MAX, RECORDS, SCRATCH, Stage, data_at, stride, writing};
use crate::tls::record::{self, TRAILER};
use crate::tunnel::frame::{HEADER as FRAME_HEADER, Head};
use crate::tunnel::{Tunnel, nonblocking};
use std::array;
use std::io::{self, IoSliceMut};
use std::task::{Context, Poll, ready};
use tokio::net::TcpStream;

/// From the application into the tunnel.
#[derive(Default)]
pub(super) struct Sending {
    pub(super) stage: Stage,
    /// The last read filled a whole record: there is much, and the next read takes many.
    bulk: bool,
}

impl Sending {
    /// Moves what can be moved. Ready when the end was passed on.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        app: &TcpStream,
        tunnel: &mut Tunnel,
        count: impl Fn(usize),
    ) -> Poll<Result<(), Fault>> {
        for _ in 0..MOVES_MAX {
            ready!(tunnel.poll_flush(cx)).map_err(Fault::Writing)?;
            // Only once everything before it is sent, so that a peer that asks for one after the other and reads none gathers none.
            if let Some(record) = tunnel.session.due().map_err(writing)? {
                tunnel.unsent.extend_from_slice(&record);
                ready!(tunnel.poll_flush(cx)).map_err(Fault::Writing)?;
            }
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
        app: &TcpStream,
        tunnel: &mut Tunnel,
        scratch: &mut [u8],
        count: impl Fn(usize),
    ) -> Poll<Result<(), Fault>> {
        let framed = tunnel.framed;
        let bytes = if self.bulk {
            ready!(self.poll_read_many(cx, app, scratch, framed))
        } else {
            ready!(self.poll_read(cx, app, &mut scratch[data_at(framed)..][..DATA_MAX]))
        };
        let bytes = bytes.map_err(Fault::Reading)?;
        self.bulk = bytes >= DATA_MAX;
        count(bytes);

        let mut sealed = 0;
        let mut left = bytes;
        while left > 0 || (framed && sealed == 0 && self.stage == Stage::Ending) {
            let data = left.min(DATA_MAX);
            left -= data;
            let mut content = record::HEADER;
            let mut head = |scratch: &mut [u8], head: Head, behind: usize| {
                scratch[sealed + content..][..FRAME_HEADER].copy_from_slice(&head.encode());
                content += FRAME_HEADER + behind;
            };
            if framed {
                if data > 0 {
                    head(scratch, Head::data(data), data);
                }
                if left == 0 && self.stage == Stage::Ending {
                    head(scratch, Head::END, 0);
                }
            } else {
                content += data;
            }
            let record = &mut scratch[sealed..][..content + TRAILER];
            tunnel.session.seal(record).map_err(writing)?;
            sealed += record.len();
        }
        if !framed && self.stage == Stage::Ending {
            let closing = tunnel.session.close_notify().map_err(writing)?;
            scratch[sealed..][..closing.len()].copy_from_slice(&closing);
            sealed += closing.len();
        }

        let mut sent = 0;
        while sent < sealed {
            match nonblocking::poll_write(cx, &tunnel.socket, &scratch[sent..sealed]) {
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
        app: &TcpStream,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut filled = 0;
        while filled < into.len() {
            match nonblocking::poll_read(cx, app, &mut into[filled..]) {
                Poll::Ready(Ok(0)) => {
                    self.stage = Stage::Ending;
                    break;
                }
                Poll::Ready(Ok(bytes)) => filled += bytes,
                // What was read before the failure is not passed on: the receiver's connection is reset anyway.
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending if filled == 0 => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        Poll::Ready(Ok(filled))
    }

    /// Reads into many records by one call.
    fn poll_read_many(
        &mut self,
        cx: &mut Context<'_>,
        app: &TcpStream,
        scratch: &mut [u8],
        framed: bool,
    ) -> Poll<io::Result<usize>> {
        let at = data_at(framed);
        let mut records = scratch.chunks_exact_mut(stride(framed));
        let mut slices: [_; RECORDS] = array::from_fn(|_| {
            let record = records.next().and_then(|record| record.get_mut(at..at + DATA_MAX));
            IoSliceMut::new(record.unwrap_or_default())
        });
        let bytes = ready!(nonblocking::poll_read_vectored(cx, app, &mut slices))?;
        if bytes == 0 {
            self.stage = Stage::Ending;
        }
        Poll::Ready(Ok(bytes))
    }
}
