//! How simulated sidecars read what they are sent: as fast as it comes, or as a machine does that is stuck.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};
use weft_client::Way;

/// How often one that is slow reads, or looks whether its connection is still there.
const EVERY: Duration = Duration::from_secs(1);
/// What may have come and not be read on a slow one's connection. As little as the system permits, so that it is full soon.
const RECEIVE_BUFFER_BYTES: u32 = 1 << 10;

/// How a fleet's sidecars read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reading {
    /// As fast as it comes.
    #[default]
    Freely,
    /// Once held back ([`Fleet::hold_back`](crate::Fleet::hold_back)), one byte a second.
    Slowly,
    /// Once held back, nothing.
    Never,
}

/// A fleet's reading.
#[derive(Debug)]
pub(crate) struct Reader {
    reading: Reading,
    held_back: AtomicBool,
}

impl Reader {
    pub(crate) const fn new(reading: Reading) -> Self {
        Self { reading, held_back: AtomicBool::new(false) }
    }

    pub(crate) fn hold_back(&self) {
        self.held_back.store(true, Ordering::Relaxed);
    }

    /// How connections of such a fleet are made.
    pub(crate) fn way(&self) -> Way {
        match self.reading {
            Reading::Freely => Way::default(),
            Reading::Slowly | Reading::Never => {
                Way { receive_buffer_bytes: Some(RECEIVE_BUFFER_BYTES), is_patient: true, ..Way::default() }
            }
        }
    }
}

/// A connection that is read so.
#[derive(Debug)]
pub(crate) struct Read {
    stream: TcpStream,
    reader: Arc<Reader>,
    /// Whether whoever reads has what it came for: only then it is slow.
    settled: Arc<AtomicBool>,
    next: Option<Pin<Box<Sleep>>>,
}

impl Read {
    pub(crate) const fn new(stream: TcpStream, reader: Arc<Reader>, settled: Arc<AtomicBool>) -> Self {
        Self { stream, reader, settled, next: None }
    }

    fn reading(&self) -> Reading {
        let held_back = self.reader.held_back.load(Ordering::Relaxed) && self.settled.load(Ordering::Relaxed);
        if held_back { self.reader.reading } else { Reading::Freely }
    }

    /// Whether the other end, or the system, has given the connection up, which is to be noticed without reading.
    fn is_over(&self, cx: &mut Context<'_>) -> bool {
        let ready = std::pin::pin!(self.stream.ready(tokio::io::Interest::READABLE));
        matches!(ready.poll(cx), Poll::Ready(Ok(ready)) if ready.is_read_closed())
    }
}

impl AsyncRead for Read {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let reading = self.reading();
        if reading == Reading::Freely {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        loop {
            let next = self.next.get_or_insert_with(|| Box::pin(sleep(EVERY)));
            std::task::ready!(next.as_mut().poll(cx));
            self.next = None;
            if self.is_over(cx) {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
            if reading == Reading::Slowly {
                let mut byte = [0];
                let mut one = ReadBuf::new(&mut byte);
                if Pin::new(&mut self.stream).poll_read(cx, &mut one)?.is_ready() {
                    buffer.put_slice(one.filled());
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for Read {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
