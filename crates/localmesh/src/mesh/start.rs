//! The steps of a start, and what single processes need to start again.

use crate::admin;
use crate::child::{ChildState, Exited};
use crate::database::Databases;
use crate::error::StartError;
use crate::home::{tail, write_json, write_private};
use crate::mesh::LocalMesh;
use crate::sample::{self, Controller, Instance, POSTGRES, Service, local};
use crate::{Progress, Report};
use serde_json::json;
use std::ffi::OsStr;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::{Instant, sleep};
use weft_pgserver::{Binaries, Cluster, ClusterConfig, Server};

/// How long one process may take to be ready. Each is within a second; a loaded machine may be far slower.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How often is asked.
const READY_POLL: Duration = Duration::from_millis(50);

impl LocalMesh {
    pub(super) fn reserve_ports(&mut self) -> Result<(), StartError> {
        for port in self.controllers().flat_map(Controller::ports) {
            self.ports.reserve(&port)?;
        }
        if self.config.database_url.is_none() {
            // One that an earlier run left may still hold it; whoever starts the new one stops that first.
            self.ports.assign(POSTGRES)?;
        }
        for port in self.instances.iter().flat_map(Instance::ports) {
            self.ports.reserve(&port)?;
        }
        Ok(())
    }

    pub(super) async fn start_postgres(&mut self, report: Report<'_>) -> Result<String, StartError> {
        let (databases, detail) = match &self.config.database_url {
            Some(url) => {
                let databases = Databases::of_url(url)?;
                let detail = format!("{}:{} (WEFT_DATABASE_URL)", databases.host, databases.port);
                (databases, detail)
            }
            None => {
                let port = self.ports.get(POSTGRES);
                let dir = self.home.postgres();
                // Kept where a stop finds it, should this future be dropped meanwhile.
                let starting =
                    self.starting.insert(tokio::task::spawn_blocking(move || start_server(dir, port)));
                let started = starting.await;
                self.starting = None;
                let (server, said) =
                    started.map_err(|error| StartError::io("starting PostgreSQL")(error.into()))?;
                for line in said {
                    report(Progress::Note(line));
                }
                let server = server?;
                let databases =
                    Databases { admin_url: server.url("postgres"), host: "127.0.0.1".to_owned(), port };
                self.postgres = Some(server);
                (databases, local(port))
            }
        };
        databases.prepare(&self.home).await?;
        self.databases = Some(databases);
        Ok(detail)
    }

    pub(super) async fn start_controller(&mut self, controller: Controller) -> Result<(), StartError> {
        let context = json!({
            "controllers": self.controller_addresses(),
            "credential_dir": "controller/operator/admin",
            "reader_url_file": "secrets/reader.url",
        });
        let path = self.home.context();
        write_json(&path, &context).map_err(StartError::io(format!("writing {}", path.display())))?;
        self.supervisor.start(controller.recipe(&self.home, &self.config.programs, &self.ports))?;
        let [_, admin] = controller.ports();
        self.wait_ready(&controller.process(), self.ports.get(&admin)).await.map(drop)
    }

    /// Applies the sample resources, unless they have been: what somebody made of them since is theirs.
    pub(super) async fn apply_resources(&mut self) -> Result<String, StartError> {
        let file = self.home.resources();
        if let Some(databases) = &self.databases
            && databases.has_scope("service/default/web").await?
        {
            return Ok("the log is resumed".to_owned());
        }
        let text = sample::resources(&self.ports);
        write_private(&file, &text).map_err(StartError::io(format!("writing {}", file.display())))?;
        let args =
            [OsStr::new("apply"), OsStr::new("--reason"), OsStr::new("the sample mesh"), OsStr::new("-f")];
        self.weft(args.into_iter().chain([file.as_os_str()])).await?;
        Ok(file.display().to_string())
    }

    /// Starts app and sidecar; returns what the sidecar warns of.
    pub(super) async fn start_instance(&mut self, instance: &Instance) -> Result<Vec<String>, StartError> {
        self.start_app(instance)?;
        self.start_sidecar(instance).await
    }

    pub(super) fn start_app(&mut self, instance: &Instance) -> Result<(), StartError> {
        let app = sample::app(&self.home, &self.config.programs, &self.ports, instance)?;
        app.map_or(Ok(()), |app| self.supervisor.start(app))
    }

