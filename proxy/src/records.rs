//! Connection records: one JSON object per line for each connection that ended or was refused.
//!
//! The data path hands a record over and goes on: it never waits for a disk or a pipe. If the writer does not keep up,
//! the oldest waiting records are dropped and counted. The writer is a thread of its own, because writing to a pipe
//! that nobody empties blocks.

use crate::config::ConnectionLog;
use crate::connections::{ClosedBy, Direction, Facts};
use crate::metrics;
use serde::Serialize;
use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use weft_model::CloseReason;

/// Most records that wait for the writer: some seconds of connections at a very high rate, about 8 MiB.
const WAITING_MAX: usize = 8192;

/// How long the writer gathers records after it has written some: a few system calls for many records, and data-plane threads
/// wake nobody meanwhile.
const GATHER: Duration = Duration::from_millis(5);

/// What one system call writes at most: about a hundred records.
const WRITE_BYTES: usize = 64 * 1024;

/// How long a stop waits for the last records: a disk takes milliseconds, a pipe that nobody reads takes for ever.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// One connection, as the log tells it. Field names are part of the surface.
#[derive(Debug, Serialize)]
pub(crate) struct Record {
    /// When the connection ended.
    pub(crate) time: String,
    pub(crate) direction: Direction,
    #[serde(flatten)]
    pub(crate) facts: Facts,
    pub(crate) first_byte_ms: Option<f64>,
    pub(crate) duration_ms: f64,
    pub(crate) bytes_up: u64,
    pub(crate) bytes_down: u64,
    pub(crate) close_reason: CloseReason,
    pub(crate) closed_by: ClosedBy,
    pub(crate) detail: String,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Record>,
    closed: bool,
    /// The writer sleeps until it is woken.
    asleep: bool,
}

#[derive(Debug, Default)]
struct Channel {
    queue: Mutex<Queue>,
    filled: Condvar,
}

/// Takes records. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct RecordSender(Arc<Channel>);

impl RecordSender {
    /// Hands a record to the writer; if too many wait, the oldest one is dropped.
    pub(crate) fn send(&self, record: Record) {
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.waiting.len() >= WAITING_MAX {
            queue.waiting.pop_front();
            metrics::records_dropped(1);
        }
        queue.waiting.push_back(record);
        let wake = std::mem::take(&mut queue.asleep);
        drop(queue);
        if wake {
            self.0.filled.notify_one();
        }
    }
}

/// Writes records.
#[derive(Debug)]
pub(crate) struct Writer {
    channel: Arc<Channel>,
    done: oneshot::Receiver<()>,
}

/// Starts the writer's thread.
///
/// # Errors
/// If the file cannot be opened.
pub(crate) fn start(log: &ConnectionLog) -> io::Result<(RecordSender, Writer)> {
    let output: Box<dyn Write + Send> = match log {
        ConnectionLog::Stdout => Box::new(io::stdout()),
        ConnectionLog::File(path) => {
            Box::new(OpenOptions::new().create(true).append(true).mode(0o640).open(path)?)
        }
    };
    start_with(output)
}

fn start_with(output: Box<dyn Write + Send>) -> io::Result<(RecordSender, Writer)> {
    let channel = Arc::new(Channel::default());
    let (finished, done) = oneshot::channel();
    let thread_channel = Arc::clone(&channel);
    std::thread::Builder::new().name("weft-records".into()).spawn(move || {
        write_all(&thread_channel, output);
        // Nobody waits any more if the stop took too long.
        let _ = finished.send(());
    })?;
    Ok((RecordSender(Arc::clone(&channel)), Writer { channel, done }))
}

impl Writer {
    /// Waits a bounded time until everything that was sent is written.
    pub(crate) async fn finish(self) {
        self.channel.queue.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.channel.filled.notify_one();
        if tokio::time::timeout(FLUSH_TIMEOUT, self.done).await.is_err() {
            tracing::warn!("connection records are left unwritten: their log takes none");
        }
    }
}

fn write_all(channel: &Channel, output: Box<dyn Write + Send>) {
    let mut output = BufWriter::with_capacity(WRITE_BYTES, output);
    let mut failing = false;
    loop {
        let mut queue = channel.queue.lock().unwrap_or_else(PoisonError::into_inner);
        while queue.waiting.is_empty() && !queue.closed {
            queue.asleep = true;
            queue = channel.filled.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let batch = std::mem::take(&mut queue.waiting);
        let closed = queue.closed;
        drop(queue);
        let count = batch.len() as u64;
        let result = batch.iter().try_for_each(|record| {
            serde_json::to_writer(&mut output, record)?;
            output.write_all(b"\n")
        });
        match result.and_then(|()| output.flush()) {
            Ok(()) => failing = false,
            Err(error) => {
                metrics::records_dropped(count);
                // Once for each time that it breaks, not once for each record.
                if !std::mem::replace(&mut failing, true) {
                    tracing::error!(%error, "connection records cannot be written");
                }
            }
        }
        if closed {
            return;
        }
        std::thread::sleep(GATHER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(bytes_up: u64) -> Record {
        Record {
            time: String::new(),
            direction: Direction::Inbound,
            facts: Facts::default(),
            first_byte_ms: None,
            duration_ms: 0.5,
            bytes_up,
            bytes_down: 0,
            close_reason: CloseReason::ClientFin,
            closed_by: ClosedBy::Client,
            detail: String::new(),
        }
    }

    #[tokio::test]
    async fn every_record_is_a_line_and_all_are_written_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (sender, writer) = start(&ConnectionLog::File(path.clone())).unwrap();
        (0..100).for_each(|n| sender.send(record(n)));
        writer.finish().await;
        let text = std::fs::read_to_string(path).unwrap();
        let bytes = text.lines().map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(value["close_reason"], "client_fin");
            value["bytes_up"].as_u64().unwrap()
        });
        assert!(bytes.eq(0..100));
    }

    /// Never takes anything.
    struct Stuck;

    impl Write for Stuck {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            loop {
                std::thread::park();
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stuck_log_costs_the_oldest_records_and_stops_nobody() {
        let (sender, writer) = start_with(Box::new(Stuck)).unwrap();
        (0..3 * WAITING_MAX as u64).for_each(|n| sender.send(record(n)));
        {
            let queue = sender.0.queue.lock().unwrap();
            assert!(queue.waiting.len() <= WAITING_MAX);
            assert_eq!(queue.waiting.back().unwrap().bytes_up, 3 * WAITING_MAX as u64 - 1);
        }
        writer.finish().await;
    }
}
