//! The volume of the write-ahead log runs full, and is freed again.
//!
//! PostgreSQL cannot go on without its write-ahead log: it stops all its processes and recovers, which may fail for the
//! same reason and end it. Then somebody starts it again, here as elsewhere. Everything else is up to the writers, who
//! get errors as long as it lasts and go on by themselves.

use anyhow::Context;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tokio::time::{sleep, timeout};

use super::{Findings, PROGRESS_MAX, Scene};
use crate::server::{Postgres, Session};
use crate::writer::Habits;

/// The volume. Writers who find it free again write as fast as they can, and until a checkpoint is done the server keeps all
/// of it: several times [`WAL_MAX`].
const VOLUME_MIB: u64 = 768;
/// What the server is to keep of its write-ahead log, in segments of 16 MiB.
const WAL_MAX: &str = "64MB";
/// What is left of it when it is to run full soon.
const LEFT_MIB: u64 = 20;

/// What is set aside, so that something can be freed even where the write-ahead log has taken all the rest.
const RESERVE_MIB: u64 = 96;

/// A volume of its own, which ends with the value.
struct Volume<'a>(&'a Path);

impl<'a> Volume<'a> {
    fn mount(path: &'a Path) -> anyhow::Result<Self> {
        let size = format!("size={VOLUME_MIB}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(path).status();
        let mounted = mounted.context("`mount` cannot be run")?;
        anyhow::ensure!(
            mounted.success(),
            "a small volume cannot be mounted at {}; that takes root, and a kernel that lets it: run as root, or leave \
             this phase out with --only",
            path.display()
        );
        Ok(Self(path))
    }

    fn free_mib(&self) -> anyhow::Result<u64> {
        let stat = nix::sys::statvfs::statvfs(self.0)?;
        Ok(stat.blocks_available() * stat.fragment_size() / (1024 * 1024))
    }
}

impl Drop for Volume<'_> {
    fn drop(&mut self) {
        // What is still used of it goes when its user does.
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

/// So many times.
pub(crate) async fn wal_full(seed: u64, cycles: u64, findings: &mut Findings) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    open_to_all(dir.path())?;
    let volume = Volume::mount(dir.path())?;
    let reserve = dir.path().join("reserve");
    occupy(&reserve, RESERVE_MIB)?;
    let mut server = Postgres::start(Some(dir.path().to_owned())).await?;
    let habits = Habits { events_max: 50, repeats: 0.05 };
    // So that what is given back after each cycle is enough for the next.
    let session = Session::open(&server.url("postgres")?).await?;
    for (name, value) in
        [("max_wal_size", WAL_MAX), ("min_wal_size", "32MB"), ("checkpoint_completion_target", "0")]
    {
        session.client.batch_execute(&format!("alter system set {name} = '{value}'")).await?;
    }
    session.client.batch_execute("select pg_reload_conf()").await?;
    drop(session);
    let scene = Scene::set(&server, "wal", 1, 16, seed, habits).await?;
    scene.progress(64).await?;
    let ballast = dir.path().join("ballast");
    for _ in 0..cycles {
        let fill = volume.free_mib()?.saturating_sub(LEFT_MIB);
        occupy(&ballast, fill)?;
        ran_full(&scene, &server, findings).await?;
        std::fs::remove_file(&ballast)?;
        std::fs::remove_file(&reserve)?;
        if timeout(Duration::from_secs(3), server.answers()).await.is_err() && server.has_ended()? {
            findings.count("server ended, started again");
            server.start_again().await?;
            scene.follow(&server)?;
        }
        server.answers().await?;
        // Older segments of it are given back, so that the next cycle has something to fill.
        let session = Session::open(&server.url("wal")?).await?;
        session.client.batch_execute("checkpoint").await?;
        scene.progress(64).await?;
        occupy(&reserve, RESERVE_MIB.min(volume.free_mib()?.saturating_sub(LEFT_MIB)))?;
        findings.count("full");
    }
    scene.close(&server, 0, findings).await
}

/// Takes so much of the volume, or what is left of it: the server takes some meanwhile.
fn occupy(file: &Path, mib: u64) -> anyhow::Result<()> {
    let mut file = std::fs::File::create(file)?;
    for _ in 0..mib {
        match file.write_all(&[0; 1024 * 1024]) {
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => break,
            written => written?,
        }
    }
    Ok(())
}

/// Waits until writers stand still because of it.
async fn ran_full(scene: &Scene, server: &Postgres, findings: &mut Findings) -> anyhow::Result<()> {
    let stands_still = async {
        let mut last = scene.writers.acknowledged();
        let mut still = 0;
        while still < 10 {
            sleep(Duration::from_millis(100)).await;
            let now = scene.writers.acknowledged();
            still = if now == last { still + 1 } else { 0 };
            last = now;
        }
    };
    timeout(PROGRESS_MAX, stands_still).await.context("the volume does not run full")?;
    let readable = async {
        let session = Session::open(&server.url("wal")?).await?;
        anyhow::Ok(session.client.query_one("select count(*) from weft.event", &[]).await?)
    };
    findings.count(if readable.await.is_ok() { "read while full" } else { "server down while full" });
    Ok(())
}

fn open_to_all(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?)
}
