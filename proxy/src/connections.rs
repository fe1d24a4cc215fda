//! Connections: what is known of each, who is live, and how one is cut.
//!
//! A connection is registered when it is accepted, *before* it is checked against the snapshot, and every new snapshot is
//! swapped in *before* the live ones are checked again ([`crate::shared`]). So a connection that the new snapshot refuses
//! is refused by its own check or cut by the other; it cannot slip between the two. A stop closes the registry *before*
//! it cuts what is in it, for the same reason.
//!
//! Each connection ends in [`Connection::finish`], which makes its record and counts it, once.

use crate::clock;
use crate::metrics;
use crate::records::{Record, RecordSender};
use crate::standing::Standing;
use crate::tally::Tally;
use crate::tunnel::copy::{Counters, Ended, Side};
use serde::Serialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use weft_model::{CloseReason, ConfigVersion, InstanceId, Name, Port, ServiceName, Timestamp};

/// Parts of the registry, so that threads seldom meet at one lock.
const PARTS: usize = 16;

/// Which way a connection goes, seen from the app.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Direction {
    /// From another sidecar to the app.
    Inbound,
    /// From the app to another sidecar.
    Outbound,
}

impl Direction {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// Who ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ClosedBy {
    /// Who opened it.
    Client,
    /// Who serves it.
    Server,
    /// This sidecar.
    Local,
}

/// How and why a connection ended, or never began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Close {
    pub(crate) reason: CloseReason,
    pub(crate) by: ClosedBy,
    pub(crate) rule: Option<String>,
    /// More, in words; may be empty.
    pub(crate) detail: String,
}

impl Close {
    pub(crate) fn new(reason: CloseReason, by: ClosedBy, detail: impl Into<String>) -> Self {
        Self { reason, by, rule: None, detail: detail.into() }
    }

    /// Ended by this sidecar.
    pub(crate) fn local(reason: CloseReason, detail: impl Into<String>) -> Self {
        Self::new(reason, ClosedBy::Local, detail)
    }

    pub(crate) fn with_rule(self, rule: String) -> Self {
        Self { rule: Some(rule), ..self }
    }
}

impl From<Ended> for Close {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Cleanly(Side::Downstream) => Self::new(CloseReason::ClientFin, ClosedBy::Client, ""),
            Ended::Cleanly(Side::Upstream) => Self::new(CloseReason::ServerFin, ClosedBy::Server, ""),
            Ended::Broken(Side::Downstream, error) => {
                Self::new(CloseReason::ClientReset, ClosedBy::Client, error.to_string())
            }
            Ended::Broken(Side::Upstream, error) => {
                Self::new(CloseReason::ServerReset, ClosedBy::Server, error.to_string())
            }
        }
    }
}

/// What is known of a connection; more and more while it is opened.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Facts {
    pub(crate) connection_id: Uuid,
    /// Where the application's connection came from; for an inbound one that was opened, as its sidecar claims.
    pub(crate) source: Option<SocketAddr>,
    /// Where the other sidecar really connected from, if it is inbound.
    pub(crate) peer: Option<SocketAddr>,
    /// The SPIFFE id of who connects.
    pub(crate) source_identity: Option<Arc<str>>,
    /// Its service, which policies are about.
    #[serde(skip)]
    pub(crate) source_service: Option<ServiceName>,
    pub(crate) destination: Option<ServiceName>,
    pub(crate) port: Option<Port>,
    /// Where the connection was opened to: a sidecar's address, or the local app's.
    pub(crate) endpoint: Option<SocketAddr>,
    /// Which instance that is.
    pub(crate) endpoint_identity: Option<InstanceId>,
    /// Why it was chosen.
    pub(crate) pick: Option<&'static str>,
    /// How near it is, if the policy prefers near ones: `zone`, `region` or `elsewhere`.
    pub(crate) locality: Option<&'static str>,
    /// Which subset it belongs to, if the policy has some.
    pub(crate) subset: Option<Name>,
    #[serde(serialize_with = "as_text")]
    pub(crate) config_version: Option<ConfigVersion>,
    /// What the verdict rests on.
    pub(crate) rule: Option<String>,
    /// `enforce`, or `audit` if a policy in audit mode would have refused.
    pub(crate) mode: Option<&'static str>,
    /// Policies have permitted it: snapshots are held against it from here on.
    #[serde(skip)]
    pub(crate) admitted: bool,
    /// That they do not any more, and what spares it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) forbidden: Option<Box<Forbidden>>,
    /// What the two ends speak inside TLS: `weft/1`, or `plain_tls` if the client is no sidecar.
    pub(crate) protocol: Option<&'static str>,
    pub(crate) tls: Option<&'static str>,
    pub(crate) key_exchange: Option<&'static str>,
    /// Whether the tunnel had carried another connection before; none while there is none.
    pub(crate) tunnel_reused: Option<bool>,
    /// From accepting to carrying bytes; none before.
    pub(crate) connect_ms: Option<f64>,
    pub(crate) attempts: u32,
}

