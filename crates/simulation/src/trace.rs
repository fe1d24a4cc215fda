//! What happened, in order: a hash over all of it, so that two runs can be compared, and its last lines for people.

use sha2::{Digest, Sha256};
use std::collections::VecDeque;
use std::fmt::Arguments;
use std::time::Duration;

/// Lines that a failure shows.
const TAIL_MAX: usize = 120;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    hash: Sha256,
    tail: VecDeque<String>,
    lines: u64,
    /// Print every line as it happens.
    pub(crate) loud: bool,
}

impl Trace {
    pub(crate) fn say(&mut self, at: Duration, what: Arguments<'_>) {
        let line = format!("{:>10.4} {what}", at.as_secs_f64());
        self.hash.update(line.as_bytes());
        self.hash.update(b"\n");
        self.lines += 1;
        if self.loud {
            println!("{line}");
        }
        if self.tail.len() == TAIL_MAX {
            self.tail.pop_front();
        }
        self.tail.push_back(line);
    }

    /// How many lines there are.
    pub(crate) const fn lines(&self) -> u64 {
        self.lines
    }

    /// Sixteen hex digits that stand for all of it.
    pub(crate) fn digest(&self) -> String {
        self.hash.clone().finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(crate) fn into_tail(self) -> Vec<String> {
        self.tail.into()
    }
}
