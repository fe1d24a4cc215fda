//! The cryptography in use, named one by one: what the process or a library sets as a default changes nothing here.

use rustls::SignatureScheme;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use std::sync::{Arc, LazyLock};

/// What a peer may sign the handshake with: the kinds of keys that leaves may have.
pub(crate) const SIGNATURE_SCHEMES: [SignatureScheme; 3] = [
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ED25519,
];

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        // 128 bits first: both are out of reach, against a quantum computer too, and this one costs a sixth less per byte and
        // half as much in the key schedule of a handshake, since processors have instructions for SHA-256.
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        // The hybrid first: what is recorded today stays secret when X25519 alone no longer is. The others are for
        // standard clients that do not know it.
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1],
        ..aws_lc_rs::default_provider()
    })
});

/// The provider of every configuration.
pub(super) fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}
