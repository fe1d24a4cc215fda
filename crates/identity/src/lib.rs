//! Who is who in the mesh, and how that is proved.
//!
//! Used by the controller ([`ca`], [`public_key`], [`token`]), by sidecars and operators ([`key`], [`credential`],
//! [`token`]), and by both for [`tls`] and [`introduction`]. The life of an identity, in the order of the modules:
//!
//! 1. An operator creates a [`token::JoinToken`] and hands it to a new instance.
//! 2. The instance makes a [`key::LeafKey`], connects with [`tls::join_config`], which accepts only the controller that
//!    the token names, and sends the token and a certificate signing request.
//! 3. The controller takes the public key from the request ([`public_key::PublicKey`]) and the name from its own
//!    records, and issues a leaf ([`ca::CertificateAuthority::issue_leaf`]).
//! 4. The instance keeps key, leaf and roots as a [`credential::Credential`], and from then on speaks TLS through a
//!    [`tls::TlsIdentity`], whose credential it replaces at [`credential::Credential::renew_at`].
//!    If no controller was there before it expired, it is still recognized for a while
//!    ([`ca::CertificateAuthority::recognize_expired`]).
//!
//! Invariants: names come from the controller, never from a request; a peer's name comes from its leaf, never from
//! anything else it says; private keys are in no error, no `Debug` text and no file that others can read. Time is an
//! argument, except in handshakes, where rustls asks the clock it was given.
//!
//! Deliberately absent: sockets, tasks and timers; who may get which name (the identity scope of the model); revocation
//! and the rotation of roots as a procedure (both are events; here are only the parts they need).

pub mod ca;
pub mod certificate;
pub mod credential;
pub mod fingerprint;
pub mod introduction;
pub mod key;
pub mod public_key;
pub mod spiffe;
pub mod tls;
pub mod token;

mod file;
#[cfg(test)]
mod fixture;
mod pem;

pub use file::FileError;
