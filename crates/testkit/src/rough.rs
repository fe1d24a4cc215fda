//! A TCP line that passes bytes on as a bad network does: in pieces of any size, with pauses between them.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Most bytes of a piece.
const PIECE: usize = 1 << 16;

/// See the module's documentation. Its connections are gone with it.
#[derive(Debug)]
pub struct RoughLine {
    address: SocketAddr,
    to: Arc<OnceLock<SocketAddr>>,
    _passing: JoinSet<()>,
}

impl RoughLine {
    /// Listens. The `seed` says where pieces end; one piece of so many is followed by a pause.
    ///
    /// # Panics
    ///
    /// When no loopback port is free.
    pub async fn listen(seed: u64, pause_one_of: u32) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a loopback port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let to = Arc::new(OnceLock::new());
        let mut passing = JoinSet::new();
        passing.spawn(accept(listener, Arc::clone(&to), SmallRng::seed_from_u64(seed), pause_one_of));
        Self { address, to, _passing: passing }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where its connections lead. Before that is said they are closed.
    ///
    /// # Panics
    ///
    /// When it was said before.
    pub fn leads_to(&self, address: SocketAddr) {
        self.to.set(address).expect("a line leads to one place");
    }
}

async fn accept(
    listener: TcpListener,
    to: Arc<OnceLock<SocketAddr>>,
    mut seeds: SmallRng,
    pause_one_of: u32,
) {
    let mut passing = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (Ok((near, _)), Some(to)) = (accepted, to.get()) else { continue };
                let Ok(far) = TcpStream::connect(to).await else { continue };
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                passing.spawn(pass(near_read, far_write, SmallRng::seed_from_u64(seeds.random()), pause_one_of));
                passing.spawn(pass(far_read, near_write, SmallRng::seed_from_u64(seeds.random()), pause_one_of));
            }
            Some(_) = passing.join_next() => {}
        }
    }
}

/// One direction, until it ends; the end is passed on when the halves are dropped.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut rng: SmallRng, pause_one_of: u32) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut buffer = vec![0; PIECE];
    loop {
        let most = rng.random_range(1..=buffer.len());
        match from.read(&mut buffer[..most]).await {
            Ok(0) | Err(_) => return,
            Ok(bytes) if to.write_all(&buffer[..bytes]).await.is_err() => return,
            Ok(_) => {}
        }
        if rng.random_ratio(1, pause_one_of) {
            tokio::time::sleep(Duration::from_micros(rng.random_range(1..500))).await;
        }
    }
}
