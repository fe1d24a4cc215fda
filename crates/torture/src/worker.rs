//! The process under test: an open log, and commands that come as lines of JSON.
//!
//! It keeps nothing: what was asked and what was answered is known to the parent, which outlives it. It ends with its
//! standard input, so it never outlives the parent.

use serde::{Deserialize, Serialize};
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::task::JoinSet;
use uuid::Uuid;
use weft_eventlog::{
    AppendError, AppendRequest, Appended, Appender, ConnectConfig, EventLog, LogConfig, NewEvent, ScopeAppend,
};
use weft_model::version::{ExpectedVersion, Version};

/// What a writer wants of one scope.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) scope: String,
    /// None: whatever it is; zero: none.
    pub(crate) expected: Option<u64>,
    pub(crate) events: u32,
}

/// What a writer wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Command {
    pub(crate) id: Uuid,
    /// Makes two commands of one id differ.
    pub(crate) content: u32,
    pub(crate) parts: Vec<Part>,
}

/// What a recorded command is told, every time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) epoch: u64,
    /// Microseconds since the Unix epoch.
    pub(crate) recorded_at: i64,
    /// Of each part, in order, the version that its scope had then.
    pub(crate) versions: Vec<u64>,
}

/// What it was told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// Recorded, now or earlier.
    Recorded { outcome: Outcome, repeated: bool },
    /// Somebody was faster; so far is the scope of this name.
    Conflict { scope: String, current: u64 },
    /// The id was used with other content.
    Reused,
    /// Unknown, or not now: to be repeated with the same id.
    Again(String),
    /// Anything that must not happen.
    Wrong(String),
}

/// A line of the worker.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Line {
    /// The log is open.
    Ready,
    Answer {
        id: Uuid,
        content: u32,
        answer: Answer,
    },
}

/// Runs until standard input ends.
pub(crate) async fn run(url: &str) -> anyhow::Result<()> {
    let connect: ConnectConfig = url.parse()?;
    let log = EventLog::open(LogConfig::new(connect)).await?;
    let out = Arc::new(Mutex::new(()));
    say(&out, &Line::Ready)?;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut appends = JoinSet::new();
    while let Some(line) = lines.next_line().await? {
        let command: Command = serde_json::from_str(&line)?;
        let (appender, out) = (log.appender(), Arc::clone(&out));
        appends.spawn(async move {
            let (id, content) = (command.id, command.content);
            let answer = append(&appender, &command).await;
            // A parent that is gone needs no answer.
            let _ = say(&out, &Line::Answer { id, content, answer });
        });
        while appends.try_join_next().is_some() {}
    }
    Ok(())
}

/// A whole line at once: a process that is killed leaves no half of one that could be taken for another.
fn say(out: &Mutex<()>, line: &Line) -> anyhow::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    let _alone = out.lock().unwrap_or_else(PoisonError::into_inner);
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&text)?;
    Ok(stdout.flush()?)
}

async fn append(appender: &Appender, command: &Command) -> Answer {
    match appender.append(request(command)).await {
        Ok(appended) => recorded(command, &appended),
        Err(AppendError::Conflict { scope, current, .. }) => Answer::Conflict { scope, current: current.0 },
        Err(AppendError::CommandIdReused) => Answer::Reused,
        Err(error @ (AppendError::Store(_) | AppendError::Overloaded { .. } | AppendError::Closed)) => {
            Answer::Again(weft_model::Chain(&error).to_string())
        }
        Err(error) => Answer::Wrong(weft_model::Chain(&error).to_string()),
    }
}

fn recorded(command: &Command, appended: &Appended) -> Answer {
    let Some(positions) = &appended.positions else { return Answer::Wrong("no position".into()) };
    let version = |part: &Part| appended.versions.get(&part.scope).map(|version| version.0);
    match command.parts.iter().map(version).collect() {
        Some(versions) => Answer::Recorded {
            outcome: Outcome {
                first: positions.start().0,
                last: positions.end().0,
                epoch: appended.epoch.0,
                recorded_at: appended.recorded_at.0,
                versions,
            },
            repeated: appended.repeated,
        },
        None => Answer::Wrong("a scope has no version".into()),
    }
}

/// What an event says: the `n`th of its part of a command.
pub(crate) fn payload(scope: &str, n: u32, content: u32) -> String {
    let filler = "x".repeat(100);
    format!("{{\"scope\":\"{scope}\",\"n\":{n},\"content\":{content},\"filler\":\"{filler}\"}}")
}

fn request(command: &Command) -> AppendRequest {
    let part = |part: &Part| {
        let event = |n| NewEvent {
            event_type: "Tortured".into(),
            schema: 1,
            payload: payload(&part.scope, n, command.content),
        };
        ScopeAppend {
            scope: part.scope.clone(),
            expected: match part.expected {
                None => ExpectedVersion::Any,
                Some(0) => ExpectedVersion::Empty,
                Some(version) => ExpectedVersion::Exact(Version(version)),
            },
            events: (0..part.events).map(event).collect(),
        }
    };
    AppendRequest {
        command_id: command.id,
        fingerprint: None,
        actor: "torture".into(),
        reason: None,
        cause: None,
        scopes: command.parts.iter().map(part).collect(),
    }
}
