//! MariaDB, whose server speaks first.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use weft_pgserver::reserve_loopback_port;

use super::{Server, Way, find_all};
use crate::mesh::local;
use crate::weft::{program, run};

/// The service's port.
pub(super) const PORT: u16 = 3306;

/// How many bytes a long answer has.
const LONG: usize = 4_000_000;

pub(super) struct MariaDb {
    pub(super) server: Server,
    client: PathBuf,
}

impl MariaDb {
    pub(super) async fn start(dir: &Path) -> anyhow::Result<Option<Self>> {
        let Some([install, server, client]) =
            find_all("MariaDB", ["mariadb-install-db", "mariadbd", "mariadb"])
        else {
            return Ok(None);
        };
        let data = dir.join("mariadb");
        let data = format!("--datadir={}", data.display());
        let mut command = program(install);
        command.args(["--no-defaults", &data, "--user=root", "--skip-test-db"]);
        command.arg("--auth-root-authentication-method=normal");
        let said = run(command).await?;
        ensure!(said.status == Some(0), "{said}");
        let address = local(reserve_loopback_port()?);
        let mut command = program(server);
        command.args([
            "--no-defaults",
            &data,
            "--user=root",
            "--skip-name-resolve",
            "--bind-address=127.0.0.1",
        ]);
        command.arg(format!("--port={}", address.port()));
        command.arg(format!("--socket={}", dir.join("mariadb.sock").display()));
        command.arg(format!("--pid-file={}", dir.join("mariadb.pid").display()));
        let server = Server::start(command, address, &dir.join("mariadb.log")).await?;
        Ok(Some(Self { server, client }))
    }

    pub(super) async fn through(&self, way: &Way) -> anyhow::Result<()> {
        way.greeting(PORT, 5).await?;
        let sql = format!(
            "create database if not exists trial; create or replace table trial.t (n int);
             insert into trial.t values (1), (2), (4); select sum(n) from trial.t; select repeat('x', {LONG})"
        );
        let mut client = way.client(&self.client);
        client.args([
            "--no-defaults",
            "--protocol=tcp",
            "--host",
            way.host,
            "--port",
            &way.port(PORT).to_string(),
        ]);
        client.args(["--user=root", "--batch", "--skip-column-names", "--execute", &sql]);
        let said = way.ok(client).await?;
        let (sum, long) = said.split_once('\n').unwrap_or_default();
        ensure!((sum, long.len()) == ("7", LONG + 1), "{sum}, then {} bytes of {LONG}", long.len());
        Ok(())
    }
}
