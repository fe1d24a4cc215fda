//! A service of the test's own in a mesh: `default/blob`, reached from `default/caller`, with a sidecar of its own at either
//! end and both ends of every connection in the test's hands.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use weft_pgserver::reserve_loopback_port;

use crate::app::{App, Pair};
use crate::mesh::{Mesh, local};
use crate::sidecar::{OwnSidecar, Place};
use crate::wait::until;

/// The service and its port.
pub const PORT: u16 = 9000;
/// How long a change may take to be taken, or to be everywhere, whatever happens to controllers and database meanwhile.
const CHANGE_LIMIT: Duration = Duration::from_secs(30);
/// How long the first connection may take to pass.
const REACH_LIMIT: Duration = Duration::from_secs(20);

/// The two services. The caller serves nothing, but a service has a port.
const SERVICES: &str = "kind: Service
name: default/blob
ports: [{ name: bytes, port: 9000 }]
---
kind: Service
name: default/caller
ports: [{ name: unused, port: 9001 }]
---
";

/// The policy that lets the caller connect.
pub const ALLOW: &str = "kind: SecurityPolicy
scope: default/blob
default: deny
rules:
  - { name: caller-may-connect, action: allow, from: { services: [default/caller] }, ports: [9000] }
";

/// The policy that takes it back.
pub const DENY: &str = "kind: SecurityPolicy
scope: default/blob
default: deny
rules:
  - { name: caller-may-connect, action: allow, from: { services: [default/caller] }, ports: [9000] }
  - { name: caller-is-cut-off, action: deny, from: { services: [default/caller] } }
";

/// The service, its caller, and the sidecars of both.
#[derive(Debug)]
pub struct Blob {
    app: App,
    address: SocketAddr,
    /// The sidecar before the app.
    pub server: OwnSidecar,
    /// The sidecar that leads there.
    pub client: OwnSidecar,
}

impl Blob {
    /// Joins a mesh, or joins it again, and waits until a connection passes.
    ///
    /// # Errors
    ///
    /// The mesh does not take the services or the sidecars, or no connection passes.
    pub async fn join(mesh: &Mesh, weft_proxy: &Path) -> anyhow::Result<Self> {
        let controllers = mesh.local.controller_addresses();
        Self::join_through(mesh, weft_proxy, &controllers).await
    }

    /// The same, with other addresses of controllers: lines to them.
    ///
    /// # Errors
    ///
    /// As [`join`](Self::join).
    pub async fn join_through(
        mesh: &Mesh,
        weft_proxy: &Path,
        controllers: &[String],
    ) -> anyhow::Result<Self> {
        let declared = mesh.weft.run(["get", "service", "default/blob"]).await?.status == Some(0);
        if !declared {
            let said = mesh.weft.apply(&format!("{SERVICES}{ALLOW}")).await?;
            ensure!(said.status == Some(0), "{said}");
        }
        let app = App::listen().await?;
        let address = local(reserve_loopback_port()?);
        let before = Place::Before { port: PORT, app: app.address() };
        let server =
            OwnSidecar::start_through(mesh, weft_proxy, "default/blob/blob-1", &before, controllers).await?;
        let towards = Place::Towards { upstream: format!("default/blob:{PORT}"), listen: address };
        let client =
            OwnSidecar::start_through(mesh, weft_proxy, "default/caller/caller-1", &towards, controllers)
                .await?;
        let blob = Self { app, address, server, client };
        let reached =
            until("caller to reach blob", REACH_LIMIT, async || blob.open().await?.ping().await).await;
        reached.context("a service of our own")?;
        Ok(blob)
    }

    /// Changes its policy, as soon as somebody takes the change, in a way that lets the same pass.
    ///
    /// # Errors
    ///
    /// Nobody takes it in time.
    pub async fn change(mesh: &Mesh, number: u32) -> anyhow::Result<()> {
        let changed = ALLOW.replace("caller-may-connect", &format!("caller-may-connect-{number}"));
        until("a change to be taken", CHANGE_LIMIT, async || {
            let said = mesh.weft.apply(&changed).await?;
            ensure!(said.status == Some(0), "{said}");
            Ok(())
        })
        .await
    }

    /// The version that a sidecar is to run.
    ///
    /// # Errors
    ///
    /// The mesh does not know of it.
    pub async fn wanted(mesh: &Mesh, instance: &str) -> anyhow::Result<String> {
        let sql = format!("select wanted from status.sidecars where instance = '{instance}'");
        let rows = mesh.weft.json(&["sql", &sql]).await?;
        Ok(rows[0]["wanted"].as_str().with_context(|| format!("{rows}"))?.to_owned())
    }

    /// Waits until so many sidecars of a mesh, which are all, run what they should; returns the log's head.
    ///
    /// # Errors
    ///
    /// They do not in time.
    pub async fn settled(mesh: &Mesh, sidecars: u64) -> anyhow::Result<u64> {
        const LATE: &str = "select count(*) filter (where not connected or applied is distinct from wanted) as late, \
            count(*) as sidecars, (select projection_lag from status.log) as lag, \
            (select head from status.log) as head from status.sidecars";
        until("every sidecar to run what it should", CHANGE_LIMIT, async || {
            let rows = mesh.weft.json(&["sql", LATE]).await?;
            ensure!(rows[0]["late"] == 0 && rows[0]["lag"] == 0 && rows[0]["sidecars"] == sidecars, "{rows}");
            rows[0]["head"].as_u64().context("no head")
        })
        .await
    }

    /// A connection from the caller to the service.
    ///
    /// # Errors
    ///
    /// It is refused, or does not arrive in time.
    pub async fn open(&self) -> anyhow::Result<Pair> {
        self.app.open(self.address).await
    }

    /// The same through another sidecar, which takes connections to the service at `address`.
    ///
    /// # Errors
    ///
    /// It is refused, or does not arrive in time.
    pub async fn open_through(&self, address: SocketAddr) -> anyhow::Result<Pair> {
        self.app.open(address).await
    }

    /// Stops both sidecars.
    ///
    /// # Errors
    ///
    /// One does not stop in time.
    pub async fn stop(self) -> anyhow::Result<()> {
        let (client, server) = tokio::join!(self.client.stop(), self.server.stop());
        client.context("the caller's sidecar")?;
        server.context("the service's sidecar")
    }
}
