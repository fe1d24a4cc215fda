//! The health of the local app: probed by connecting to it, reported with a rising revision.
//!
//! [`Observer`] is pure: probe results in, what changed out. The task around it reports changes, and the whole state again
//! after every registration, since a mesh that forgot the instance has forgotten its health too. A report that does not
//! get through is made again with the next probe. Nothing is reported before there is a snapshot: a healthy app behind a
//! sidecar that refuses everything would draw connections into refusals.

use crate::clock;
use crate::config::Probe;
use crate::discovery::{Session, Sessions};
use crate::metrics;
use crate::shared::Shared;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{MissedTickBehavior, interval, timeout};
use weft_client::{CallError, command};
use weft_model::health::{DETAIL_BYTES_MAX, Health};
use weft_proto::v1;
use weft_proto::v1::mesh_client::MeshClient;

/// Longest that a report may take before it is given up until the next probe.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Counts probe results: so many good ones in a row make the app healthy, so many bad ones unhealthy.
#[derive(Debug)]
struct Observer {
    rise: u32,
    fall: u32,
    health: Health,
    /// Results in a row that speak against `health`, the last one good or bad.
    against: (bool, u32),
}

impl Observer {
    const fn new(rise: u32, fall: u32) -> Self {
        Self { rise, fall, health: Health::Unknown, against: (false, 0) }
    }

    /// Takes a result in. True if the health changed.
    const fn observe(&mut self, good: bool) -> bool {
        let settled = matches!((good, self.health), (true, Health::Healthy) | (false, Health::Unhealthy));
        if settled {
            self.against = (good, 0);
            return false;
        }
        let count = if self.against.0 == good { self.against.1 + 1 } else { 1 };
        self.against = (good, count);
        if count < if good { self.rise } else { self.fall } {
            return false;
        }
        self.health = if good { Health::Healthy } else { Health::Unhealthy };
        self.against = (good, 0);
        true
    }
}

/// Orders the reports of this instance. Starts at the clock, so that it rises across restarts; if somebody reported a
/// higher one all the same, jumps above that.
#[derive(Debug)]
struct Revision(u64);

impl Revision {
    fn next(&mut self, now_ms: u64) -> u64 {
        self.0 = now_ms.max(self.0.saturating_add(1));
        self.0
    }

    fn jump_above(&mut self, recorded: u64) {
        self.0 = self.0.max(recorded);
    }
}

/// Probes and reports until the task is aborted. Without an app there is nothing to say: nobody is sent here.
pub(crate) async fn run(shared: Arc<Shared>, probe: Probe, mut sessions: Sessions) {
    if shared.apps.is_empty() {
        return;
    }
    let mut snapshots = shared.subscribe();
    let mut reporter = Reporter { shared, revision: Revision(0) };
    let mut observer = Observer::new(probe.rise, probe.fall);
    let mut detail = String::new();
    let mut reported = 0;
    let mut failure = String::new();
    let mut ticks = interval(probe.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let result = probe_all(&reporter.shared, probe.timeout).await;
                if observer.observe(result.is_ok()) {
                    detail = result.err().unwrap_or_default();
                    metrics::app_healthy(observer.health == Health::Healthy);
                    tracing::info!(health = observer.health.as_str(), detail, "the app's health changed");
                    reported = 0;
                }
            }
            changed = sessions.changed() => if changed.is_err() { return },
            changed = snapshots.changed() => if changed.is_err() { return },
        }
        let session = sessions.borrow_and_update().clone();
        if let Some(session) = session
            && session.number != reported
            && observer.health != Health::Unknown
            && snapshots.borrow_and_update().is_some()
            && !reporter.shared.draining()
        {
            match reporter.report(&session, observer.health, &detail).await {
                Ok(()) => {
                    reported = session.number;
                    failure.clear();
                }
                Err(error) => {
                    // Once for each text, not with every probe.
                    let error = error.to_string();
                    if error != failure {
                        tracing::warn!(error, "the app's health is not reported; trying with every probe");
                        failure = error;
                    }
                }
            }
        }
    }
}

/// Connects to the app on every port. The error says what failed.
async fn probe_all(shared: &Shared, limit: Duration) -> Result<(), String> {
    for (port, address) in &shared.apps {
        probe_one(*address, limit).await.map_err(|error| format!("port {port} at {address}: {error}"))?;
    }
    Ok(())
}

async fn probe_one(address: SocketAddr, limit: Duration) -> Result<(), String> {
    match timeout(limit, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("not accepted within {limit:?}")),
    }
}

struct Reporter {
    shared: Arc<Shared>,
    revision: Revision,
}

impl Reporter {
    async fn report(&mut self, session: &Session, health: Health, detail: &str) -> Result<(), CallError> {
        let detail: String = detail.chars().filter(|char| !char.is_control()).collect();
        let mut request = v1::ReportHealthRequest {
            meta: None,
            instance: self.shared.own.to_string(),
            health: match health {
                Health::Healthy => v1::Health::Healthy,
                Health::Unhealthy => v1::Health::Unhealthy,
                Health::Unknown => v1::Health::Unknown,
            }
            .into(),
            revision: 0,
            detail: detail[..detail.floor_char_boundary(DETAIL_BYTES_MAX)].to_owned(),
        };
        // Twice: a stale revision is put right once; if it is stale again, somebody else reports for this instance.
        let mut last = None;
        for _ in 0..2 {
            request.meta = Some(command("the app's health"));
            request.revision = self.revision.next(u64::try_from(clock::now().0).unwrap_or_default());
            let mut mesh = MeshClient::new(session.channel.clone());
            let answer = timeout(REPORT_TIMEOUT, mesh.report_health(request.clone())).await;
            match answer.map_err(|_| CallError::Unreachable("no answer".into()))?.map_err(CallError::from) {
                Ok(_) => return Ok(()),
                Err(CallError::Rejected { current_revision, message, .. })
                    if current_revision >= request.revision =>
                {
                    self.revision.jump_above(current_revision);
                    last = Some(message);
                }
                Err(error) => return Err(error),
            }
        }
        Err(CallError::Denied(last.unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn so_many_in_a_row_decide() {
        let mut observer = Observer::new(2, 3);
        let healths: Vec<_> = [true, true, false, false, true, false, false, false, true, false, true, true]
            .into_iter()
            .map(|good| {
                observer.observe(good);
                observer.health.as_str().as_bytes()[1]
            })
            .collect();
        // unknown, healthy from the 2nd on, unhealthy from the 8th on, healthy again at the last
        assert_eq!(String::from_utf8(healths).unwrap(), "neeeeeennnne");
    }

    proptest! {
        #[test]
        fn a_change_is_told_exactly_when_there_is_one(results: Vec<bool>, rise in 1u32..5, fall in 1u32..5) {
            let mut observer = Observer::new(rise, fall);
            for (index, good) in results.iter().enumerate() {
                let before = observer.health;
                prop_assert_eq!(observer.observe(*good), observer.health != before);
                let run = results[..=index].iter().rev().take_while(|other| *other == good).count();
                if run >= if *good { rise } else { fall } as usize {
                    prop_assert_eq!(observer.health == Health::Healthy, *good);
                }
            }
        }

        #[test]
        fn revisions_rise_whatever_the_clock_does(steps: Vec<(u32, Option<u32>)>) {
            let mut revision = Revision(0);
            let mut last = 0;
            for (now, recorded) in steps {
                if let Some(recorded) = recorded {
                    revision.jump_above(recorded.into());
                    last = last.max(recorded.into());
                }
                let next = revision.next(now.into());
                prop_assert!(next > last);
                last = next;
            }
        }
    }
}
