//! End to end: what the smoke run and the stories share, and the smoke run itself.
//!
//! Everything here looks at a mesh from outside, as its users do: through the programs `weft`, `weft-controller` and
//! `weft-proxy`, a PostgreSQL client, TCP and HTTP connections, admin pages, connection records, and what the kernel
//! tells about processes and sockets. The one shortcut is that meshes are started by the library that `weft up` is made
//! of, so that single processes can be killed and started again; `weft up` itself has stories of its own.
//!
//! - [`smoke`]: the promises, tried one after the other on one mesh; the program `weft-smoke` runs it.
//! - [`bytes`]: much on one connection and little on many, over a rough line; the program `weft-bytes` runs it.
//! - [`crowd`]: thousands of live connections whose policy changes; the program `weft-crowd` runs it.
//! - [`protocols`]: servers and clients that people use, through every way in.
//! - [`partition`]: sidecars out of touch for as long as wanted; the program `weft-partition` runs it.
//! - [`restarts`]: sidecars stopped, started and upgraded under load; the program `weft-restarts` runs it.
//! - `tests/stories.rs`: what needs a mesh of its own, or a broken one.
//!
//! Waiting is on conditions and bounded ([`wait::until`]); times are printed, never asserted.

pub mod app;
pub mod blob;
pub mod bytes;
pub mod crowd;
pub mod footprint;
pub mod http;
pub mod mesh;
pub mod network;
pub mod partition;
pub mod payload;
pub mod postgres;
pub mod programs;
pub mod protocols;
pub mod records;
pub mod report;
pub mod restarts;
pub mod sidecar;
pub mod smoke;
pub mod sql;
pub mod up;
pub mod wait;
pub mod weft;
