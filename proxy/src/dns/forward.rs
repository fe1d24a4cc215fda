//! Queries that are not the mesh's: asked of the machine's nameservers, and answered as they answer.
//!
//! The bytes go there and back as they came; only the id is another one on the way, drawn for each attempt. An answer counts if it comes
//! from the nameserver that was asked (the kernel drops others: each query has a connected socket, and so a port, of its
//! own), to this id, about this very question, letter by letter (RFC 5452). What does not is as if it had not come.

use super::answer::Question;
use super::{MESSAGE_MAX, read_message, write_message};
use resolv_conf::Config;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// Queries under way at once; each has a socket. At 20 ms each that is more than ten thousand a second.
const UNDER_WAY_MAX: usize = 256;

/// How long a nameserver may take; then the next one is asked. Resolvers give up after five seconds, so two are asked within that.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Nameservers that are used; as many as the C library takes.
const NAMESERVERS_MAX: usize = 3;

/// The port of nameservers in a file that knows no other.
const PORT: u16 = 53;

/// Answers to other questions that are passed over before a nameserver is given up: somebody is guessing.
const STRAY_MAX: usize = 32;

pub(super) struct Forwarder {
    upstreams: Vec<SocketAddr>,
    places: Arc<Semaphore>,
}

impl Forwarder {
    pub(super) fn new(upstreams: Vec<SocketAddr>) -> Self {
        Self { upstreams, places: Arc::new(Semaphore::new(UNDER_WAY_MAX)) }
    }

    /// Room for one more query, if there is.
    pub(super) fn place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// The first nameserver's answer, none if none has one.
    pub(super) async fn by_udp(&self, question: &Question) -> Option<Vec<u8>> {
        self.ask(question, async |upstream, query| {
            let any: IpAddr =
                if upstream.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let socket = UdpSocket::bind((any, 0)).await?;
            socket.connect(upstream).await?;
            socket.send(query.bytes()).await?;
            for _ in 0..STRAY_MAX {
                // No room is kept for it before it is there.
                socket.readable().await?;
                let mut answer = vec![0; MESSAGE_MAX];
                match socket.try_recv(&mut answer) {
                    Ok(length) => answer.truncate(length),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                    Err(error) => return Err(error),
                }
                if query.is_answered_by(&answer) {
                    return Ok(answer);
                }
            }
            Err(io::ErrorKind::InvalidData.into())
        })
        .await
    }

    /// The same over TCP.
    pub(super) async fn by_tcp(&self, question: &Question) -> Option<Vec<u8>> {
        self.ask(question, async |upstream, query| {
            let mut stream = TcpStream::connect(upstream).await?;
            write_message(&mut stream, query.bytes()).await?;
            let answer = read_message(&mut stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
            if query.is_answered_by(&answer) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
        })
        .await
    }

    async fn ask(
        &self,
        question: &Question,
        ask: impl AsyncFn(SocketAddr, &Attempt) -> io::Result<Vec<u8>>,
    ) -> Option<Vec<u8>> {
        for upstream in &self.upstreams {
            let attempt = Attempt::new(question);
            match timeout(ANSWER_TIMEOUT, ask(*upstream, &attempt)).await {
                Ok(Ok(answer)) => return Some(attempt.restored(answer)),
                Ok(Err(error)) => tracing::debug!(%upstream, %error, "a nameserver does not answer"),
                Err(_) => tracing::debug!(%upstream, "no answer from a nameserver within {ANSWER_TIMEOUT:?}"),
            }
        }
        None
    }
}

/// A query as it is sent once: with an id of its own.
struct Attempt {
    bytes: Vec<u8>,
    end: usize,
    original: [u8; 2],
}

impl Attempt {
    fn new(question: &Question) -> Self {
        let mut bytes = question.message.clone();
        let original = [bytes[0], bytes[1]];
        bytes[..2].copy_from_slice(&rand::random::<u16>().to_be_bytes());
        Self { bytes, end: question.end, original }
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Same id, a response, one question, and that very one.
    fn is_answered_by(&self, answer: &[u8]) -> bool {
        const RESPONSE: u8 = 0x80;
        const HEADER: usize = 12;
        answer.len() >= self.end
            && answer[..2] == self.bytes[..2]
            && answer[2] & RESPONSE != 0
            && answer[4..6] == self.bytes[4..6]
            && answer[HEADER..self.end] == self.bytes[HEADER..self.end]
    }

    fn restored(&self, mut answer: Vec<u8>) -> Vec<u8> {
        answer[..2].copy_from_slice(&self.original);
        answer
    }
}

/// The nameservers of a resolver's configuration but for the responder itself, at most [`NAMESERVERS_MAX`].
pub(super) fn nameservers(path: &Path, own: SocketAddr) -> io::Result<Vec<SocketAddr>> {
    let text = std::fs::read(path)?;
    let config = Config::parse(text).map_err(io::Error::other)?;
    let addresses = config.nameservers.iter().map(|address| SocketAddr::new(address.into(), PORT));
    Ok(addresses.filter(|address| *address != own).take(NAMESERVERS_MAX).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_nameservers_are_used_and_never_the_responder_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let text = "search example.org\nnameserver 127.0.0.54\nnameserver 192.0.2.1\nnameserver 2001:db8::1\n\
                    nameserver 192.0.2.2\nnameserver 192.0.2.3\noptions ndots:2\n";
        std::fs::write(&path, text).unwrap();
        let own = "127.0.0.54:53".parse().unwrap();
        let found: Vec<_> = nameservers(&path, own).unwrap().iter().map(SocketAddr::to_string).collect();
        assert_eq!(found, ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.2:53"]);
        assert!(nameservers(&dir.path().join("absent"), own).is_err());
    }
}
