//! A TCP application of which both ends of every connection are in the test's hands.
//!
//! The client end goes to a sidecar's outbound address; the server end arrives at [`App`] from another sidecar, and
//! whatever lies between is what is tested. Connections begin with a tag, so that a sidecar's health probes, which send
//! nothing, and connections that are opened at once are told apart.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How long a connection through the mesh may take, its retries included.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// Who waits for the server end of which connection.
type Expected = Arc<Mutex<BTreeMap<u64, oneshot::Sender<TcpStream>>>>;

/// An application that listens on a loopback port of its own.
#[derive(Debug)]
pub struct App {
    address: SocketAddr,
    expected: Expected,
    next_tag: AtomicU64,
    _accepting: JoinSet<()>,
}

/// One connection through the mesh: what the client has in its hands, and what the server has.
#[derive(Debug)]
pub struct Pair {
    /// The end of who connected.
    pub client: TcpStream,
    /// The end of the application.
    pub server: TcpStream,
}

impl App {
    /// Starts to listen.
    ///
    /// # Errors
    ///
    /// No port is free.
    pub async fn listen() -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let expected = Expected::default();
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, Arc::clone(&expected)));
        Ok(Self { address, expected, next_tag: AtomicU64::new(1), _accepting: accepting })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connects to `outbound`, which is to lead here, and returns both ends.
    ///
    /// # Errors
    ///
    /// The connection is refused, or does not arrive here in time.
    pub async fn open(&self, outbound: SocketAddr) -> anyhow::Result<Pair> {
        let tag = self.next_tag.fetch_add(1, Ordering::Relaxed);
        let (arrived, arrival) = oneshot::channel();
        self.expected.lock().unwrap_or_else(PoisonError::into_inner).insert(tag, arrived);
        let opening = async {
            let mut client = TcpStream::connect(outbound).await.context("connecting failed")?;
            client.set_nodelay(true)?;
            client.write_all(&tag.to_be_bytes()).await.context("the connection was closed at once")?;
            let mut byte = [0];
            tokio::select! {
                server = arrival => Ok(Pair { server: server.context("the application stopped")?, client }),
                ended = client.peek(&mut byte) => match ended {
                    Ok(0) => bail!("the connection was closed before it reached the application"),
                    Ok(_) => bail!("somebody else than the application answered"),
                    Err(error) => Err(error).context("the connection was cut before it reached the application"),
                },
            }
        };
        let opened = timeout(OPEN_LIMIT, opening).await;
        self.expected.lock().unwrap_or_else(PoisonError::into_inner).remove(&tag);
        opened
            .with_context(|| format!("the connection did not arrive within {} s", OPEN_LIMIT.as_secs()))?
            .with_context(|| format!("a connection through {outbound}"))
    }
}

impl Pair {
    /// Sends a few bytes each way and back, to see that the connection lives.
    ///
    /// # Errors
    ///
    /// It does not, or the bytes changed.
    pub async fn ping(&mut self) -> anyhow::Result<()> {
        let there_and_back = async {
            for (from, to) in [(&mut self.client, &mut self.server)] {
                let mut word = [0; 4];
                from.write_all(b"ping").await?;
                to.read_exact(&mut word).await?;
                anyhow::ensure!(&word == b"ping", "other bytes arrived than were sent");
                to.write_all(b"pong").await?;
                from.read_exact(&mut word).await?;
                anyhow::ensure!(&word == b"pong", "other bytes came back than were sent");
            }
            Ok(())
        };
        timeout(OPEN_LIMIT, there_and_back).await.context("no answer on an open connection")?
    }
}

/// Hands each connection to who waits for its tag. One without a tag is a probe.
async fn accept(listener: TcpListener, expected: Expected) {
    let mut greeting = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((mut stream, _)) = accepted else { continue };
                let expected = Arc::clone(&expected);
                greeting.spawn(async move {
                    let mut tag = [0; 8];
                    if stream.set_nodelay(true).is_err() || stream.read_exact(&mut tag).await.is_err() {
                        return;
                    }
                    let waiting = expected
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .remove(&u64::from_be_bytes(tag));
                    if let Some(waiting) = waiting {
                        // Who waited may have given up.
                        let _ = waiting.send(stream);
                    }
                });
            }
            Some(_) = greeting.join_next() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_ends_of_a_connection_are_one_pair() {
        let app = App::listen().await.unwrap();
        // As a probe does.
        drop(TcpStream::connect(app.address()).await.unwrap());
        let (first, second) = tokio::join!(app.open(app.address()), app.open(app.address()));
        for mut pair in [first.unwrap(), second.unwrap()] {
            pair.ping().await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_refused_connection_is_told_from_an_open_one() {
        let app = App::listen().await.unwrap();
        let refusing = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = refusing.local_addr().unwrap();
        let (opened, _) = tokio::join!(app.open(address), async { drop(refusing.accept().await.unwrap()) });
        assert!(format!("{:#}", opened.unwrap_err()).contains("before it reached the application"));
    }
}
