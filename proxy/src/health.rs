//! The health of the local app: probed by connecting to it, reported with a rising revision.
//!
//! [`Observer`] and [`Doubt`] are pure: probe results in, what changed out. The task around it reports changes, and the whole state again
//! after every registration, since a mesh that forgot the instance has forgotten its health too. A report that does not
//! get through is made again with the next probe. Nothing is reported before there is a snapshot: a healthy app behind a
//! sidecar that refuses everything would draw connections into refusals.

mod doubt;
mod observer;

use crate::clock;
use crate::config::Probe;
use crate::discovery::{Session, Sessions};
use crate::metrics;
use crate::preface;
use crate::shared::Shared;
use crate::status::Status;
use doubt::Doubt;
use observer::{Observer, Probed};
use rand::RngExt;
use rand::rngs::SmallRng;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use weft_client::{CallError, command};
use weft_model::health::{DETAIL_BYTES_MAX, Health};
use weft_proto::v1;
use weft_proto::v1::mesh_client::MeshClient;

/// Longest that a report may take before it is given up until the next probe.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

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
pub(crate) async fn run(shared: Arc<Shared>, status: Arc<Status>, probe: Probe, mut sessions: Sessions) {
    if shared.apps.is_empty() {
        return;
    }
    let mut rng: SmallRng = rand::make_rng();
    let mut snapshots = shared.subscribe();
    let mut reporter = Reporter { shared, revision: Revision(0) };
    let mut observer = Observer::new(probe.rise, probe.fall);
    let mut detail = String::new();
    let mut reported = 0;
    let mut failure = String::new();
    let mut doubt = Doubt::default();
    let mut due = Instant::now();
    loop {
        tokio::select! {
            () = sleep_until(due) => {
                let begun = Instant::now();
                doubt.fired(begun - due);
                doubt.set_cut_off(status.is_stale());
                metrics::self_doubt(doubt.score());
                let (probed, why) = probe_all(&reporter.shared, doubt.timeout(probe.timeout)).await;
                if observer.observe(probed, doubt.score()) {
                    detail = why;
                    metrics::app_healthy(observer.health() == Health::Healthy);
                    let (health, doubt) = (observer.health().as_str(), doubt.score());
                    tracing::info!(health, detail, doubt, "the app's health changed");
                    reported = 0;
                }
                // Spread, so that the sidecars of one machine do not probe in step. A probe that took longer than that is
                // followed by the next one at once.
                due = (begun + probe.interval.mul_f64(rng.random_range(0.9..=1.1))).max(Instant::now());
            }
            changed = sessions.changed() => if changed.is_err() { return },
            changed = snapshots.changed() => if changed.is_err() { return },
        }
        let session = sessions.borrow_and_update().clone();
        if let Some(session) = session
            && session.number != reported
            && observer.health() != Health::Unknown
            && snapshots.borrow_and_update().is_some()
            && !reporter.shared.draining()
        {
            match reporter.report(&session, observer.health(), doubt.score(), &detail).await {
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
            // That a probe waited for a report is no sign of anything.
            due = due.max(Instant::now());
        }
    }
}

/// Connects to the app on every port. Says what failed, if something did.
async fn probe_all(shared: &Shared, limit: Duration) -> (Probed, String) {
    for (port, address) in &shared.apps {
        let (probed, why) = probe_one(*address, limit, shared.proxy_protocol).await;
        if probed != Probed::Good {
            return (probed, format!("port {port} at {address}: {why}"));
        }
    }
    (Probed::Good, String::new())
}

async fn probe_one(address: SocketAddr, limit: Duration, proxy_protocol: bool) -> (Probed, String) {
    let connected = async {
        let mut app = TcpStream::connect(address).await?;
        if proxy_protocol {
            // An app that waits for a header is not left to wonder.
            app.write_all(&preface::own()?).await?;
        }
        Ok::<_, io::Error>(())
    };
    match timeout(limit, connected).await {
        Ok(Ok(_)) => (Probed::Good, String::new()),
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            (Probed::Refused, error.to_string())
        }
        Ok(Err(error)) => (Probed::Bad, error.to_string()),
        Err(_) => (Probed::Bad, format!("not accepted within {limit:?}")),
    }
}

struct Reporter {
    shared: Arc<Shared>,
    revision: Revision,
}

impl Reporter {
    async fn report(
        &mut self,
        session: &Session,
        health: Health,
        doubt: u8,
        detail: &str,
    ) -> Result<(), CallError> {
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
            doubt: doubt.into(),
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

    proptest! {
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
