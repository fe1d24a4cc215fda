//! The mesh as a whole: what can be done with it, its start, step by step, and its end.
//!
//! Processes are called by the instance that they belong to: `api-1` is a sidecar, `api-1-app` what is behind it, and
//! `controller` the controller, `controller-2` the next one if there are several. PostgreSQL is a child of ours too, with a watchdog of its own.

mod start;

use crate::admin;
use crate::child::{ChildState, Exited, command};
use crate::database::Databases;
use crate::error::StartError;
use crate::home::{Home, HomeLock, tail};
use crate::leftover;
use crate::ports::{PortChoice, Ports};
use crate::sample::{Controller, Instance, POSTGRES, Service, local};
use crate::supervisor::Supervisor;
use crate::{Progress, Report};
use nix::sys::signal::Signal;
use std::ffi::OsStr;
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use weft_pgserver::Server;

/// How long a process may take to end: a sidecar's drain, and room.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// How long a `weft` command may take that sets the mesh up.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// How often is looked whether PostgreSQL still runs.
const POSTGRES_POLL: Duration = Duration::from_secs(1);

/// What to run, and where.
#[derive(Clone, Debug)]
pub struct Config {
    /// The folder that the mesh lives in; made if missing.
    pub home: PathBuf,
    /// Which ports it uses.
    pub ports: PortChoice,
    /// The programs that it runs.
    pub programs: Programs,
    /// How many controllers it has.
    pub controllers: NonZeroU8,
    /// A PostgreSQL server to use instead of a private one; the role must be a superuser. Its databases `weft` and
    /// `shop` are used, so it can serve one mesh only.
    pub database_url: Option<String>,
}

/// Weft's programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    /// The command line.
    pub weft: PathBuf,
    /// The controller.
    pub controller: PathBuf,
    /// The sidecar.
    pub proxy: PathBuf,
}

impl Programs {
    /// Those in the folder of `program`.
    #[must_use]
    pub fn beside(program: &Path) -> Self {
        let at = |name: &str| program.with_file_name(name);
        Self { weft: at("weft"), controller: at("weft-controller"), proxy: at("weft-proxy") }
    }
}

/// A process of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its name in the mesh.
    pub name: String,
    /// Its number, while it runs or until it is started again.
    pub pid: u32,
    /// How it stands.
    pub state: ChildState,
    /// Its log.
    pub log: PathBuf,
}

/// A sidecar and what is behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sidecar {
    /// The service, such as `default/api`.
    pub service: String,
    /// The instance's name, such as `api-1`; its process is called the same.
    pub instance: String,
    /// The process of its app; none for the database.
    pub app: Option<String>,
    /// Its SPIFFE id; none before it joined.
    pub identity: Option<String>,
    /// What it runs, `epoch.position`; none if it does not answer.
    pub config_version: Option<String>,
    /// Where its app listens.
    pub app_port: u16,
    /// Where it accepts mTLS.
    pub inbound_port: u16,
    /// Where it answers about itself.
    pub admin_port: u16,
    /// Where it takes connections for its upstream, if it has one.
    pub outbound_port: Option<u16>,
}

/// How a mesh ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stopped {
    /// Processes that did not end when asked and were killed.
    pub forced: Vec<String>,
    /// What PostgreSQL said, if it did not stop well.
    pub postgres: Option<String>,
}

/// A mesh on this machine, owned by this process. Dropping it leaves the stopping to the watchdog; use
/// [`stop`](Self::stop).
#[derive(Debug)]
pub struct LocalMesh {
    home: Home,
    config: Config,
    ports: Ports,
    instances: Vec<Instance>,
    databases: Option<Databases>,
    postgres: Option<Server>,
    /// The start of a server that nobody has taken over yet.
    starting: Option<JoinHandle<start::Started>>,
    supervisor: Supervisor,
    /// Declared last, so released after everything else.
    _lock: HomeLock,
}

