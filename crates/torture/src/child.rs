//! The parent's side of a worker: starts it again whenever it died, and repeats what it had not answered.

use anyhow::Context;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::proxy::Proxy;
use crate::worker::{Answer, Command, Line};

/// How long a worker may take to open the log: as long as a server needs to recover from a crash, and more.
const OPEN_MAX: Duration = Duration::from_secs(60);
/// Pause before a worker that could not open the log is started again.
const AGAIN: Duration = Duration::from_millis(100);
/// Where a worker finds its database. In the environment, because arguments are for all to see.
pub(crate) const URL_VARIABLE: &str = "WEFT_TORTURE_URL";

/// Who waits for the answer to a command: by its id and content.
type Waiting = Arc<Mutex<BTreeMap<(Uuid, u32), (Command, oneshot::Sender<Answer>)>>>;

/// A worker that is kept alive. Ends with the value.
#[derive(Debug)]
pub(crate) struct Worker {
    commands: mpsc::Sender<Command>,
    waiting: Waiting,
    deaths: Arc<AtomicU64>,
    _keeping: JoinSet<()>,
}

impl Worker {
    /// A worker whose connections go through the proxy.
    pub(crate) fn keep(proxy: Arc<Proxy>, url: String) -> Self {
        let (commands, queue) = mpsc::channel(1_024);
        let waiting = Waiting::default();
        let deaths = Arc::new(AtomicU64::new(0));
        let mut keeping = JoinSet::new();
        keeping.spawn(keep_alive(proxy, url, queue, Arc::clone(&waiting), Arc::clone(&deaths)));
        Self { commands, waiting, deaths, _keeping: keeping }
    }

    /// How often it died.
    pub(crate) fn deaths(&self) -> u64 {
        self.deaths.load(Ordering::SeqCst)
    }

    /// Gives it a command; answered by this life of it or a later one.
    pub(crate) async fn ask(&self, command: &Command) -> anyhow::Result<Answer> {
        let (respond, answer) = oneshot::channel();
        lock(&self.waiting).insert((command.id, command.content), (command.clone(), respond));
        self.commands.send(command.clone()).await.context("the worker is not kept any more")?;
        answer.await.context("the worker is not kept any more")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn keep_alive(
    proxy: Arc<Proxy>,
    url: String,
    mut queue: mpsc::Receiver<Command>,
    waiting: Waiting,
    deaths: Arc<AtomicU64>,
) {
    loop {
        match Life::begin(&proxy, &url).await {
            Ok(life) => {
                if life.live(&mut queue, &waiting).await {
                    return;
                }
            }
            // It may have been killed on the way.
            Err(error) => {
                tracing::debug!("a worker did not start: {error:#}");
                sleep(AGAIN).await;
            }
        }
        deaths.fetch_add(1, Ordering::SeqCst);
    }
}

struct Life {
    child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    /// What it was asked and has not answered: a command that still queues was among what the life before left.
    asked: BTreeSet<(Uuid, u32)>,
}

impl Life {
    async fn begin(proxy: &Proxy, url: &str) -> anyhow::Result<Self> {
        let mut command = tokio::process::Command::new(std::env::current_exe()?);
        command.arg("worker").env(URL_VARIABLE, url).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(Stdio::null()).kill_on_drop(true);
        proxy.expect_process();
        let mut child = command.spawn().context("a worker cannot be started")?;
        proxy.guard(child.id().and_then(|id| i32::try_from(id).ok()).unwrap_or_default());
        let stdin = child.stdin.take().context("a worker has no input")?;
        let stdout = child.stdout.take().context("a worker has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let ready =
            timeout(OPEN_MAX, lines.next_line()).await.context("a worker does not open the log")??;
        let line: Line = serde_json::from_str(&ready.context("the log cannot be opened")?)?;
        anyhow::ensure!(matches!(line, Line::Ready), "a worker answers before it is asked");
        Ok(Self { child, stdin, lines, asked: BTreeSet::new() })
    }

    /// Passes commands and answers on until the worker dies; true if nobody has any commands any more.
    async fn live(mut self, queue: &mut mpsc::Receiver<Command>, waiting: &Waiting) -> bool {
        // What the life before had not answered.
        let open: Vec<Command> = lock(waiting).values().map(|(command, _)| command.clone()).collect();
        for command in &open {
            if self.give(command).await.is_err() {
                return false;
            }
        }
        loop {
            tokio::select! {
                line = self.lines.next_line() => {
                    let Ok(Some(line)) = line else { break };
                    // A line that was cut short was not said.
                    let Ok(Line::Answer { id, content, answer }) = serde_json::from_str(&line) else { continue };
                    self.asked.remove(&(id, content));
                    if let Some((_, respond)) = lock(waiting).remove(&(id, content)) {
                        // A writer that has gone needs no answer.
                        let _ = respond.send(answer);
                    }
                }
                command = queue.recv() => match command {
                    None => return true,
                    Some(command) => if self.give(&command).await.is_err() { break },
                }
            }
        }
        // It is dead or dying; what matters is that it is gone before the next one begins.
        let _ = self.child.kill().await;
        false
    }

    async fn give(&mut self, command: &Command) -> anyhow::Result<()> {
        if !self.asked.insert((command.id, command.content)) {
            return Ok(());
        }
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        Ok(self.stdin.write_all(&line).await?)
    }
}
