//! Apps behind sidecars, and clients before them.

use socket2::SockRef;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

/// A local TCP server; gone when dropped.
pub(crate) struct App {
    pub(crate) address: SocketAddr,
    task: AbortOnDropHandle<()>,
}

impl App {
    /// Serves every connection with `serve`.
    pub(crate) async fn serve<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self::serve_at(SocketAddr::from(([127, 0, 0, 1], 0)), serve).await
    }

    async fn serve_at<F>(address: SocketAddr, serve: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = TaskTracker::new();
        let task = TaskTracker::new().spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream));
            }
        });
        Self { address, task: AbortOnDropHandle::new(task) }
    }

    /// Stops listening; when this returns, a connection to the address is refused.
    pub(crate) async fn gone(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }

    /// Sends back what it gets, until the end.
    pub(crate) async fn echo() -> Self {
        Self::echo_at(SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    /// The same at this address, where an app was before.
    pub(crate) async fn echo_at(address: SocketAddr) -> Self {
        Self::serve_at(address, |mut stream| async move {
            let (mut read, mut write) = stream.split();
            if tokio::io::copy(&mut read, &mut write).await.is_ok() {
                let _ = write.shutdown().await;
            }
        })
        .await
    }

    /// Answers the first byte, and tells how the connection ended after it.
    pub(crate) async fn listening() -> (Self, mpsc::Receiver<Result<usize, io::ErrorKind>>) {
        let (tell, heard) = mpsc::channel(1);
        let app = Self::serve(move |mut stream| {
            let tell = tell.clone();
            async move {
                // A probe says nothing.
                if stream.read_exact(&mut [0]).await.is_ok() {
                    stream.write_all(b"!").await.unwrap();
                    tell.send(stream.read(&mut [0]).await.map_err(|error| error.kind())).await.unwrap();
                }
            }
        });
        (app.await, heard)
    }

    /// Says its name to whoever connects, then echoes.
    pub(crate) async fn named(name: &'static str) -> Self {
        Self::serve(move |mut stream| async move {
            let (mut read, mut write) = stream.split();
            if write.write_all(name.as_bytes()).await.is_ok() {
                let _ = tokio::io::copy(&mut read, &mut write).await;
            }
        })
        .await
    }
}

/// Sends a word through an echo and checks that it comes back.
pub(crate) async fn ping(stream: &mut TcpStream) -> io::Result<()> {
    let mut answer = [0; 4];
    stream.write_all(b"ping").await?;
    tokio::time::timeout(Duration::from_secs(10), stream.read_exact(&mut answer)).await??;
    assert_eq!(&answer, b"ping");
    Ok(())
}

/// Waits until the stream is reset. Panics if it ends cleanly.
pub(crate) async fn expect_reset(stream: &mut TcpStream) {
    let mut byte = [0];
    let read = tokio::time::timeout(super::LIMIT, stream.read(&mut byte)).await.expect("an end in time");
    match read {
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
        Ok(bytes) => panic!("read {bytes} bytes instead of a reset"),
    }
}

/// Breaks a connection off.
pub(crate) fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// An address that nobody listens on.
pub(crate) fn dead_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], weft_testkit::reserve_loopback_port()))
}