impl LocalMesh {
    /// Takes the home for this process and stops what an earlier owner left. Nothing is started.
    ///
    /// # Errors
    /// [`StartError::AlreadyRuns`], [`StartError::NoProgram`], or a file operation failed.
    pub async fn open(config: Config, report: Report<'_>) -> Result<Self, StartError> {
        for program in [&config.programs.weft, &config.programs.controller, &config.programs.proxy] {
            if !program.is_file() {
                return Err(StartError::NoProgram { path: program.clone() });
            }
        }
        let mut home = Home::at(&config.home);
        home.create()?;
        let lock = home.lock()?;
        let stopped = blocking({
            let home = home.clone();
            move || leftover::stop_all(&home)
        })
        .await;
        if !stopped.is_empty() {
            report(Progress::Note(format!("stopped what an earlier run left: {}", stopped.join(", "))));
        }
        let ports = Ports::choose(&home, config.ports)?;
        let supervisor = Supervisor::new(&home, &config.programs.weft)?;
        let (instances, databases, postgres, starting) = (Instance::initial(), None, None, None);
        Ok(Self { home, config, ports, instances, databases, postgres, starting, supervisor, _lock: lock })
    }

    /// Starts everything and waits until a request passes through the whole mesh.
    ///
    /// # Errors
    /// See [`StartError`]. What was started keeps running: call [`stop`](Self::stop). The same holds if the future is
    /// dropped.
    pub async fn start(&mut self, report: Report<'_>) -> Result<(), StartError> {
        // All ports first: a busy one shall stop nothing half-way.
        self.reserve_ports()?;
        let step = Step::begin("PostgreSQL", report);
        let detail = self.start_postgres(step.report).await?;
        step.done(detail);

        for controller in self.controllers() {
            let step = Step::begin(&controller.process(), report);
            self.start_controller(controller).await?;
            step.done(controller.address(&self.ports));
        }

        let step = Step::begin("resources", report);
        let detail = self.apply_resources().await?;
        step.done(detail);

        for instance in self.instances.clone() {
            let step = Step::begin(&instance.name, report);
            let warnings = self.start_instance(&instance).await?;
            step.done(format!("{} at {}", instance.id(), local(self.ports.get(&instance.port("inbound")))));
            for warning in warnings {
                report(Progress::Note(format!("{}: {warning}", instance.name)));
            }
        }
        let step = Step::begin("web → api → db", report);
        let detail = self.wait_for_traffic().await?;
        step.done(detail);
        Ok(())
    }

    /// The home.
    #[must_use]
    pub const fn home(&self) -> &Home {
        &self.home
    }

    /// Where the private PostgreSQL keeps its data, if its account could not enter the home: a folder to remove together
    /// with the home, whose link `pg/home` leads there.
    #[must_use]
    pub fn data_elsewhere(&self) -> Option<PathBuf> {
        let data = self.postgres.as_ref()?.cluster().data_dir();
        if data.starts_with(self.home.dir()) { None } else { data.parent().map(Path::to_owned) }
    }

