//! A TCP line to somebody, which can be cut and healed.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What is read ahead of a line that is silent, for each direction of a connection.
const BUFFER_BYTES: usize = 64 << 10;

/// What passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passes {
    /// Everything.
    Everything,
    /// Nothing, and nobody is told: what is sent arrives once something passes again.
    Nothing,
    /// Nothing: connections are closed, and new ones too.
    NoConnection,
}

/// See the module's documentation. Ends with the value.
#[derive(Debug)]
pub struct Line {
    address: SocketAddr,
    passes: watch::Sender<Passes>,
    _accepting: JoinSet<()>,
}

impl Line {
    /// A line to `to`, through which everything passes.
    ///
    /// # Errors
    /// What the system says, if there is no port.
    pub async fn to(to: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (passes, watched) = watch::channel(Passes::Everything);
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, to, watched));
        Ok(Self { address, passes, _accepting: accepting })
    }

    /// Where it begins.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on, this passes.
    pub fn set(&self, passes: Passes) {
        self.passes.send_replace(passes);
    }
}

async fn accept(listener: TcpListener, to: SocketAddr, passes: watch::Receiver<Passes>) {
    let mut carrying = JoinSet::new();
    loop {
        while carrying.try_join_next().is_some() {}
        let Ok((near, _)) = listener.accept().await else { continue };
        let passes = passes.clone();
        carrying.spawn(async move {
            let mut closed = passes.clone();
            tokio::select! {
                biased;
                // Either way the connection ends on both sides.
                _ = closed.wait_for(|passes| *passes == Passes::NoConnection) => {}
                _ = carry(near, to, passes) => {}
            }
        });
    }
}

async fn carry(near: TcpStream, to: SocketAddr, mut passes: watch::Receiver<Passes>) -> io::Result<()> {
    let something = passes.wait_for(|passes| *passes == Passes::Everything).await;
    something.map_err(io::Error::other)?;
    let far = TcpStream::connect(to).await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
    tokio::try_join!(copy(near_read, far_write, passes.clone()), copy(far_read, near_write, passes))?;
    Ok(())
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut into: impl AsyncWrite + Unpin,
    mut passes: watch::Receiver<Passes>,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let read = from.read(&mut buffer).await?;
        passes.wait_for(|passes| *passes == Passes::Everything).await.map_err(io::Error::other)?;
        if read == 0 {
            return into.shutdown().await;
        }
        into.write_all(&buffer[..read]).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_line_is_silent_or_cut_and_heals() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let line = Line::to(listener.local_addr().unwrap()).await.unwrap();
        let mut near = TcpStream::connect(line.address()).await.unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        let mut byte = [0];
        near.write_all(b"a").await.unwrap();
        far.read_exact(&mut byte).await.unwrap();

        line.set(Passes::Nothing);
        far.write_all(b"b").await.unwrap();
        let mut read = Box::pin(near.read_exact(&mut byte));
        tokio::select! {
            biased;
            _ = &mut read => panic!("something passed"),
            () = tokio::time::sleep(std::time::Duration::from_millis(20)) => {}
        }
        line.set(Passes::Everything);
        read.await.unwrap();
        assert_eq!(byte, *b"b");

        line.set(Passes::NoConnection);
        assert!(!matches!(near.read(&mut byte).await, Ok(1..)));
        assert!(!matches!(far.read(&mut byte).await, Ok(1..)));
        let mut refused = TcpStream::connect(line.address()).await.unwrap();
        assert!(!matches!(refused.read(&mut byte).await, Ok(1..)));
        line.set(Passes::Everything);
        let mut again = TcpStream::connect(line.address()).await.unwrap();
        let (mut far, _) = listener.accept().await.unwrap();
        again.write_all(b"c").await.unwrap();
        far.read_exact(&mut byte).await.unwrap();
    }
}
