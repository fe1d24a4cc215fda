//! Sidecars in process, against a scripted controller that speaks real gRPC over real mTLS. What they serve comes from the
//! same fold that the projector runs; what is scripted is when the controller speaks, what it gets wrong, and when it is gone.
//!
//! `support/controller.rs` is the controller, `support/sidecar.rs` a running sidecar, `support/app.rs` apps and clients.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot run fails")]

mod closes;
mod config;
mod demand;
mod dns;
mod ends;
mod faults;
mod gate;
mod life;
mod nearness;
mod path;
mod policy;
mod redirect;
mod reuse;
mod standard;
mod support;
mod trust;
mod upgrade;
mod witness;
