//! The event log against a real PostgreSQL server, a database per test.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a helper of tests fails the test that called it")]

mod append;
mod concurrency;
mod epochs;
mod failures;
mod findings;
mod growth;
mod reading;
mod rewind;
mod schema;
mod support;
mod verification;
