//! Running cargo and reading what it prints.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::Context;

/// The workspace's folder.
pub(crate) fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// cargo, run at the workspace's root.
pub(crate) fn cargo<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(args);
    command
}

/// The target folder in use: the one that this program was built into.
pub(crate) fn target_dir() -> anyhow::Result<PathBuf> {
    let exe = std::env::current_exe().context("where this program is, is unknown")?;
    let dir = exe.parent().and_then(Path::parent).context("this program is in no target folder")?;
    Ok(dir.to_owned())
}

/// Whether cargo has a subcommand.
pub(crate) fn has(subcommand: &str) -> bool {
    let mut command = cargo([subcommand, "--version"]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Runs a command with its output going where ours goes.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<ExitStatus> {
    command.status().with_context(|| format!("{} could not be run", shown(command)))
}

/// Runs a command and fails if it does.
pub(crate) fn must(command: &mut Command) -> anyhow::Result<()> {
    let status = run(command)?;
    anyhow::ensure!(status.success(), "{} failed; what is wrong stands above", shown(command));
    Ok(())
}

/// Which output of a command is read as it passes by.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stream {
    Out,
    Err,
}

/// Runs a command, shows one of its outputs and gives each line of it to `see`; the other output goes where ours goes.
pub(crate) fn run_seeing(
    command: &mut Command,
    stream: Stream,
    mut see: impl FnMut(&str),
) -> anyhow::Result<ExitStatus> {
    match stream {
        Stream::Out => command.stdout(Stdio::piped()),
        Stream::Err => command.stderr(Stdio::piped()),
    };
    let mut child = command.spawn().with_context(|| format!("{} could not be run", shown(command)))?;
    if let Some(pipe) = child.stdout.take() {
        for_each_line(BufReader::new(pipe), |line| {
            see(&String::from_utf8_lossy(line));
            std::io::stdout().write_all(line)
        })?;
    }
    if let Some(pipe) = child.stderr.take() {
        for_each_line(BufReader::new(pipe), |line| {
            see(&String::from_utf8_lossy(line));
            std::io::stderr().write_all(line)
        })?;
    }
    Ok(child.wait()?)
}

fn for_each_line(
    mut from: impl BufRead,
    mut each: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line)? > 0 {
        each(&line)?;
        line.clear();
    }
    Ok(())
}

/// A command as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    format!("`{}`", words.join(" "))
}
