//! Writers: each asks its worker for one thing after the other, and knows at any moment what it was told.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::child::Worker;
use crate::journal::Journal;
use crate::worker::{Answer, Command, Part};

/// Scopes that writers share, and fight for.
const SHARED_SCOPES: u32 = 8;

/// How writers behave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Habits {
    /// Most events of a command.
    pub(crate) events_max: u32,
    /// Share of commands that are asked again after they were answered.
    pub(crate) repeats: f64,
}

/// Writers at work. They end with the value; better is [`Writers::end`].
#[derive(Debug)]
pub(crate) struct Writers {
    journal: Arc<Mutex<Journal>>,
    ending: Arc<AtomicBool>,
    tasks: JoinSet<anyhow::Result<()>>,
}

impl Writers {
    pub(crate) fn new() -> Self {
        Self { journal: Arc::default(), ending: Arc::default(), tasks: JoinSet::new() }
    }

    /// Lets `count` more writers ask this worker.
    pub(crate) fn add(&mut self, worker: &Arc<Worker>, count: u32, seed: u64, habits: Habits) {
        for _ in 0..count {
            let name = self.tasks.len();
            let writer = Writer {
                worker: Arc::clone(worker),
                journal: Arc::clone(&self.journal),
                ending: Arc::clone(&self.ending),
                rng: StdRng::seed_from_u64(seed.wrapping_add(name as u64)),
                scope: format!("own/{name}"),
                version: 0,
                shared: BTreeMap::new(),
                habits,
            };
            self.tasks.spawn(writer.run());
        }
    }

    /// Commands that were acknowledged so far.
    pub(crate) fn acknowledged(&self) -> u64 {
        lock(&self.journal).acknowledged()
    }

    /// Lets everybody finish what they wait for, and returns what was asked and told.
    pub(crate) async fn end(mut self) -> anyhow::Result<Journal> {
        self.ending.store(true, Ordering::SeqCst);
        while let Some(ended) = self.tasks.join_next().await {
            ended??;
        }
        Ok(std::mem::take(&mut *lock(&self.journal)))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Writer {
    worker: Arc<Worker>,
    journal: Arc<Mutex<Journal>>,
    ending: Arc<AtomicBool>,
    rng: StdRng,
    scope: String,
    /// Of its own scope, which nobody else writes: what it was told last.
    version: u64,
    /// Of those that others write, too.
    shared: BTreeMap<String, u64>,
    habits: Habits,
}

impl Writer {
    async fn run(mut self) -> anyhow::Result<()> {
        while !self.ending.load(Ordering::SeqCst) {
            let command = self.invent();
            let answer = self.insist(&command).await?;
            if let Answer::Conflict { scope, current } = &answer {
                self.shared.insert(scope.clone(), *current);
            }
            if let Answer::Recorded { outcome, .. } = &answer {
                self.version = outcome.versions.first().copied().unwrap_or(self.version);
                let shared = command.parts.iter().zip(&outcome.versions).skip(1);
                self.shared.extend(shared.map(|(part, version)| (part.scope.clone(), *version)));
                if self.rng.random_bool(self.habits.repeats) {
                    let content = u32::from(self.rng.random_bool(0.3));
                    self.insist(&Command { content, ..command }).await?;
                }
            }
        }
        Ok(())
    }

    /// Something that expects its own scope as it was told it is; sometimes with a scope that others write as well, often
    /// expecting that one, too, to be as it was told last, which somebody else may have changed.
    fn invent(&mut self) -> Command {
        let events = self.rng.random_range(1..=self.habits.events_max);
        let mut parts = vec![Part { scope: self.scope.clone(), expected: Some(self.version), events }];
        if self.rng.random_bool(0.2) {
            let scope = format!("shared/{}", self.rng.random_range(0..SHARED_SCOPES));
            let known = self.shared.get(&scope).copied().unwrap_or_default();
            let expected = self.rng.random_bool(0.6).then_some(known);
            parts.push(Part { scope, expected, events: 1 });
        }
        Command { id: Uuid::now_v7(), content: 0, parts }
    }

    /// Asks until there is an answer that is one.
    async fn insist(&mut self, command: &Command) -> anyhow::Result<Answer> {
        lock(&self.journal).ask(command);
        loop {
            match self.worker.ask(command).await? {
                Answer::Again(_) => {}
                answer => {
                    lock(&self.journal).answer(command, &answer);
                    return Ok(answer);
                }
            }
        }
    }
}
