//! Bytes that cannot be mistaken: every chunk is different, so a byte that is lost, repeated, swapped or delivered to the
//! wrong stream changes the digest.

use std::fmt;
use std::io;

use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// What is written or read at once: large enough that the system calls do not count, small beside memory.
const CHUNK_BYTES: usize = 256 << 10;

/// How much passed one end of a stream, and its SHA-256.
#[derive(Clone, PartialEq, Eq)]
pub struct Passed {
    /// The number of bytes.
    pub bytes: u64,
    digest: [u8; 32],
}

impl fmt::Debug for Passed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes with SHA-256 {}", self.bytes, self.short_digest())
    }
}

impl Passed {
    /// The first digits of the digest, enough to compare by eye.
    pub fn short_digest(&self) -> String {
        hex::encode(&self.digest[..6])
    }
}

/// Sends `bytes` bytes that are unlike those of every other `seed`. Leaves the stream open.
///
/// # Errors
///
/// The stream fails.
pub async fn send(stream: &mut (impl AsyncWrite + Unpin), seed: u64, bytes: u64) -> io::Result<Passed> {
    let mut hasher = Sha256::new();
    let mut chunk = noise(seed);
    let mut left = bytes;
    let mut number = 0_u64;
    while left > 0 {
        chunk[..8].copy_from_slice(&number.to_le_bytes());
        let size = usize::try_from(left).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        hasher.update(&chunk[..size]);
        stream.write_all(&chunk[..size]).await?;
        left -= size as u64;
        number += 1;
    }
    stream.flush().await?;
    Ok(Passed { bytes, digest: hasher.finalize().into() })
}

/// Receives until the other side has closed its direction.
///
/// # Errors
///
/// The stream fails.
pub async fn receive(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Passed> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut bytes = 0;
    loop {
        let size = stream.read(&mut buffer).await?;
        if size == 0 {
            return Ok(Passed { bytes, digest: hasher.finalize().into() });
        }
        hasher.update(&buffer[..size]);
        bytes += size as u64;
    }
}

/// A chunk of incompressible bytes (splitmix64).
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    while chunk.len() < CHUNK_BYTES {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        chunk.extend_from_slice(&(word ^ (word >> 31)).to_le_bytes());
    }
    chunk
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn sent(seed: u64, bytes: u64) -> (Passed, Vec<u8>) {
        let mut wire = Vec::new();
        let passed = send(&mut wire, seed, bytes).await.unwrap();
        (passed, wire)
    }

    #[tokio::test]
    async fn what_was_received_is_what_was_sent() {
        let (passed, wire) = sent(1, 3 * CHUNK_BYTES as u64 + 5).await;
        assert_eq!(wire.len() as u64, passed.bytes);
        assert_eq!(receive(&mut wire.as_slice()).await.unwrap(), passed);
    }

    #[tokio::test]
    async fn a_swap_a_loss_and_another_stream_are_seen() {
        let (passed, wire) = sent(1, 2 * CHUNK_BYTES as u64).await;
        let (first, second) = wire.split_at(CHUNK_BYTES);
        let swapped = [second, first].concat();
        for wrong in [swapped.as_slice(), &wire[1..], first, &sent(2, passed.bytes).await.1] {
            assert_ne!(receive(&mut &*wrong).await.unwrap(), passed);
        }
    }
}
