//! What tests of several crates share, and programs that are tests.
//!
//! - [`TestDatabase`]: an empty database on a real PostgreSQL server, for one test, dropped afterwards.
//! - [`wait_until`]: waits on a condition for a bounded time, instead of sleeping.
//! - [`Line`]: a TCP line that can be cut and healed.
//! - [`RoughLine`]: a TCP line that cuts what it passes on into pieces, and pauses.
//! - [`reserve_loopback_port`]: a free port, for what cannot bind port 0 itself.
//!
//! Everything here panics instead of returning errors: a test that cannot run has failed.

#![expect(
    clippy::panic,
    clippy::expect_used,
    reason = "a test that cannot run fails, and this code runs in tests only"
)]

mod database;
mod line;
mod rough;
mod wait;

pub use database::TestDatabase;
pub use line::{Line, Passes};
pub use rough::RoughLine;
pub use wait::wait_until;

/// A loopback port that nothing listens on and that the kernel gives to nobody else for a minute.
///
/// # Panics
///
/// When the loopback interface has no free port.
pub fn reserve_loopback_port() -> u16 {
    weft_pgserver::reserve_loopback_port().expect("127.0.0.1 has a free port")
}
