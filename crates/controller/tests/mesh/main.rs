//! The control plane as its clients see it: real controllers in this process, a real database, real TLS.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a helper of tests fails the test that called it")]

mod authorization;
mod commands;
mod damping;
mod discovery;
mod joins;
mod projection;
mod relays;
mod rewind;
mod rollout;
mod support;
