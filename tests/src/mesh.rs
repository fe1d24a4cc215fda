//! A local mesh in a folder of its own on ports of its own, beside whatever else runs on the machine.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU8;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::Value;
use weft_localmesh::{Config, LocalMesh, PortChoice, Programs, Progress, Sidecar};
use weft_model::ConfigVersion;

use crate::http;
use crate::records::Records;
use crate::sql::Database;
use crate::weft::Weft;

/// Lets `web` query `db`: the policy of the sample with one more source.
pub const WEB_MAY_QUERY: &str = "kind: SecurityPolicy
scope: default/db
default: deny
rules:
  - { name: api-may-query, action: allow, from: { services: [default/api] }, ports: [5432] }
  - { name: web-may-query, action: allow, from: { services: [default/web] }, ports: [5432] }
";

/// A mesh that this process runs, by the library behind `weft up`, and the command line that talks to it.
#[derive(Debug)]
pub struct Mesh {
    /// Its processes.
    pub local: LocalMesh,
    /// `weft`, for this mesh.
    pub weft: Weft,
}

impl Mesh {
    /// Takes `home` for a mesh, a new one or the one that is there. Nothing is started. With `database_url` it uses that
    /// server instead of a private one.
    ///
    /// # Errors
    ///
    /// The home is taken, or cannot be used.
    pub async fn open(
        home: &Path,
        programs: &Programs,
        database_url: Option<String>,
    ) -> anyhow::Result<Self> {
        Self::open_with(home, programs, NonZeroU8::MIN, database_url).await
    }

    /// The same with several controllers.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub async fn open_with(
        home: &Path,
        programs: &Programs,
        controllers: NonZeroU8,
        database_url: Option<String>,
    ) -> anyhow::Result<Self> {
        let config = Config {
            home: home.to_owned(),
            ports: PortChoice::Free,
            programs: programs.clone(),
            controllers,
            database_url,
        };
        let local = LocalMesh::open(config, &mut say).await?;
        let weft = Weft::new(&programs.weft, local.home().context());
        Ok(Self { local, weft })
    }

    /// Starts everything, and waits until requests pass through it. Progress goes to standard error.
    ///
    /// # Errors
    ///
    /// It does not start. Then, and if the future is dropped, what was started runs until [`Self::stop`].
    pub async fn start(&mut self) -> anyhow::Result<()> {
        Ok(self.local.start(&mut say).await?)
    }

    /// Stops everything in order.
    ///
    /// # Errors
    ///
    /// Something did not stop when it was asked to.
    pub async fn stop(self) -> anyhow::Result<()> {
        let stopped = self.local.stop(&mut say).await;
        if let Some(why) = stopped.postgres {
            bail!("PostgreSQL did not stop well: {why}");
        }
        anyhow::ensure!(stopped.forced.is_empty(), "had to be killed: {}", stopped.forced.join(", "));
        Ok(())
    }

    /// What is known of an instance's sidecar.
    ///
    /// # Errors
    ///
    /// There is none of this name.
    pub async fn sidecar(&self, instance: &str) -> anyhow::Result<Sidecar> {
        let found = self.local.sidecars().await.into_iter().find(|sidecar| sidecar.instance == instance);
        found.with_context(|| format!("the mesh has no instance {instance}"))
    }

    /// Where an instance's app reaches its upstream.
    ///
    /// # Errors
    ///
    /// There is no such instance, or it has no upstream.
    pub async fn outbound(&self, instance: &str) -> anyhow::Result<SocketAddr> {
        let port = self.sidecar(instance).await?.outbound_port;
        Ok(local(port.with_context(|| format!("{instance} has no upstream"))?))
    }

    /// Where an instance's app listens.
    ///
    /// # Errors
    ///
    /// There is no such instance.
    pub async fn app(&self, instance: &str) -> anyhow::Result<SocketAddr> {
        Ok(local(self.sidecar(instance).await?.app_port))
    }

    /// What an instance's sidecar says that it runs.
    ///
    /// # Errors
    ///
    /// It does not answer, or runs nothing yet.
    pub async fn config(&self, instance: &str) -> anyhow::Result<SidecarConfig> {
        SidecarConfig::ask(local(self.sidecar(instance).await?.admin_port)).await
    }

    /// The loopback address of a service.
    ///
    /// # Errors
    ///
    /// The mesh does not tell.
    pub async fn service_address(&self, service: &str) -> anyhow::Result<Ipv4Addr> {
        let address = self.local.service_address(service).await;
        Ok(address.with_context(|| format!("`weft status` shows no {service}"))?.parse()?)
    }

    /// An instance's connection records.
    pub fn records(&self, instance: &str) -> Records {
        Records::of(self.local.home().connections(instance))
    }

    /// The sample database, as an api instance's app reaches it.
    ///
    /// # Errors
    ///
    /// There is no such instance.
    pub async fn database_through(&self, instance: &str) -> anyhow::Result<Database> {
        Ok(self.database_at(self.outbound(instance).await?))
    }

    /// The sample database at an address.
    pub fn database_at(&self, address: SocketAddr) -> Database {
        Database {
            host: address.ip().to_string(),
            port: address.port(),
            role: "shop".to_owned(),
            password_file: self.password_file(),
        }
    }

    fn password_file(&self) -> PathBuf {
        self.local.home().secret("pgpass")
    }
}

/// What a sidecar says of its configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct SidecarConfig {
    /// What it runs.
    pub version: ConfigVersion,
    /// Everything it says.
    pub all: Value,
}

impl SidecarConfig {
    /// Asks the sidecar with this admin address.
    ///
    /// # Errors
    ///
    /// It does not answer, or runs nothing yet.
    pub async fn ask(admin: SocketAddr) -> anyhow::Result<Self> {
        let all: Value = serde_json::from_str(&http::body(admin, "/config").await?)?;
        let version = all["version"].as_str().with_context(|| format!("no version in {all}"))?;
        Ok(Self { version: version.parse().map_err(|_| anyhow::anyhow!("no version: {version}"))?, all })
    }
}

/// An address of this machine.
pub fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Progress of a start, for who waits.
pub fn say(progress: Progress) {
    match progress {
        Progress::Doing(what) | Progress::Note(what) => eprintln!("     {what} …"),
        Progress::Done { what, detail, took } => {
            eprintln!("     {what}: {detail} ({} ms)", took.as_millis());
        }
    }
}