/// A live connection that policies do not permit any more, and that is not cut yet.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Forbidden {
    /// `grace` or `keep`.
    pub(crate) on_change: &'static str,
    /// What forbids it.
    pub(crate) rule: String,
    /// The first version that did.
    #[serde(serialize_with = "display")]
    pub(crate) as_of: ConfigVersion,
    /// When it is cut; none if it is kept.
    pub(crate) ends: Option<String>,
    #[serde(skip)]
    pub(crate) standing: Standing,
}

fn display<S: serde::Serializer>(version: &ConfigVersion, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(version)
}

fn as_text<S: serde::Serializer>(version: &Option<ConfigVersion>, serializer: S) -> Result<S::Ok, S::Error> {
    match version {
        Some(version) => serializer.collect_str(version),
        None => serializer.serialize_none(),
    }
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) direction: Direction,
    /// When it was accepted.
    pub(crate) started: Instant,
    pub(crate) counters: Counters,
    /// How many bytes of each way were counted in the metrics already.
    pub(crate) reported: (AtomicU64, AtomicU64),
    opened_at: Timestamp,
    facts: Mutex<Facts>,
    /// That policies forbid it was counted already.
    told_forbidden: AtomicBool,
    cut: CancellationToken,
    cause: OnceLock<Close>,
    records: RecordSender,
    tally: Arc<Tally>,
}

impl Connection {
    /// A connection that was just accepted.
    pub(crate) fn begin(
        direction: Direction,
        facts: Facts,
        records: RecordSender,
        tally: Arc<Tally>,
    ) -> Arc<Self> {
        metrics::opened(direction);
        Arc::new(Self {
            direction,
            started: Instant::now(),
            counters: Counters::default(),
            reported: (AtomicU64::new(0), AtomicU64::new(0)),
            opened_at: clock::now(),
            facts: Mutex::new(facts),
            told_forbidden: AtomicBool::new(false),
            cut: CancellationToken::new(),
            cause: OnceLock::new(),
            records,
            tally,
        })
    }

    /// What is known of it, to read or to add to.
    pub(crate) fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it from outside; the first cause counts.
    pub(crate) fn cut(&self, cause: Close) {
        // Set before the token, so that who sees the token sees the cause.
        let _ = self.cause.set(cause);
        self.cut.cancel();
    }

    /// Policies forbid it, and it is spared. Whoever watches a rollout learns it now and not when it ends, which may be much later.
    pub(crate) fn spared(&self) {
        if !self.told_forbidden.swap(true, Ordering::Relaxed) {
            self.tally.forbidden();
        }
    }

    /// Cuts it if its grace is over. Returns when that will be if it is not.
    pub(crate) fn end_grace(&self, now: Instant) -> Option<Instant> {
        let facts = self.facts();
        let forbidden = facts.forbidden.as_ref()?;
        let ends = forbidden.standing.ends()?;
        if ends > now {
            return Some(ends);
        }
        let detail = format!("refused as of version {}, and its grace is over", forbidden.as_of);
        let close = Close::local(CloseReason::PolicyChanged, detail).with_rule(forbidden.rule.clone());
        self.cut(close);
        None
    }