    pub(super) async fn start_sidecar(&mut self, instance: &Instance) -> Result<Vec<String>, StartError> {
        let token = self.token(instance).await?;
        let database = match &self.databases {
            Some(databases) => databases.address().await?,
            None => (Ipv4Addr::LOCALHOST, self.ports.get(POSTGRES)).into(),
        };
        let (home, programs) = (&self.home, &self.config.programs);
        let (ports, controllers) = (&self.ports, self.controller_addresses());
        let recipe =
            sample::sidecar(home, programs, ports, &controllers, database, instance, token.as_deref());
        self.supervisor.start(recipe)?;
        let ready = self.wait_ready(&instance.name, self.ports.get(&instance.port("admin"))).await;
        if let Some(token) = token {
            // Used, or of no more use.
            let _ = std::fs::remove_file(token);
        }
        ready
    }

    /// A join token in a file, for a sidecar that has no identity or one that has expired.
    async fn token(&self, instance: &Instance) -> Result<Option<PathBuf>, StartError> {
        let now = jiff::Timestamp::now().as_millisecond();
        if instance.credential(&self.home).is_some_and(|credential| credential.expires_at().0 > now) {
            return Ok(None);
        }
        let file = self.home.secret(&format!("{}.token", instance.name));
        let _ = std::fs::remove_file(&file);
        let service = format!("default/{}", instance.service.word());
        let args =
            ["token", "create", "--service", &service, "--instance", &instance.name, "--ttl", "10m", "--out"];
        self.weft(args.into_iter().map(OsStr::new).chain([file.as_os_str()])).await?;
        Ok(Some(file))
    }

    /// Waits until a process says that it is ready, or ends; returns what it warns of.
    async fn wait_ready(&mut self, name: &str, admin_port: u16) -> Result<Vec<String>, StartError> {
        let started = Instant::now();
        loop {
            let why = match admin::ready(admin_port).await {
                Ok(warnings) => return Ok(warnings),
                Err(why) => why,
            };
            self.check_alive(name)?;
            if started.elapsed() > READY_TIMEOUT {
                return Err(self.not_ready(name, why));
            }
            sleep(READY_POLL).await;
        }
    }

    /// Waits until a request through the whole mesh succeeds, and says what came back.
    pub(super) async fn wait_for_traffic(&mut self) -> Result<String, StartError> {
        let Some(web) = self.instances.iter().find(|instance| instance.service == Service::Web).cloned()
        else {
            return Ok(String::new());
        };
        let started = Instant::now();
        loop {
            let why = match admin::get(self.ports.get(&web.port("app")), "/").await {
                Ok((200, answer)) => return Ok(answer.trim().to_owned()),
                Ok((status, answer)) => format!("web answers {status}: {}", answer.trim()),
                Err(why) => why,
            };
            let names: Vec<String> =
                self.supervisor.children().iter().map(|child| child.recipe.name.clone()).collect();
            for name in &names {
                self.check_alive(name)?;
            }
            if started.elapsed() > READY_TIMEOUT {
                return Err(self.not_ready(&web.name, why));
            }
            sleep(READY_POLL).await;
        }
    }

    fn check_alive(&mut self, name: &str) -> Result<(), StartError> {
        let Some(child) = self.supervisor.child(name) else { return Ok(()) };
        match child.state() {
            ChildState::Running => Ok(()),
            ChildState::Ended(status) => {
                let log = child.recipe.log.clone();
                Err(StartError::Exited(Exited { name: name.to_owned(), status, tail: tail(&log), log }))
            }
        }
    }

    fn not_ready(&self, name: &str, why: String) -> StartError {
        let log = self.home.log(name);
        StartError::NotReady { name: name.to_owned(), why, after: READY_TIMEOUT, tail: tail(&log), log }
    }
}

/// A server, or why there is none, and what was said meanwhile.
pub(super) type Started = (Result<Server, StartError>, Vec<String>);

fn start_server(dir: PathBuf, port: u16) -> Started {
    let mut said = Vec::new();
    let start = || -> Result<Server, StartError> {
        let mut say = |line: &str| said.push(line.to_owned());
        let binaries = Binaries::find_or_install(&mut say)?;
        let config = ClusterConfig { port: Some(port), ..ClusterConfig::new(dir) };
        Cluster::open(binaries, config, &mut say)?.start(&mut say).map_err(|error| match error {
            weft_pgserver::StartError::PortBusy { port } => {
                StartError::PortBusy { port, what: POSTGRES.to_owned() }
            }
            error => StartError::Server(error),
        })
    };
    let server = start();
    (server, said)
}
