//! Content hashes: SHA-256 of canonical bytes.

use sha2::{Digest, Sha256};
use std::fmt;

/// Names content by what it is: equal hashes, equal bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The hash of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The hash of the parts, one after the other.
    #[must_use]
    pub fn of_parts<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let hasher = parts.into_iter().fold(Sha256::new(), Sha256::chain_update);
        Self(hasher.finalize().into())
    }

    /// How it begins.
    #[must_use]
    pub fn start(&self) -> HashStart {
        HashStart(std::array::from_fn(|index| self.0[index]))
    }

    pub(crate) fn first_half(&self) -> [u8; 16] {
        std::array::from_fn(|index| self.0[index])
    }

    /// Its first four bytes, to tell a few hashes apart where the whole one follows.
    #[must_use]
    pub const fn prefix(&self) -> u32 {
        let [a, b, c, d, ..] = self.0;
        u32::from_be_bytes([a, b, c, d])
    }

    /// Reads a hash from exactly 32 bytes.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// The first eight bytes of a hash: enough to see that what was made is not what was meant, where nobody wants to deceive, and the
/// whole hash is compared later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HashStart([u8; 8]);

impl HashStart {
    /// The bytes.
    #[must_use]
    pub const fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Reads the start of a hash from eight bytes, or from more of it.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.first_chunk().copied().map(Self)
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0[..6]))
    }
}