    /// Waits until it is cut, and says why.
    async fn was_cut(&self) -> Close {
        self.cut.cancelled().await;
        self.cause
            .get()
            .cloned()
            .unwrap_or_else(|| Close::local(CloseReason::Internal, "cut without a cause"))
    }

    /// Does something for it, until it is cut.
    pub(crate) async fn unless_cut<T>(
        &self,
        work: impl Future<Output = Result<T, Close>>,
    ) -> Result<T, Close> {
        tokio::select! {
            biased;
            cause = self.was_cut() => Err(cause),
            done = work => done,
        }
    }

    /// It carries bytes from now on.
    pub(crate) fn established(&self) {
        let took = self.started.elapsed();
        metrics::connected(self.direction, took);
        let mut facts = self.facts();
        if self.tells_of_policies(&facts) {
            self.tally.established();
        }
        facts.connect_ms = Some(milliseconds(took));
    }

    /// Whether how it goes says anything about policies: not if it comes from whoever did not say who it is, who may be anybody, nor if it
    /// goes where there is no mesh.
    fn tells_of_policies(&self, facts: &Facts) -> bool {
        match self.direction {
            Direction::Inbound => facts.source_service.is_some(),
            Direction::Outbound => facts.destination.is_some(),
        }
    }

    /// It is opened to another endpoint: nobody has said anything yet, and what it was opened to has gone.
    pub(crate) fn reopening(&self) {
        self.facts().connect_ms = None;
        self.tally.reopening();
    }

    /// Writes its record.
    pub(crate) fn finish(&self, close: Close) {
        metrics::closed(self, close.reason);
        let mut facts = self.facts().clone();
        if self.tells_of_policies(&facts) {
            let told = self.told_forbidden.load(Ordering::Relaxed);
            self.tally.ended(close.reason, facts.connect_ms.is_some(), told);
        }
        facts.rule = close.rule.or(facts.rule);
        self.records.send(Record {
            time: clock::rfc3339(clock::now()),
            direction: self.direction,
            facts,
            first_byte_ms: self.counters.first_byte().map(milliseconds),
            duration_ms: milliseconds(self.started.elapsed()),
            bytes_up: self.counters.up.load(Ordering::Relaxed),
            bytes_down: self.counters.down.load(Ordering::Relaxed),
            close_reason: close.reason,
            closed_by: close.by,
            detail: close.detail,
        });
    }

    /// As the admin page shows it.
    pub(crate) fn view(&self) -> ConnectionView {
        ConnectionView {
            direction: self.direction,
            facts: self.facts().clone(),
            opened: clock::rfc3339(self.opened_at),
            age_ms: milliseconds(self.started.elapsed()),
            bytes_up: self.counters.up.load(Ordering::Relaxed),
            bytes_down: self.counters.down.load(Ordering::Relaxed),
        }
    }
}

/// Milliseconds with three digits behind the point.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// A live connection, for people.
#[derive(Debug, Serialize)]
pub(crate) struct ConnectionView {
    direction: Direction,
    #[serde(flatten)]
    facts: Facts,
    opened: String,
    age_ms: f64,
    bytes_up: u64,
    bytes_down: u64,
}

/// Every live connection.
#[derive(Debug)]
pub(crate) struct Registry {
    /// Most that may live at once.
    most: usize,
    parts: [Mutex<BTreeMap<u64, Arc<Connection>>>; PARTS],
    next: AtomicU64,
    live: AtomicUsize,
    inbound: AtomicUsize,
    /// Why nothing is taken any more.
    closed: OnceLock<Close>,
}

