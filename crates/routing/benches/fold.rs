//! How fast stored events become the mesh: decoding, folding, and the projection beside the fold.
//!
//! Run it with
//!
//!     cargo bench -p weft-routing --bench fold -- [--events N] [--services N] [--instances N] [--rounds N] \
//!         [--only FIGURE]
//!
//! A seeded mesh of `services` x `instances` lives through `events` events of about 200 bytes of payload where that
//! applies: mostly health reports with details, beside them registrations, drains, policies, leaves and tokens. All of
//! it is in memory, so nothing of the database is measured. Each figure is the best of `rounds`, on one core. The last line
//! is JSON; to compare two versions of the code, run both on one machine with the same arguments, one after the other.
//! The fold is the same in every round: the hash of the checkpoint that it prints must not differ between them, unless they fold differently.

#![expect(clippy::unwrap_used, reason = "a bench that cannot run fails")]

use std::fmt::Write;
use std::hint::black_box;
use std::time::{Duration, Instant};
use weft_model::{Decoder, Fact};
use weft_routing::{Checkpoint, Projection, RoutingState};

#[path = "fold/mesh.rs"]
mod mesh;

/// A page as the log hands it out.
const PAGE: usize = 4_096;

fn main() {
    let arguments = Arguments::parse();
    let events = mesh::events(arguments.services, arguments.instances, arguments.events);
    let bytes: usize = events.iter().map(|event| event.payload.len()).sum();
    println!(
        "{} events, {} services x {} instances, {} bytes of payload each",
        events.len(),
        arguments.services,
        arguments.instances,
        bytes / events.len()
    );

    let mut report = Report::new(events.len(), &arguments);
    report.measure("decode", || {
        let mut decoder = Decoder::default();
        events.iter().for_each(|event| drop(black_box(decoder.decode(&event.view()).unwrap())));
    });
    let mut decoder = Decoder::default();
    let facts: Vec<Fact> = events.iter().map(|event| decoder.decode(&event.view()).unwrap()).collect();
    report.measure("state", || {
        let mut state = RoutingState::default();
        for fact in &facts {
            black_box(state.apply(fact).unwrap());
        }
        drop(black_box(state));
    });
    report.measure("pages", || {
        let mut projection = Projection::default();
        for page in facts.chunks(PAGE) {
            black_box(projection.apply(page).unwrap());
        }
        drop(black_box(projection));
    });
    report.measure("bulk", || {
        let mut bulk = Projection::default().into_bulk();
        for page in facts.chunks(PAGE) {
            bulk.apply(page).unwrap();
        }
        drop(black_box(bulk.finish()));
    });
    report.measure("decode_and_bulk", || {
        let mut bulk = Projection::default().into_bulk();
        let mut decoder = Decoder::default();
        for event in &events {
            let fact = decoder.decode(&event.view()).unwrap();
            bulk.apply([&fact]).unwrap();
        }
        drop(black_box(bulk.finish()));
    });
    let mut projection = Projection::default();
    projection.apply(&facts).unwrap();
    report.checkpoint(&projection);
    report.print();
}

struct Arguments {
    events: usize,
    services: usize,
    instances: usize,
    rounds: usize,
    only: Option<String>,
}

impl Arguments {
    fn parse() -> Self {
        let mut arguments = Self { events: 300_000, services: 200, instances: 10, rounds: 3, only: None };
        // Cargo adds `--bench`.
        let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
        for pair in words.chunks(2) {
            if pair[0] == "--only" {
                arguments.only = pair.get(1).cloned();
                continue;
            }
            let value = pair.get(1).unwrap().parse().unwrap();
            match pair[0].as_str() {
                "--events" => arguments.events = value,
                "--services" => arguments.services = value,
                "--instances" => arguments.instances = value,
                "--rounds" => arguments.rounds = value,
                other => unreachable!("{other} is not an argument of this bench"),
            }
        }
        arguments
    }
}

struct Report {
    events: usize,
    rounds: usize,
    only: Option<String>,
    json: String,
}

impl Report {
    fn new(events: usize, arguments: &Arguments) -> Self {
        Self {
            events,
            rounds: arguments.rounds,
            only: arguments.only.clone(),
            json: format!("{{\"events\":{events}"),
        }
    }

    fn measure(&mut self, what: &str, mut work: impl FnMut()) {
        if self.only.as_deref().is_some_and(|only| only != what) {
            return;
        }
        let best = (0..self.rounds).map(|_| timed(&mut work)).min().unwrap();
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rate"
        )]
        let rate = (self.events as f64 / best.as_secs_f64()) as u64;
        println!("{what:>20}  {rate:>10} events/s  {best:?}");
        write!(self.json, ",\"{what}_events_per_s\":{rate}").unwrap();
    }

    /// What a checkpoint of the projection costs: to take and to write it, to read it and to build what follows.
    fn checkpoint(&mut self, projection: &Projection) {
        let checkpoint = Checkpoint::of(projection);
        let bytes = checkpoint.encode();
        let read = Checkpoint::decode(&bytes).unwrap();
        assert_eq!(read.clone().into_projection(), *projection);
        self.time("checkpoint_take", || drop(black_box(Checkpoint::of(projection))));
        self.time("checkpoint_encode", || drop(black_box(checkpoint.encode())));
        self.time("checkpoint_decode", || drop(black_box(Checkpoint::decode(&bytes).unwrap())));
        self.time("checkpoint_build", || drop(black_box(read.clone().into_projection())));
        println!("{:>20}  {:>10} bytes  {}", "checkpoint", bytes.len(), weft_routing::Hash::of(&bytes));
        write!(self.json, ",\"checkpoint_bytes\":{}", bytes.len()).unwrap();
    }

    fn time(&mut self, what: &str, mut work: impl FnMut()) {
        let best = (0..self.rounds).map(|_| timed(&mut work)).min().unwrap();
        println!("{what:>20}  {best:?}");
        write!(self.json, ",\"{what}_us\":{}", best.as_micros()).unwrap();
    }

    fn print(self) {
        println!("{}}}", self.json);
    }
}

#[expect(clippy::disallowed_methods, reason = "a bench measures time")]
fn timed(work: impl FnOnce()) -> Duration {
    let started = Instant::now();
    work();
    started.elapsed()
}
