//! What this controller knows of the log's history: whether it lost its end, and what to do about it.
//!
//! One task looks every second and
//! - says whether a finding stands, to /ready, to the metric `weft_log_rewound` and to the log;
//! - reports what this process has read or appended and the database then lost;
//! - makes an operator's decision an event of the log, if nobody did yet, and announces the root anew after it;
//! - keeps the newest witness in the state directory, so that the next start can tell, too.
//!
//! **After a decision.** A controller that has seen nothing of the lost events goes on by itself. One whose memory holds them
//! (its fold, its place in the log) cannot take them back: [`History::outdated`] tells, and the process ends with a failure, for
//! its supervisor to start it anew.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use weft_api::witness::{WITNESS_BYTES_MAX, Witnesses};
use weft_api::{Context, history};
use weft_eventlog::{Point, Reported, Rewind, StoreError, report_rewind};
use weft_model::{Chain, Name};

/// How often it looks: a person who waits for a decision to arrive waits as long, and a witness on disk is as old.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What the last look found.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    /// The oldest finding that stands.
    pub(crate) standing: watch::Sender<Option<Rewind>>,
    /// Told once this process remembers a history that was given up.
    pub(crate) outdated: CancellationToken,
}

/// The task's parts.
pub(crate) struct Watch {
    pub(crate) context: Context,
    pub(crate) name: Name,
    pub(crate) lost: watch::Receiver<Option<Point>>,
    pub(crate) history: History,
    pub(crate) kept: Kept,
    /// Puts the root into the log, if it is not there.
    pub(crate) announce:
        Box<dyn Fn() -> futures_util::future::BoxFuture<'static, anyhow::Result<()>> + Send + Sync>,
}

impl Watch {
    /// Looks until `drain`, and keeps the witness once more then.
    pub(crate) async fn run(mut self, drain: CancellationToken) {
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while drain.run_until_cancelled(ticks.tick()).await.is_some() {
            if let Some(Err(error)) = drain.run_until_cancelled(self.look()).await {
                tracing::debug!(error = %Chain(&error), "the log's history cannot be looked at");
            }
            self.keep().await;
        }
        self.keep().await;
    }

    /// Keeps what is published. While the log is rewound that is less than what an earlier process may have kept.
    async fn keep(&mut self) {
        if self.history.standing.borrow().is_none() {
            self.kept.keep(&self.context.witnesses).await;
        }
    }

    async fn look(&mut self) -> Result<(), StoreError> {
        let reader = &self.context.reader;
        let lost = *self.lost.borrow_and_update();
        let reported = match &lost {
            Some(point) => Some(report_rewind(reader, point, &format!("controller {}", self.name)).await?),
            None => None,
        };
        let standing = reader.standing_rewinds().await?.into_iter().next();
        metrics::gauge!("weft_log_rewound").set(f64::from(u8::from(standing.is_some())));
        let settled = standing.is_none() && self.history.standing.borrow().is_some();
        if let Some(rewind) = standing.as_ref().filter(|_| self.history.standing.borrow().is_none()) {
            tracing::error!(seen = %rewind.seen.version(), found = %rewind.found, witness = rewind.witness,
                "LOG_REWOUND: nothing is appended; look with `weft status`, and go on with `weft log adopt-history`");
        }
        let stands = standing.is_some();
        self.history.standing.send_replace(standing);
        if stands {
            return Ok(());
        }
        if reported == Some(Reported::GivenUp) {
            tracing::error!(
                "the log's history that this controller remembers was given up; it has to be started anew"
            );
            self.history.outdated.cancel();
            return Ok(());
        }
        self.record_adoption().await?;
        if settled {
            tracing::info!("the log was adopted as it is; appends go on");
            if let Err(error) = (self.announce)().await {
                tracing::error!(error = format!("{error:#}"), "the root is not announced yet");
            }
        }
        Ok(())
    }

    /// The decision is an event once the log's last one is of its epoch.
    async fn record_adoption(&self) -> Result<(), StoreError> {
        let Some(adoption) = self.context.reader.newest_adoption().await? else { return Ok(()) };
        let folded = self.context.view.read(|projection| projection.version().epoch);
        if folded >= adoption.epoch {
            return Ok(());
        }
        if let Err(error) = history::record(&self.context, &adoption).await {
            tracing::warn!(?error, "the adoption is no event of the log yet, trying again");
        }
        Ok(())
    }
}

/// The newest witness, in a file of the state directory.
#[derive(Debug)]
pub(crate) struct Kept {
    path: PathBuf,
    written: Option<bytes::Bytes>,
}

impl Kept {
    /// The file of the controller of this name: several may share a directory.
    pub(crate) fn new(state_dir: &Path, name: &Name) -> Self {
        Self { path: state_dir.join("witness").join(name.to_string()), written: None }
    }

    /// What an earlier process kept; none if there is nothing that can be read, which is no fault.
    pub(crate) fn load(&self) -> Option<bytes::Bytes> {
        let mut bytes = Vec::new();
        let limit = WITNESS_BYTES_MAX as u64 + 1;
        match File::open(&self.path).and_then(|file| file.take(limit).read_to_end(&mut bytes)) {
            Ok(_) => Some(bytes.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "the kept witness of the log cannot be read");
                None
            }
        }
    }

    /// Writes the newest witness, if it is another one.
    async fn keep(&mut self, witnesses: &Arc<Witnesses>) {
        let Some(newest) = witnesses.newest().filter(|newest| self.written.as_ref() != Some(newest)) else {
            return;
        };
        let (path, bytes) = (self.path.clone(), newest.clone());
        match spawn_blocking(move || write(&path, &bytes)).await {
            Ok(Ok(())) => self.written = Some(newest),
            Ok(Err(error)) => {
                tracing::warn!(path = %self.path.display(), %error, "the witness of the log is not on disk");
            }
            Err(error) => tracing::warn!(%error, "the witness of the log is not on disk"),
        }
    }
}

/// Replaces the file, so that a crash leaves the old one or the new one.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let new = path.with_extension("new");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_is_kept_is_private_and_bounded_and_its_absence_no_fault() {
        let dir = tempfile::tempdir().unwrap();
        let kept = Kept::new(dir.path(), &"c1".parse().unwrap());
        assert_eq!(kept.load(), None);
        write(&kept.path, b"one").unwrap();
        write(&kept.path, b"two").unwrap();
        assert_eq!(kept.load().as_deref(), Some(&b"two"[..]));
        assert_eq!(fs::metadata(&kept.path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&kept.path, vec![0; 1 << 20]).unwrap();
        assert_eq!(kept.load().unwrap().len(), WITNESS_BYTES_MAX + 1);
    }
}
