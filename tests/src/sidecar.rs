//! A sidecar of the test's own, joined as an operator joins one: a token from `weft`, then `weft-proxy`.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use tokio::process::{Child, ChildStdin};
use tokio::time::timeout;
use weft_localmesh::home::tail;
use weft_pgserver::reserve_loopback_port;

use crate::http;
use crate::mesh::{Mesh, SidecarConfig, local};
use crate::records::Records;
use crate::wait::until;
use crate::weft::program;

/// How long a sidecar may take to join and to be ready.
const READY_LIMIT: Duration = Duration::from_secs(20);
/// How long a sidecar lets connections end when it stops.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(3);
/// What the log says of one that has taken another one's place.
const TOOK_PLACE: &str = "this process is the sidecar now";
/// How long it may take to end: its drain, and room.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Starts the program that follows and ends it when its own input ends. So a sidecar does not outlive a test, even one
/// that is killed.
pub(crate) const LEASH: &str = "\"$@\" </dev/null & read -r _; kill $! 2>/dev/null; wait $!";

/// The same with so few files.
fn leash_with_files(files: u32) -> String {
    format!("ulimit -n {files} && {LEASH}")
}

/// What a sidecar is for.
#[derive(Clone, Debug)]
pub enum Place {
    /// It stands before an app, which serves the service's `port` at `app`.
    Before {
        /// The service's port.
        port: u16,
        /// Where the app listens.
        app: SocketAddr,
    },
    /// It leads to a service once that is used.
    OnDemand {
        /// `<namespace>/<service>:<port>`
        upstream: String,
        /// Where connections are taken for it.
        listen: SocketAddr,
    },
    /// It leads to a service.
    Towards {
        /// `<namespace>/<service>:<port>`
        upstream: String,
        /// Where connections are taken for it.
        listen: SocketAddr,
    },
    /// It is told what is for it, as on a command line.
    Told(Vec<String>),
}

/// A running sidecar.
#[derive(Debug)]
pub struct OwnSidecar {
    leash: Child,
    hold: ChildStdin,
    inbound: SocketAddr,
    admin: SocketAddr,
    records: Records,
    log: PathBuf,
    /// How it was started.
    line: Vec<OsString>,
}

impl OwnSidecar {
    /// Starts a sidecar for `<namespace>/<service>/<instance>` and waits until it is ready. Joins first, unless it has
    /// before.
    ///
    /// # Errors
    ///
    /// It does not join, or is not ready in time.
    pub async fn start(
        mesh: &Mesh,
        weft_proxy: &Path,
        instance: &str,
        place: &Place,
    ) -> anyhow::Result<Self> {
        let controllers = mesh.local.controller_addresses();
        Self::start_through(mesh, weft_proxy, instance, place, &controllers).await
    }

