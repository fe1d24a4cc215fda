//! Log files of child processes: appended to, moved aside when long, their ends shown in errors.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A log is moved aside at the start after it has grown past this, so two files of it are the most that is kept.
const LOG_BYTES_MAX: u64 = 8 << 20;
/// How much of a log's end is looked at, however few lines that is.
const TAIL_BYTES: u64 = 8 << 10;

/// A log to append to, made with `mode` (less the umask) if it is new; a long one is moved aside first.
///
/// # Errors
/// The file cannot be moved or opened.
pub fn open(path: &Path, mode: u32) -> io::Result<File> {
    if fs::metadata(path).is_ok_and(|found| found.len() > LOG_BYTES_MAX) {
        fs::rename(path, path.with_extension("log.1"))?;
    }
    OpenOptions::new().create(true).append(true).mode(mode).open(path)
}

/// The last lines of a file, at most `lines`; empty if it cannot be read.
#[must_use]
pub fn tail(path: &Path, lines: usize) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