impl Registry {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            parts: Default::default(),
            next: AtomicU64::new(0),
            live: AtomicUsize::new(0),
            inbound: AtomicUsize::new(0),
            closed: OnceLock::new(),
        })
    }

    /// Makes a connection known until the guard is dropped.
    ///
    /// # Errors
    /// If there are as many as there may be, or the registry is closed.
    pub(crate) fn register(self: &Arc<Self>, connection: &Arc<Connection>) -> Result<Registered, Close> {
        if self.live.fetch_add(1, Ordering::Relaxed) >= self.most {
            self.live.fetch_sub(1, Ordering::Relaxed);
            return Err(Close::local(CloseReason::Overload, format!("{} connections are live", self.most)));
        }
        if connection.direction == Direction::Inbound {
            self.inbound.fetch_add(1, Ordering::Relaxed);
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.part(number).insert(number, Arc::clone(connection));
        let registered = Registered { registry: Arc::clone(self), number, direction: connection.direction };
        // After the insertion: who closes finds this connection, or this finds the cause.
        self.closed.get().map_or(Ok(registered), |cause| Err(cause.clone()))
    }

    /// Cuts every connection, and refuses those that come later. Returns how many were cut.
    pub(crate) fn close(&self, cause: &Close) -> usize {
        let _ = self.closed.set(cause.clone());
        let mut cut = 0;
        self.for_each(|connection| {
            connection.cut(cause.clone());
            cut += 1;
        });
        cut
    }

    /// How many are live.
    pub(crate) fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// How many of them are inbound.
    pub(crate) fn live_inbound(&self) -> usize {
        self.inbound.load(Ordering::Relaxed)
    }

    pub(crate) fn for_each(&self, mut visit: impl FnMut(&Arc<Connection>)) {
        for part in &self.parts {
            // Copied, so that nobody who opens or closes a connection waits for the visit.
            let connections: Vec<_> = lock(part).values().cloned().collect();
            connections.iter().for_each(&mut visit);
        }
    }

    fn part(&self, number: u64) -> MutexGuard<'_, BTreeMap<u64, Arc<Connection>>> {
        #[expect(clippy::cast_possible_truncation, reason = "a remainder of PARTS")]
        let index = (number % PARTS as u64) as usize;
        lock(&self.parts[index])
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place in the registry.
#[derive(Debug)]
pub(crate) struct Registered {
    registry: Arc<Registry>,
    number: u64,
    direction: Direction,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.registry.part(self.number).remove(&self.number);
        self.registry.live.fetch_sub(1, Ordering::Relaxed);
        if self.direction == Direction::Inbound {
            self.registry.inbound.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConnectionLog;

    #[test]
    fn who_comes_after_the_end_is_told_why() {
        let dir = tempfile::tempdir().unwrap();
        let (records, _writer) = crate::records::start(&ConnectionLog::File(dir.path().join("log"))).unwrap();
        let begin =
            || Connection::begin(Direction::Inbound, Facts::default(), records.clone(), Arc::default());
        let registry = Registry::new(2);
        let early = begin();
        let registered = registry.register(&early).unwrap();
        let cause = Close::local(CloseReason::DrainDeadline, "over");
        assert_eq!(registry.close(&cause), 1);
        assert!(early.cut.is_cancelled());
        assert_eq!(registry.register(&begin()).unwrap_err(), cause);
        assert_eq!((registry.live(), registry.live_inbound()), (1, 1));
        drop(registered);
        assert_eq!((registry.live(), registry.live_inbound()), (0, 0));
    }

    #[test]
    fn the_newest_is_refused_when_there_are_too_many() {
        let dir = tempfile::tempdir().unwrap();
        let (records, _writer) = crate::records::start(&ConnectionLog::File(dir.path().join("log"))).unwrap();
        let begin =
            || Connection::begin(Direction::Outbound, Facts::default(), records.clone(), Arc::default());
        let registry = Registry::new(2);
        let _first = registry.register(&begin()).unwrap();
        let second = registry.register(&begin()).unwrap();
        assert_eq!(registry.register(&begin()).unwrap_err().reason, CloseReason::Overload);
        drop(second);
        assert!(registry.register(&begin()).is_ok());
    }
}
