//! A mesh to measure: a database, controllers, and what an operator does there.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use tempfile::TempDir;
use weft_bench::controller::Process;
use weft_bench::server::{Database, Server};
use weft_fleet::{Mesh, Operator};
use weft_identity::credential::Credential;
use weft_identity::tls::TlsIdentity;
use weft_proto::v1;
use weft_proto::v1::change::Change as Wire;

use crate::Bench;

/// Why the mesh is changed, as the log has it.
pub(crate) const WHY: &str = "bench";
/// A change is seen to be projected that soon.
const PROJECTED_EVERY: Duration = Duration::from_millis(1);
/// The namespace of what only fills the mesh.
const FILLING: &str = "filling";

/// See the module's documentation.
pub(crate) struct TestMesh {
    database: Database,
    url: String,
    state: TempDir,
    program: PathBuf,
    pub(crate) controllers: Vec<Process>,
}

impl TestMesh {
    /// With one controller.
    pub(crate) async fn start(bench: &Bench, what: &str) -> anyhow::Result<Self> {
        let database = bench.server.create(what).await?;
        let url = database.url(&bench.url)?;
        let (state, program) = (tempfile::tempdir()?, bench.controller.clone());
        let mut mesh = Self { database, url, state, program, controllers: Vec::new() };
        mesh.add_controller("controller-1").await?;
        Ok(mesh)
    }

    pub(crate) async fn add_controller(&mut self, name: &str) -> anyhow::Result<()> {
        self.controllers.push(Process::start(&self.program, name, self.state.path(), &self.url).await?);
        Ok(())
    }

    /// How to reach it.
    pub(crate) fn mesh(&self) -> anyhow::Result<Mesh> {
        let first = self.controllers.first().context("the mesh has no controller")?;
        let credential = Credential::load(&first.admin_credential())?;
        let addresses = self.controllers.iter().map(|controller| controller.address().parse());
        Ok(Mesh { controllers: addresses.collect::<Result<_, _>>()?, operator: TlsIdentity::new(credential) })
    }

    /// An operator of the mesh.
    pub(crate) fn operator(&self) -> anyhow::Result<Operator> {
        Ok(Operator::of(&self.mesh()?))
    }

    /// One number of the database.
    pub(crate) async fn number(&self, sql: &str) -> anyhow::Result<i64> {
        self.database.number(sql).await
    }

    /// Services with instances that nobody's sidecar stands before.
    pub(crate) async fn fill(&self, services: usize, instances: usize) -> anyhow::Result<()> {
        let operator = self.operator()?;
        let declared: Vec<_> = (0..services).map(declare).collect();
        operator.apply_all(WHY, &declared).await?;
        let registered =
            (0..services).flat_map(|service| (0..instances).map(move |instance| register(service, instance)));
        Ok(operator.apply_all(WHY, &registered.collect::<Vec<_>>()).await?)
    }

    /// Events in the log.
    pub(crate) async fn events(&self) -> anyhow::Result<i64> {
        self.number("select head from status.log").await
    }

    /// Waits until everything is written that follows from the log.
    pub(crate) async fn projected(&self) -> anyhow::Result<()> {
        self.database.projected(PROJECTED_EVERY).await
    }

    pub(crate) async fn end(self, server: &Server) -> anyhow::Result<()> {
        for controller in self.controllers {
            controller.end().await?;
        }
        server.drop(&self.database).await
    }
}

pub(crate) fn filling(service: usize) -> String {
    format!("{FILLING}/s{service}")
}

fn declare(service: usize) -> Wire {
    Wire::DeclareService(v1::DeclareService {
        name: filling(service),
        ports: vec![v1::ServicePort { name: "main".into(), port: 80 }],
        address: String::new(),
    })
}

pub(crate) fn instance(service: usize, instance: usize) -> String {
    format!("{}/i{instance}", filling(service))
}

pub(crate) fn register(service: usize, instance: usize) -> Wire {
    let address = std::net::Ipv4Addr::new(127, 64, 0, 0).to_bits()
        + u32::try_from(service * 64 + instance).unwrap_or(0);
    Wire::RegisterInstance(v1::RegisterInstance {
        instance: self::instance(service, instance),
        address: std::net::Ipv4Addr::from_bits(address).to_string(),
        port: 15_000,
        ..v1::RegisterInstance::default()
    })
}
