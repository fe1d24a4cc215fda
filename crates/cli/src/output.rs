//! How answers look: tables for people, JSON and YAML for programs.
//!
//! What a server says is data, not text to be trusted: every cell and line goes through [`text`], which makes control
//! characters visible. Rows are made by pure functions beside the commands, from the answer and the time, so tests
//! need no server.

pub(crate) mod table;
pub(crate) mod text;
pub(crate) mod time;

use crate::failure::{Failure, Outcome};
use serde::Serialize;
use std::io::{self, ErrorKind, Write};

/// The shape of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people
    #[default]
    Table,
    /// For programs
    Json,
    /// For people and programs
    Yaml,
}

/// `-o`, on every command that reads.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct OutputArgs {
    /// The answer's shape
    #[arg(short = 'o', long = "output", value_enum, default_value_t, value_name = "FORMAT")]
    pub(crate) format: Format,
}

/// Writes to standard output. Whoever reads may have seen enough: a closed pipe is not an error.
pub(crate) fn print(text: &str) -> Outcome<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(closed()),
        Err(error) => Err(Failure::fault(format!("standard output cannot be written: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// As [`print`], with a line end.
pub(crate) fn print_line(line: &str) -> Outcome<()> {
    print(&format!("{line}\n"))
}

/// The silent end of a command whose reader went away.
pub(crate) fn closed() -> Failure {
    Failure::new(crate::failure::Exit::Ok, String::new())
}

/// As JSON, with a line end.
pub(crate) fn json(value: &impl Serialize) -> Outcome<String> {
    let text = serde_json::to_string_pretty(value);
    text.map(|text| text + "\n").map_err(|error| Failure::from_error(&error))
}

/// As YAML.
pub(crate) fn yaml(value: &impl Serialize) -> Outcome<String> {
    let mut text = serde_saphyr::to_string(value).map_err(|error| Failure::from_error(&error))?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}
