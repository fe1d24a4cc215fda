//! What the benches share: their course, the server that is measured, controllers as processes, CPU time and memory, the
//! report.

pub mod controller;
pub mod cpu;
pub mod report;
pub mod run;
pub mod server;