    /// Every process except PostgreSQL's, in the order of their start.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        let each = self.supervisor.children().iter().map(|child| Process {
            name: child.recipe.name.clone(),
            pid: child.pid,
            state: child.state(),
            log: child.recipe.log.clone(),
        });
        each.collect()
    }

    /// PostgreSQL's first process; none if somebody else runs the server.
    #[must_use]
    pub fn postgres_pid(&self) -> Option<u32> {
        self.postgres.as_ref().map(Server::pid)
    }

    /// Where the database server listens.
    #[must_use]
    pub fn postgres_port(&self) -> u16 {
        self.databases.as_ref().map_or(0, |databases| databases.port)
    }

    /// Where the controllers listen.
    #[must_use]
    pub fn controller_addresses(&self) -> Vec<String> {
        self.controllers().map(|controller| controller.address(&self.ports)).collect()
    }

    fn controllers(&self) -> impl Iterator<Item = Controller> + Clone + use<> {
        Controller::first(self.config.controllers)
    }

    /// Every sidecar, with what it says of itself now.
    pub async fn sidecars(&self) -> Vec<Sidecar> {
        let mut sidecars = Vec::new();
        for instance in &self.instances {
            let port = |part| self.ports.get(&instance.port(part));
            let identity =
                instance.credential(&self.home).map(|credential| credential.spiffe_id().to_string());
            sidecars.push(Sidecar {
                service: format!("default/{}", instance.service.word()),
                instance: instance.name.clone(),
                app: instance.app(),
                identity,
                config_version: admin::config_version(port("admin")).await,
                app_port: if instance.service == Service::Db { self.postgres_port() } else { port("app") },
                inbound_port: port("inbound"),
                admin_port: port("admin"),
                outbound_port: instance.service.upstream().map(|_| port("outbound")),
            });
        }
        sidecars
    }

    /// The loopback address of a service, such as `default/api`; none if the mesh does not tell.
    pub async fn service_address(&self, service: &str) -> Option<String> {
        let output = self.weft(["status", "-o", "json"]).await.ok()?;
        let status: serde_json::Value = serde_json::from_str(&output).ok()?;
        let services = status.get("services")?.as_array()?;
        let found = services.iter().find(|found| found["name"] == service)?;
        found["address"].as_str().map(str::to_owned)
    }

    /// The next process that ends without having been asked to, PostgreSQL included. Never, if none does. Dropping the
    /// future loses nothing.
    pub async fn next_exit(&mut self) -> Exited {
        loop {
            if let Ok(exited) = timeout(POSTGRES_POLL, self.supervisor.next_exit()).await {
                return exited;
            }
            let ended = self.postgres.as_mut().and_then(|server| server.exited().ok().flatten());
            if let Some(status) = ended
                && let Some(server) = self.postgres.take()
            {
                let log = server.cluster().log_file();
                return Exited { name: POSTGRES.to_owned(), status, tail: tail(&log), log };
            }
        }
    }

    /// Sends a signal to a process, as anybody might.
    ///
    /// # Errors
    /// [`StartError::Unknown`]
    pub async fn signal(&self, name: &str, signal: Signal) -> Result<(), StartError> {
        let child = self.supervisor.child(name).ok_or_else(|| self.unknown(name))?;
        child.signal(signal).await;
        Ok(())
    }

    /// Kills a process (SIGKILL) and waits until it is gone. [`next_exit`](Self::next_exit) tells it as well.
    ///
    /// # Errors
    /// [`StartError::Unknown`]
    pub async fn kill(&self, name: &str) -> Result<(), StartError> {
        let child = self.supervisor.child(name).ok_or_else(|| self.unknown(name))?;
        child.signal(Signal::SIGKILL).await;
        child.ended().await;
        Ok(())
    }

    /// Starts a process again, after stopping it if it runs, and waits until it is ready.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn restart(&mut self, name: &str) -> Result<(), StartError> {
        if self.supervisor.child(name).is_none() {
            return Err(self.unknown(name));
        }
        self.supervisor.stop(&[name.to_owned()], STOP_GRACE).await;
        if let Some(controller) = self.controllers().find(|controller| controller.process() == name) {
            return self.start_controller(controller).await;
        }
        let instances = self.instances.clone();
        for instance in &instances {
            if instance.name == name {
                return self.start_sidecar(instance).await.map(drop);
            }
            if instance.app().as_deref() == Some(name) {
                return self.start_app(instance);
            }
        }
        Err(self.unknown(name))
    }

    /// Adds an instance of `web` or `api`, app and sidecar, waits until it is ready, and returns its name.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn add_instance(&mut self, service: &str) -> Result<String, StartError> {
        let known = [Service::Web, Service::Api].into_iter().find(|known| known.word() == service);
        let service = known.ok_or_else(|| StartError::Unknown(service.to_owned(), "web, api".to_owned()))?;
        let taken = |name: &String| self.instances.iter().any(|instance| instance.name == *name);
        let mut names = (1_u32..).map(|number| format!("{}-{number}", service.word()));
        let name = names.find(|name| !taken(name)).unwrap_or_default();
        let instance = Instance { service, name: name.clone() };
        for port in instance.ports() {
            self.ports.reserve(&port)?;
        }
        self.instances.push(instance.clone());
        self.start_instance(&instance).await?;
        Ok(name)
    }

    /// Runs a `weft` command about this mesh and returns what it printed.
    ///
    /// # Errors
    /// [`StartError::Command`], with what it said.
    pub async fn weft<A: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = A>,
    ) -> Result<String, StartError> {
        let mut command = command(&self.config.programs.weft);
        command.arg("--context").arg(self.home.context()).args(args).stdin(Stdio::null()).kill_on_drop(true);
        let words: Vec<_> = command.as_std().get_args().skip(2).map(OsStr::to_string_lossy).collect();
        let line = words.join(" ");
        let failed = |output: String| StartError::Command { command: line.clone(), output };
        match timeout(COMMAND_TIMEOUT, command.output()).await {
            Ok(Ok(output)) if output.status.success() => {
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            }
            Ok(Ok(output)) => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => Err(failed(format!("no answer within {} s", COMMAND_TIMEOUT.as_secs()))),
        }
    }

    /// Stops everything: apps, then sidecars, the controllers, PostgreSQL.
    pub async fn stop(mut self, report: Report<'_>) -> Stopped {
        let mut stopped = Stopped::default();
        let apps: Vec<String> = self.instances.iter().filter_map(Instance::app).collect();
        let sidecars: Vec<String> = self.instances.iter().map(|instance| instance.name.clone()).collect();
        let controllers: Vec<String> = self.controllers().map(Controller::process).collect();
        let what = if controllers.len() == 1 { "controller" } else { "controllers" };
        for (what, names) in [("apps", apps), ("sidecars", sidecars), (what, controllers)] {
            if self.supervisor.children().iter().any(|child| names.contains(&child.recipe.name)) {
                let step = Step::begin(&format!("stop {what}"), report);
                stopped.forced.extend(self.supervisor.stop(&names, STOP_GRACE).await);
                step.done(String::new());
            }
        }
        if let Some(starting) = self.starting.take()
            && let Ok((Ok(server), _)) = starting.await
        {
            self.postgres = Some(server);
        }
        if let Some(server) = self.postgres.take() {
            let step = Step::begin("stop PostgreSQL", report);
            let ended = blocking(move || server.stop().map(drop)).await;
            stopped.postgres = ended.err().map(|error| error.to_string());
            step.done(String::new());
        }
        self.supervisor.close().await;
        stopped
    }

    fn unknown(&self, name: &str) -> StartError {
        let names: Vec<_> =
            self.supervisor.children().iter().map(|child| child.recipe.name.clone()).collect();
        StartError::Unknown(name.to_owned(), names.join(", "))
    }
}

/// A step of a start or stop, and when it began.
struct Step<'r> {
    what: String,
    begun: Instant,
    report: Report<'r>,
}

impl<'r> Step<'r> {
    fn begin(what: &str, report: &'r mut (dyn FnMut(Progress) + Send + 'r)) -> Self {
        report(Progress::Doing(what.to_owned()));
        Self { what: what.to_owned(), begun: Instant::now(), report }
    }

    fn done(self, detail: String) {
        (self.report)(Progress::Done { what: self.what, detail, took: self.begun.elapsed() });
    }
}

/// Runs what blocks where that harms nobody.
#[expect(clippy::expect_used, reason = "the closures passed here do not panic, and are never cancelled")]
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("the work does not panic")
}
