//! What one endpoint that flaps costs a mesh, in simulated time: `cargo run -p weft-routing --features fixture --example
//! flapper`. The last line is JSON.
#![expect(clippy::print_stdout, reason = "what it is for")]

use std::time::Duration;
use weft_routing::fixture::flaps::{Figures, flapper};

fn main() {
    let Figures { raw, changes, events, released_after } =
        flapper(10, Duration::from_secs(1), Duration::from_secs(600));
    println!("one of 10 endpoints changes its health every second for 10 minutes: {raw} times");
    println!("published changes {changes}, events {events}, let go {released_after:?} after it calmed down");
    println!("{{\"flapper\":{{\"changes\":{changes},\"events\":{events}}}}}");
}
