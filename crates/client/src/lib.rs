//! How everything that is not a controller talks to one: sidecars, the command line, the local mesh.
//!
//! [`channel`] gives a gRPC channel over mTLS that connects when it is first used, again when it broke, and to the next
//! controller when one does not answer. [`CallError`] says what a failed call means. [`retry`] repeats a call while
//! nobody answers; commands carry an id ([`command`]), so a repeat after a lost answer gets the first outcome and
//! changes nothing twice.
//!
//! [`Backoff`] says when a sidecar that lost its controller tries again. [`Relay`] is one connection for many sidecars.
//!
//! [`take`] turns what a controller sends to a sidecar into a snapshot, or refuses it; [`follow`] decides what a sidecar does about
//! it, and [`stored`] is the snapshot as it lies on its disk.
//!
//! Who the caller is and whom it believes are in the TLS configuration, made by `weft-identity`.

mod address;
mod backoff;
mod channel;
mod error;
pub mod follow;
mod relay;
mod retry;
pub mod stored;
pub mod take;

pub use address::{AddressError, ControllerAddress};
pub use backoff::Backoff;
pub use channel::{ALPN, Tls, Way, channel};
pub use error::CallError;
pub use relay::{Introduced, Relay, SpeakAs};
pub use retry::{command, retry};
