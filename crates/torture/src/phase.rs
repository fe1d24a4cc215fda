//! What is done to the log, one phase after the other, each on a log of its own.

mod controller;
mod edits;
mod kills;
mod wal;

use anyhow::Context;
use futures_util::TryStreamExt as _;
use serde::Serialize;
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use weft_eventlog::{ArchiveConfig, Reader, archive};
use weft_model::Position;

use crate::child::Worker;
use crate::journal::{Event, Journal, Polled, Verdict};
use crate::leader::Times;
use crate::proxy::Proxy;
use crate::server::Postgres;
use crate::watch::{Poller, head, read_all};
use crate::writer::{Habits, Writers};

pub(crate) use controller::{controller, projected};
pub(crate) use edits::edits;
pub(crate) use kills::{ambiguous, kills, server_kills, writers};
pub(crate) use wal::wal_full;

/// Events in a range of the log for each event of the largest command: some hundred commands fill one.
const COMMANDS_PER_RANGE: u32 = 125;

/// Longest wait for writers to get on with it after a fault.
pub(crate) const PROGRESS_MAX: Duration = Duration::from_secs(90);

/// What a phase did, and what it found.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Findings {
    /// By name: what was done, and how often.
    pub(crate) done: BTreeMap<String, u64>,
    /// Commands that were acknowledged, answers that were repeated, events in the log.
    pub(crate) acknowledged: u64,
    pub(crate) repeats: u64,
    pub(crate) events: u64,
    #[serde(flatten)]
    pub(crate) verdict: Verdict,
    /// From a fault to the next publication, by fault.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) times: BTreeMap<String, Times>,
    /// In words; empty if nothing is wrong.
    pub(crate) complaints: Vec<String>,
}

impl Findings {
    pub(crate) fn is_sound(&self) -> bool {
        self.verdict.is_sound() && self.complaints.is_empty()
    }

    pub(crate) fn count(&mut self, what: &str) {
        *self.done.entry(what.to_owned()).or_default() += 1;
    }

    pub(crate) fn complain(&mut self, what: impl Into<String>) {
        self.complaints.push(what.into());
    }
}

/// Workers with their writers on one log, and a reader that polls it.
struct Scene {
    database: String,
    proxies: Vec<Arc<Proxy>>,
    workers: Vec<Arc<Worker>>,
    writers: Writers,
    poller: Poller,
}

impl Scene {
    /// So many processes with so many writers each.
    async fn set(
        server: &Postgres,
        database: &str,
        processes: u32,
        writers_each: u32,
        seed: u64,
        habits: Habits,
    ) -> anyhow::Result<Self> {
        server.make_log(database, COMMANDS_PER_RANGE * habits.events_max).await?;
        let mut scene = Self {
            database: database.to_owned(),
            proxies: Vec::new(),
            workers: Vec::new(),
            writers: Writers::new(),
            poller: Poller::start(server.url(database)?),
        };
        for process in 0..processes {
            let proxy = Arc::new(Proxy::before(server.port()?).await?);
            let url = server.url_through(proxy.port(), database)?;
            let worker = Arc::new(Worker::keep(Arc::clone(&proxy), url));
            scene.writers.add(&worker, writers_each, seed.wrapping_add(u64::from(process) << 32), habits);
            scene.proxies.push(proxy);
            scene.workers.push(worker);
        }
        Ok(scene)
    }

    /// Waits until so many more commands were acknowledged.
    async fn progress(&self, commands: u64) -> anyhow::Result<()> {
        let enough = self.writers.acknowledged() + commands;
        let wait = async {
            while self.writers.acknowledged() < enough {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PROGRESS_MAX, wait).await.context("writers do not get on any more")
    }

    /// The server was started again.
    fn follow(&self, server: &Postgres) -> anyhow::Result<()> {
        let port = server.port()?;
        self.proxies.iter().for_each(|proxy| proxy.follow(port));
        self.poller.follow(server.url(&self.database)?);
        Ok(())
    }

    /// Lets everybody finish, and judges. Only so many processes may have died as were killed.
    async fn close(self, server: &Postgres, killed: u64, findings: &mut Findings) -> anyhow::Result<()> {
        let ended = timeout(PROGRESS_MAX, self.writers.end()).await;
        let journal = ended.context("writers do not finish")??;
        let polled = self.poller.end().await;
        let deaths: u64 = self.workers.iter().map(|worker| worker.deaths()).sum();
        if deaths != killed {
            findings.complain(format!("{deaths} processes died, but {killed} were killed"));
        }
        judge(server, &self.database, &journal, &polled, findings).await
    }
}

async fn judge(
    server: &Postgres,
    database: &str,
    journal: &Journal,
    polled: &[Polled],
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let url = server.url(database)?;
    let log = read_all(&url).await?;
    findings.verdict += journal.judge(&log, polled);
    findings.acknowledged += journal.acknowledged();
    findings.repeats += journal.repeats();
    findings.events += head(&url).await?;
    findings.complaints.extend(journal.complaints().map(str::to_owned));
    verify(&url, findings).await?;
    seal(&url, &log, findings).await?;
    verify(&url, findings).await
}

pub(crate) async fn verify(url: &str, findings: &mut Findings) -> anyhow::Result<()> {
    if let Err(error) = weft_eventlog::verify(&Reader::new(url.parse()?), |_| ()).await {
        findings.complain(weft_model::Chain(&error).to_string());
    }
    Ok(())
}

/// Seals every full range, once nobody repeats anything any more; what is read then must be what was there.
async fn seal(url: &str, log: &[Event], findings: &mut Findings) -> anyhow::Result<()> {
    let config = ArchiveConfig { connect: url.parse()?, older_than: Duration::ZERO, forget_outcomes: true };
    let sealed = archive(&config, |_| ()).await?;
    *findings.done.entry("sealed events".to_owned()).or_default() += sealed.events;
    let mut expected = log.iter();
    let mut pages = pin!(Reader::new(url.parse()?).replay(Position::ZERO, Position(log.len() as u64)));
    while let Some(page) = pages.try_next().await? {
        for event in page.events() {
            let same = expected.next().is_some_and(|expected| {
                (expected.position, &*expected.scope, expected.version, expected.command)
                    == (event.position.0, event.scope, event.version.0, event.command_id)
                    && (expected.epoch, expected.recorded_at, &*expected.payload)
                        == (event.epoch.0, event.recorded_at.0, event.payload)
            });
            if !same {
                findings.complain(format!("event {} is read otherwise once it is sealed", event.position));
                return Ok(());
            }
        }
    }
    if let Some(missing) = expected.next() {
        findings.complain(format!("event {} is not read once it is sealed", missing.position));
    }
    Ok(())
}
