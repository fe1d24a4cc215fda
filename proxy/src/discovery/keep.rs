//! Snapshots on their way to the disk: one write at a time, the newest next. A disk that hangs holds up one blocking
//! thread and nobody who waits here for longer than [`DISK_WAIT`].

use super::disk;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use weft_model::{Chain, ConfigVersion, InstanceId};
use weft_routing::Snapshot;

/// How long a new snapshot waits for the disk before it counts all the same. A healthy disk takes milliseconds; a quarter
/// of the default propagation bound is what a deny may lose to a sick one.
pub(crate) const DISK_WAIT: Duration = Duration::from_millis(250);

/// How often a write that failed is tried again while no newer snapshot comes: the disk may have been full.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// How writing a snapshot went; the error is for people.
type Written = Option<(ConfigVersion, Result<(), String>)>;

/// See the module's documentation.
pub(crate) struct Keeper {
    newest: watch::Sender<Option<Arc<Snapshot>>>,
    written: watch::Receiver<Written>,
}

impl Keeper {
    /// A keeper, and the task that writes for it.
    pub(crate) fn new(dir: PathBuf, instance: InstanceId) -> (Self, impl Future<Output = ()> + Send) {
        let (newest, to_write) = watch::channel(None);
        let (done, written) = watch::channel(None);
        (Self { newest, written }, write_newest(to_write, done, dir, instance))
    }

    /// Writes a snapshot. Says why if it is not on disk after [`DISK_WAIT`]; it is still being written or tried again then.
    pub(crate) async fn keep(&mut self, snapshot: &Arc<Snapshot>) -> Result<(), String> {
        self.newest.send_replace(Some(Arc::clone(snapshot)));
        let done = self
            .written
            .wait_for(|written| matches!(written, Some((version, _)) if *version >= snapshot.version));
        match timeout(DISK_WAIT, done).await {
            Ok(Ok(written)) => written.as_ref().map_or(Ok(()), |(_, result)| result.clone()),
            Ok(Err(_)) => Err("nobody writes snapshots to the disk any more".into()),
            Err(_) => Err(format!("the disk did not take the snapshot within {DISK_WAIT:?}")),
        }
    }

    /// Waits until this version is on disk.
    pub(crate) async fn kept(&mut self, wanted: ConfigVersion) {
        let kept = |written: &Written| matches!(written, Some((version, Ok(()))) if *version >= wanted);
        if self.written.wait_for(kept).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

async fn write_newest(
    mut newest: watch::Receiver<Option<Arc<Snapshot>>>,
    written: watch::Sender<Written>,
    dir: PathBuf,
    instance: InstanceId,
) {
    let mut failed = false;
    loop {
        tokio::select! {
            changed = newest.changed() => if changed.is_err() { return },
            () = sleep(RETRY_INTERVAL), if failed => {}
        }
        let Some(snapshot) = newest.borrow_and_update().clone() else { continue };
        let version = snapshot.version;
        let (dir, instance) = (dir.clone(), instance.clone());
        let result = match spawn_blocking(move || disk::save(&dir, &instance, &snapshot)).await {
            Ok(saved) => saved.map_err(|error| Chain(&error).to_string()),
            Err(error) => Err(error.to_string()),
        };
        failed = result.is_err();
        if let Err(error) = &result {
            tracing::error!(%version, error, "the snapshot is not on disk; a restart needs a controller");
        }
        written.send_replace(Some((version, result)));
    }
}
