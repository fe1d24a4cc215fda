//! The tunnel between two sidecars: mTLS with ALPN `weft/1`, and in it one stream of an application after the other. A stream
//! begins with OPEN and its answer ([`frame`]), carries bytes both ways ([`copy`]), and leaves the tunnel to the next one
//! if both directions ended cleanly ([`pool`]). The format is described in `docs/tunnel.md`.
//!
//! Invariant (I9): what belongs to a stream is in its frames. A direction ends with END and in no other way: a connection that
//! ends without it, however politely, broke. So nothing of a stream can be taken for another's, and nothing cut short for whole.
//!
//! A standard TLS client's connection ([`crate::inbound`]) is copied by the same code and is no tunnel: it carries one stream, without frames.

pub(crate) mod copy;
pub(crate) mod frame;
mod nonblocking;
pub(crate) mod pool;

use crate::tls::handshake::broken;
use crate::tls::record::{self, Opened, Session};
use frame::{Frame, FrameError, Head, Kind};
use std::io;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::rustls::AlertDescription;

/// What two sidecars agree to speak inside TLS.
pub(crate) const ALPN: &[u8] = b"weft/1";

/// How much is read at once while a message is expected: more than one has.
const READ_BYTES: usize = 2048;

/// How often what comes behind a fatal alert is read, a few KiB each: a client may have said that much before it heard.
const READS_AFTER_ALERT: usize = 32;

/// One end of a tunnel. Its buffers are empty, and hold no memory, while nothing is under way.
pub(crate) struct Tunnel {
    socket: TcpStream,
    session: Session,
    /// What came and is not opened yet: records, the last of them perhaps not whole.
    received: Vec<u8>,
    /// What is opened and belongs to what comes next.
    plain: Vec<u8>,
    /// What is sealed and the socket did not take yet, from `sent` on.
    unsent: Vec<u8>,
    sent: usize,
    /// What is inside is frames. If not, it is one stream of a standard client, whose directions end with the alert close_notify.
    framed: bool,
}

impl Tunnel {
    /// Over a connection whose handshake is done.
    pub(crate) fn new(socket: TcpStream, session: Session, received: Vec<u8>, unsent: Vec<u8>) -> Self {
        Self { socket, session, received, plain: Vec::new(), unsent, sent: 0, framed: true }
    }

    /// The same for a client that knows nothing of frames.
    pub(crate) fn unframed(socket: TcpStream, session: Session, received: Vec<u8>, unsent: Vec<u8>) -> Self {
        Self { framed: false, ..Self::new(socket, session, received, unsent) }
    }

    pub(crate) const fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Whether it lies between two streams and nothing has come: what came would be no answer to what is asked next, or
    /// the news that the other end closed it. If not, it is of no use any more.
    pub(crate) fn is_quiet(&self) -> bool {
        let nothing = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
        self.received.is_empty()
            && self.plain.is_empty()
            // Asks the kernel only if it has told that there is something.
            && self.socket.try_read(&mut [0]).is_err_and(|error| nothing(&error))
    }

    /// Sends a message, so that it is on its way when this returns.
    pub(crate) async fn write(&mut self, frame: &Frame) -> io::Result<()> {
        let bytes = frame.encode();
        let mut record = vec![0; record::HEADER + bytes.len() + record::TRAILER];
        record[record::HEADER..][..bytes.len()].copy_from_slice(&bytes);
        if let Some(before) = self.session.due().map_err(broken)? {
            self.unsent.extend_from_slice(&before);
        }
        self.session.seal(&mut record).map_err(broken)?;
        // With the end of the handshake, if that is still to be sent.
        self.unsent.extend_from_slice(&record);
        self.socket.write_all(&self.unsent[self.sent..]).await?;
        self.emptied();
        Ok(())
    }

    /// Reads the message that comes next. What follows it stays for the stream.
    pub(crate) async fn read(&mut self) -> Result<Frame, FrameError> {
        loop {
            if let Some((head, bytes)) = self.plain.split_first_chunk() {
                let Head { kind, length } = Head::decode(*head)?;
                let Kind::Message(kind) = kind else { return Err(FrameError::Data) };
                if let Some(message) = bytes.get(..length) {
                    let frame = Frame::decode(kind, message)?;
                    self.plain.drain(..frame::HEADER + length);
                    if self.plain.is_empty() {
                        self.plain = Vec::new();
                    }
                    return Ok(frame);
                }
            }
            self.open_next().await?;
        }
    }

    /// Breaks the session off, and tells why. What the peer has said meanwhile is taken and left, so that no reset overtakes the alert.
    pub(crate) async fn break_off(&mut self, description: AlertDescription) -> io::Result<()> {
        let alert = self.session.fatal_alert(description).map_err(broken)?;
        self.unsent.extend_from_slice(&alert);
        self.socket.write_all(&self.unsent[self.sent..]).await?;
        self.emptied();
        self.socket.shutdown().await?;
        let mut left = vec![0; READ_BYTES];
        for _ in 0..READS_AFTER_ALERT {
            if self.socket.read(&mut left).await? == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Opens the next record.
    async fn open_next(&mut self) -> io::Result<()> {
        loop {
            let length = record::length(&self.received).map_err(broken)?;
            let Some(length) = length.filter(|length| *length <= self.received.len()) else {
                self.received.reserve(READ_BYTES);
                match self.socket.read_buf(&mut self.received).await? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    _ => continue,
                }
            };
            let record = &mut self.received[..length];
            let opened = self.session.open(record).map_err(broken)?;
            let done = match opened {
                Opened::Data(bytes) => {
                    self.plain.extend_from_slice(&record[bytes]);
                    true
                }
                Opened::Closed => return Err(io::ErrorKind::UnexpectedEof.into()),
                Opened::Nothing => false,
            };
            self.received.drain(..length);
            if self.received.is_empty() {
                self.received = Vec::new();
            }
            if done {
                return Ok(());
            }
        }
    }

    /// Gives the socket what is sealed.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.unsent.len() {
            self.sent += ready!(nonblocking::poll_write(cx, &self.socket, &self.unsent[self.sent..]))?;
        }
        self.emptied();
        Poll::Ready(Ok(()))
    }

    /// Everything was sent; the memory is given back, since the tunnel may be idle for hours.
    fn emptied(&mut self) {
        self.unsent = Vec::new();
        self.sent = 0;
    }
}