    /// The same, with other addresses of controllers: lines to them.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub async fn start_through(
        mesh: &Mesh,
        weft_proxy: &Path,
        instance: &str,
        place: &Place,
        controllers: &[String],
    ) -> anyhow::Result<Self> {
        Self::start_leashed(mesh, weft_proxy, instance, place, controllers, LEASH).await
    }

    /// The same, but it may open so many files only.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub async fn start_with_files(
        mesh: &Mesh,
        weft_proxy: &Path,
        instance: &str,
        place: &Place,
        files: u32,
    ) -> anyhow::Result<Self> {
        let controllers = mesh.local.controller_addresses();
        Self::start_leashed(mesh, weft_proxy, instance, place, &controllers, &leash_with_files(files)).await
    }

    async fn start_leashed(
        mesh: &Mesh,
        weft_proxy: &Path,
        instance: &str,
        place: &Place,
        controllers: &[String],
        leash: &str,
    ) -> anyhow::Result<Self> {
        let home = mesh.local.home();
        let (service, name) = instance.rsplit_once('/').context("an instance is ns/service/instance")?;
        let state = home.proxy(name);
        let (inbound, admin) = (local(reserve_loopback_port()?), local(reserve_loopback_port()?));
        let (log, records) = (home.log(name), home.connections(name));
        let output = fs::OpenOptions::new().create(true).append(true).open(&log)?;

        let mut command = program("/bin/sh");
        command.args(["-c", leash, "sh"]).arg(weft_proxy);
        command.args(["--controller", &controllers.join(",")]);
        command.args(["--instance", instance, "--state-dir"]).arg(&state);
        if !state.exists() {
            let token = home.secret(&format!("{name}.token"));
            let args = ["token", "create", "--service", service, "--instance", name, "--ttl", "10m", "--out"];
            mesh.weft.ok(args.into_iter().map(OsStr::new).chain([token.as_os_str()])).await?;
            command.arg("--join-token-file").arg(token);
        }
        command.args(["--inbound-listen", &inbound.to_string(), "--admin-listen", &admin.to_string()]);
        match place {
            Place::Before { port, app } => command.args(["--app", &format!("{port}={app}")]),
            Place::OnDemand { upstream, listen } => {
                command.args(["--upstream-on-demand", &format!("{upstream}={listen}")])
            }
            Place::Towards { upstream, listen } => {
                command.args(["--upstream", &format!("{upstream}={listen}")])
            }
            Place::Told(args) => command.args(args),
        };
        let deadline = format!("{}s", DRAIN_DEADLINE.as_secs());
        command.args(["--probe-interval", "1s", "--drain-deadline", &deadline]);
        command.arg("--connection-log").arg(&records);
        command.stdin(Stdio::piped()).stdout(output.try_clone()?).stderr(output).process_group(0);
        let line = command.as_std().get_args().map(OsStr::to_owned).collect();
        let mut leash = command.spawn().context("/bin/sh could not be run")?;
        let hold = leash.stdin.take().context("the sidecar has no leash")?;

        let what = format!("{instance} to be ready");
        let ready = until(&what, READY_LIMIT, async || {
            let (status, why) = http::get(admin, "/ready").await?;
            anyhow::ensure!(status == 200, "{}", why.trim());
            Ok(())
        });
        ready.await.with_context(|| format!("the end of {}:\n{}\n", log.display(), tail(&log)))?;
        Ok(Self { leash, hold, inbound, admin, records: Records::of(records), log, line })
    }

    /// Its log so far.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn log(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    /// What it runs.
    ///
    /// # Errors
    ///
    /// It does not answer.
    pub async fn config(&self) -> anyhow::Result<SidecarConfig> {
        SidecarConfig::ask(self.admin).await
    }

    /// Where other sidecars connect to it, unless it was told to say otherwise.
    pub fn inbound(&self) -> SocketAddr {
        self.inbound
    }

    /// Its connection records.
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// Lets a new process of the same kind take its place, and waits until the old one has drained and ended.
    ///
    /// # Errors
    ///
    /// The new one does not take over, or the old one does not end in time.
    pub async fn upgraded(self) -> anyhow::Result<Self> {
        let Self { leash: old, hold: old_hold, admin, records, log, line, inbound } = self;
        let taken = fs::read_to_string(&log)?.matches(TOOK_PLACE).count();
        let output = fs::OpenOptions::new().append(true).open(&log)?;
        let mut command = program("/bin/sh");
        command.args(&line);
        command.arg("--upgrade");
        command.stdin(Stdio::piped()).stdout(output.try_clone()?).stderr(output).process_group(0);
        let mut leash = command.spawn().context("/bin/sh could not be run")?;
        let hold = leash.stdin.take().context("the sidecar has no leash")?;
        let took = until("the new process to take over", READY_LIMIT, async || {
            let said = fs::read_to_string(&log)?.matches(TOOK_PLACE).count();
            anyhow::ensure!(said > taken, "{}", tail(&log));
            Ok(())
        });
        took.await?;
        // The shell of the old one waits for its end after this; it drains already, and a second word changes nothing.
        let new = Self { leash, hold, inbound, admin, records, log, line };
        Self::end(old, old_hold, &new.log).await?;
        Ok(new)
    }

    /// Stops it, and waits for its end.
    ///
    /// # Errors
    ///
    /// It does not end in time.
    pub async fn stop(self) -> anyhow::Result<()> {
        Self::end(self.leash, self.hold, &self.log).await
    }

    async fn end(mut leash: Child, hold: ChildStdin, log: &Path) -> anyhow::Result<()> {
        drop(hold);
        let ended = timeout(STOP_LIMIT, leash.wait()).await;
        ended.with_context(|| format!("it did not stop; see {}", log.display()))??;
        Ok(())
    }
}
