//! The smoke run: what Weft promises, tried one after the other on one mesh of real processes.
//!
//! [`Smoke::run`] is the list of steps, to be read from top to bottom. A step waits on conditions, says what it saw, and
//! leaves the mesh as the next one needs it; one that fails does not keep the later ones from being tried. Each step is
//! a function in a module below this one.
//!
//! Beside the sample services there is one of our own ([`Blob`]), of which both ends of every connection are in our hands.

mod end;
mod instances;
mod outage;
mod policy;
mod traffic;
mod writers;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use tempfile::TempDir;
use weft_localmesh::Programs;
use weft_localmesh::home::{HOME_DIR, Home};

use crate::blob::Blob;
use crate::footprint::Footprint;
use crate::mesh::Mesh;
use crate::programs;
use crate::report::Report;

/// What a run consists of.
#[derive(Debug)]
pub struct Smoke {
    programs: Programs,
    database_url: Option<String>,
    dir: TempDir,
    /// A mesh that is not up yet.
    starting: Option<Mesh>,
    bench: Option<Bench>,
    footprint: Footprint,
}

/// A running mesh and our own service in it.
#[derive(Debug)]
struct Bench {
    mesh: Mesh,
    blob: Blob,
    /// Where `web` reaches `db`, which it may not; asked once, since the answer needs a controller.
    db_from_web: SocketAddr,
}

impl Smoke {
    /// Prepares a home of its own. With `database_url` the mesh uses that server instead of a private one.
    ///
    /// # Errors
    ///
    /// The programs are not built, or there is no temporary folder.
    pub fn prepare(database_url: Option<String>) -> anyhow::Result<Self> {
        let programs = programs::built()?;
        let dir = tempfile::Builder::new().prefix("weft-smoke-").tempdir()?;
        // The database server may run as another user, who has to get to its own folder below this one.
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711))?;
        let footprint = Footprint::of(dir.path());
        Ok(Self { programs, database_url, dir, starting: None, bench: None, footprint })
    }

    /// Where the logs are.
    pub fn logs(&self) -> PathBuf {
        self.home().logs()
    }

    fn home(&self) -> Home {
        Home::at(self.dir.path().join(HOME_DIR))
    }

    /// Tries everything.
    pub async fn run(&mut self, report: &mut Report) {
        let started = report.step("start to ready", self.start()).await;
        if let Some(bench) = &mut self.bench {
            report.step("SELECT through two sidecars", traffic::select(bench)).await;
            report.step("256 MiB each way, same SHA-256", traffic::transfer(bench)).await;
            report.step("half-close, both orders", traffic::half_close(bench)).await;
            report.step("db refuses web, both records say why", policy::refusal(bench)).await;
            report.step("why agrees with what happened", policy::why(bench)).await;
            report.step("a deny cuts the open connection", policy::deny_cuts(bench)).await;
            report.step("rollback by a new version re-allows", policy::rollback(bench)).await;
            report.step("an api app dies, no request fails", instances::app_dies(bench)).await;
            report.step("an api instance is killed, none fails", instances::instance_dies(bench)).await;
            report.step("a new instance gets traffic", instances::joins(bench)).await;
            let open =
                report.step("controller killed, traffic goes on", outage::controller_dies(bench)).await;
            if open {
                report.step("sidecar restarts from its disk", outage::sidecar_restarts(bench)).await;
            } else {
                report.cannot("sidecar restarts from its disk", "the controller's end was not survived");
            }
            report.step("controller back, everyone at head", outage::controller_returns(bench)).await;
            report.step("two writers, one version: one wins", writers::race(bench)).await;
            report.step("verify refolds the log from zero", writers::verify(bench)).await;
        } else if !started {
            report.cannot("everything that needs a mesh", "it did not start");
        }
        if self.bench.is_some() {
            report.step("a second start resumes the log", self.resume()).await;
        }
        report.step("stop leaves nothing", self.stop()).await;
    }

    /// Stops what runs, for who is interrupted.
    ///
    /// # Errors
    ///
    /// Something does not stop.
    pub async fn abandon(&mut self) -> anyhow::Result<()> {
        self.stop_mesh().await
    }

    /// Keeps the home for who wants to look into it, and says where it is.
    pub fn keep(&mut self) -> PathBuf {
        self.dir.disable_cleanup(true);
        self.dir.path().to_owned()
    }
}

impl Bench {
    /// Stops our sidecars and the mesh.
    async fn stop(self) -> anyhow::Result<()> {
        let own = self.blob.stop().await;
        // Whatever became of ours, the mesh is stopped.
        self.mesh.stop().await?;
        own
    }
}
