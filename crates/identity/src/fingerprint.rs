//! SHA-256 of a certificate or of a public key, as people and files write it.

use aws_lc_rs::digest;
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::str::FromStr;

const BYTES: usize = 32;

/// The text is not a fingerprint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint is 64 lower case hexadecimal digits")]
pub struct FingerprintError;

/// SHA-256 of a DER certificate, or of a DER SubjectPublicKeyInfo. Written as 64 lower case hexadecimal digits,
/// what `openssl x509 -outform der | sha256sum` prints. Not a secret.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; BYTES]);

impl Fingerprint {
    /// The fingerprint of a whole certificate.
    #[must_use]
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Self {
        Self(sha256(certificate))
    }

    /// The fingerprint of a DER SubjectPublicKeyInfo.
    #[must_use]
    pub fn of_public_key(spki_der: &[u8]) -> Self {
        Self(sha256(spki_der))
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; BYTES] {
        &self.0
    }
}

impl FromStr for Fingerprint {
    type Err = FingerprintError;

    fn from_str(s: &str) -> Result<Self, FingerprintError> {
        decode_hex(s).map(Self).ok_or(FingerprintError)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; BYTES] {
    let mut out = [0; BYTES];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

/// Reads exactly 32 bytes. Upper case is refused, so that a value has one spelling.
pub(crate) fn decode_hex(s: &str) -> Option<[u8; BYTES]> {
    let mut out = [0; BYTES];
    let one_spelling = s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (one_spelling && hex::decode_to_slice(s, &mut out).is_ok()).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_has_one_spelling() {
        let print = Fingerprint::of_public_key(b"abc");
        let text = print.to_string();
        assert_eq!(text, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(text.parse(), Ok(print));
        for bad in ["", &text[1..], &text.to_uppercase(), &format!("{text}0"), &text.replace('b', "g")] {
            assert_eq!(bad.parse::<Fingerprint>(), Err(FingerprintError), "{bad}");
        }
    }
}
