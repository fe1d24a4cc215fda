//! How the two processes of an upgrade talk: one message at a time and an answer, each a length and JSON, some with sockets.
//!
//! Since the other side waits for an answer before it says more, sockets that come while a message is read are that message's.

use super::offers::Way;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Sockets that go with one message; the kernel takes up to 253.
pub(super) const SOCKETS_EACH: usize = 64;

/// Longest message: that of so many sockets is some 10 KiB.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// How long writing may take: what is said fits into the socket's buffer, unless the other side does not read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// What is said. The words are for ever: processes of other releases read them.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub(super) enum Message {
    /// A new process asks.
    Hello { speaks: Vec<u32>, release: String, instance: String },
    /// It gets so many sockets.
    Welcome { speaks: u32, release: String, sockets: usize },
    /// It does not.
    Refused { why: String },
    /// It waits for some more.
    Next,
    /// Here they are.
    Sockets { ways: Vec<Way> },
    /// It has everything, and accepts.
    Ready,
    /// It is the sidecar now; with the lock of the state directory.
    Yours { registered: Option<String> },
    /// It knows.
    Took,
}

/// See the module's documentation. Its calls block.
#[derive(Debug)]
pub(super) struct Wire(UnixStream);

impl Wire {
    pub(super) const fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    pub(super) const fn stream(&self) -> &UnixStream {
        &self.0
    }

    /// Says something.
    ///
    /// # Errors
    /// If the other side is gone or does not read.
    pub(super) fn say(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.0.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let body = serde_json::to_vec(message)?;
        let length = u32::try_from(body.len()).map_err(|_| io::ErrorKind::InvalidData)?;
        let bytes = [&length.to_be_bytes()[..], &body].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_EACH))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let sent = rustix::net::sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        // The sockets went with the first byte.
        (&self.0).write_all(&bytes[sent..])
    }

    /// What the other side says, and the sockets that it sends, within this time.
    ///
    /// # Errors
    /// If it is gone, says nothing, or says what is not understood.
    pub(super) fn hear(&mut self, limit: Duration) -> io::Result<(Message, Vec<OwnedFd>)> {
        self.0.set_read_timeout(Some(limit))?;
        self.read()
    }

    /// The same, however long it takes.
    ///
    /// # Errors
    /// If it is gone, or says what is not understood.
    pub(super) fn hear_whenever(&mut self) -> io::Result<(Message, Vec<OwnedFd>)> {
        self.0.set_read_timeout(None)?;
        self.read()
    }

    fn read(&mut self) -> io::Result<(Message, Vec<OwnedFd>)> {
        let mut fds = Vec::new();
        let mut length = [0; 4];
        self.fill(&mut length, &mut fds)?;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if length > MESSAGE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
        }
        let mut body = vec![0; length];
        self.fill(&mut body, &mut fds)?;
        Ok((serde_json::from_slice(&body)?, fds))
    }

    fn fill(&self, mut buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<()> {
        while !buffer.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_EACH))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = rustix::net::recvmsg(
                &self.0,
                &mut [IoSliceMut::new(buffer)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            );
            let read = match received {
                Ok(received) => received.bytes,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(sent) = message {
                    fds.extend(sent);
                }
            }
            if fds.len() > SOCKETS_EACH {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "too many sockets at once"));
            }
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffer = &mut buffer[read..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;
    use std::os::fd::AsFd;

    const LIMIT: Duration = Duration::from_secs(10);

    fn pair() -> (Wire, Wire) {
        let (one, other) = UnixStream::pair().unwrap();
        (Wire::new(one), Wire::new(other))
    }

    #[test]
    fn a_socket_arrives_with_its_message_and_is_the_same() {
        let (mut old, mut new) = pair();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let way = Way { purpose: "inbound".to_owned(), asked: address };
        old.say(&Message::Sockets { ways: vec![way.clone()] }, &[listener.as_fd()]).unwrap();
        drop(listener);
        let (Message::Sockets { ways }, mut fds) = new.hear(LIMIT).unwrap() else { panic!("no sockets") };
        assert_eq!(ways, [way]);
        let inherited = TcpListener::from(fds.pop().unwrap());
        assert_eq!(inherited.local_addr().unwrap(), address);
        let _client = std::net::TcpStream::connect(address).unwrap();
        assert!(inherited.accept().is_ok() && fds.is_empty());
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for bytes in [&b"\xff\xff\xff\xff"[..], b"\0\0\0\x02{}", b"\0\0\0\x0e{\"say\":\"dance\"", b"\0\0"] {
            let (old, mut new) = pair();
            (&old.0).write_all(bytes).unwrap();
            drop(old);
            assert!(new.hear(LIMIT).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn silence_ends() {
        let (old, mut new) = pair();
        let error = new.hear(Duration::from_millis(10)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(new);
        assert_eq!((&old.0).read(&mut [0]).unwrap(), 0);
    }
}
