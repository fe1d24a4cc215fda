//! The control plane as its clients see it: real controllers in this process, a real database, real TLS.

mod authorization;
mod commands;
mod discovery;
mod joins;
mod projection;
mod support;
