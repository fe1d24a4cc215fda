//! PostgreSQL, with every `sslmode` there is, to a server that speaks TLS and to the same one once it does not.

use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio::process::Command;
use weft_pgserver::{ClusterConfig, Server};

use super::{NAME, START_LIMIT, Way};
use crate::mesh::local;
use crate::postgres::{connect, start};
use crate::sql::psql;
use crate::wait::until;
use crate::weft::Said;

/// The service's port.
pub(super) const PORT: u16 = 5432;

/// How many bytes a long answer has.
const LONG: usize = 4_000_000;

/// How a client asks for TLS, and whether the server's connection then has it (`t` or `f`) where the server speaks TLS, and where it
/// does not; none if the client gives up.
const MODES: [(&str, &str, Option<&str>); 6] = [
    ("disable", "f", Some("f")),
    ("allow", "f", Some("f")),
    ("prefer", "t", Some("f")),
    ("require", "t", None),
    ("verify-ca", "t", None),
    ("verify-full", "t", None),
];

pub(super) struct Postgres {
    server: Server,
    psql: PathBuf,
    root: PathBuf,
}

impl Postgres {
    pub(super) async fn start(dir: &Path) -> anyhow::Result<Self> {
        let psql = psql().context("there is no psql beside the server's programs nor in PATH")?;
        let server = start(ClusterConfig::new(dir.join("postgres"))).await?;
        let root = dir.join("root.pem");
        certify(&server.cluster().data_dir(), &root)?;
        let postgres = Self { server, psql, root };
        postgres.speak_tls(true).await?;
        Ok(postgres)
    }

    pub(super) fn address(&self) -> SocketAddr {
        local(self.server.port())
    }

    pub(super) async fn through(&self, way: &Way) -> anyhow::Result<()> {
        for (mode, with, _) in MODES {
            let found = way.ok(self.psql(way, mode, &["host", way.host], IS_TLS)).await;
            let found = found.with_context(|| format!("sslmode={mode}"))?;
            ensure!(found.trim() == with, "sslmode={mode}: TLS is {found}");
        }
        // The certificate is the server's own, which the client looks at. (Another name does not lead here the other ways.)
        if !way.elsewhere.is_empty() {
            let other = ["hostaddr", way.host, "host", "other.example"];
            let said = way.said(self.psql(way, "verify-full", &other, IS_TLS)).await?;
            ensure!(said.status == Some(2) && said.stderr.contains("does not match host name"), "{said}");
        }
        let long = format!("select repeat('x', {LONG})");
        for mode in ["disable", "require"] {
            let found = way.ok(self.psql(way, mode, &["host", way.host], &long)).await?;
            ensure!(found.len() == LONG + 1, "{} bytes came of {LONG}", found.len());
        }
        self.speak_tls(false).await?;
        let tried = self.without_tls(way).await;
        self.speak_tls(true).await?;
        tried
    }

    async fn without_tls(&self, way: &Way) -> anyhow::Result<()> {
        for (mode, _, without) in MODES {
            let said: Said = way.said(self.psql(way, mode, &["host", way.host], IS_TLS)).await?;
            let as_expected = match without {
                Some(tls) => said.status == Some(0) && said.stdout.trim() == tls,
                None => said.status == Some(2) && said.stderr.contains("server does not support SSL"),
            };
            ensure!(as_expected, "sslmode={mode}: {said}");
        }
        Ok(())
    }

    fn psql(&self, way: &Way, mode: &str, host: &[&str], sql: &str) -> Command {
        let mut line = format!(
            "port={} dbname=postgres sslmode={mode} sslrootcert={} gssencmode=disable connect_timeout=10",
            way.port(PORT),
            self.root.display()
        );
        for pair in host.chunks_exact(2) {
            line += &format!(" {}={}", pair[0], pair[1]);
        }
        let mut psql = way.client(&self.psql);
        psql.args(["--no-psqlrc", "--no-password", "-tAc", sql, &line]);
        // The user and the password of a server that only this test reaches.
        let url = self.server.url("postgres");
        let user = url.split_once("://").and_then(|(_, rest)| rest.split_once('@')).map(|(user, _)| user);
        let (user, password) = user.and_then(|user| user.split_once(':')).unwrap_or_default();
        psql.env("PGUSER", user).env("PGPASSWORD", password);
        psql
    }

    /// Makes the server offer TLS, or refuse it, and waits until new connections see that.
    async fn speak_tls(&self, on: bool) -> anyhow::Result<()> {
        let superuser = connect(&self.server, "postgres").await?;
        let set = if on { "alter system set ssl = on" } else { "alter system set ssl = off" };
        superuser.client.batch_execute(set).await?;
        superuser.client.batch_execute("select pg_reload_conf()").await?;
        let wanted = if on { "on" } else { "off" };
        until(&format!("ssl = {wanted}"), START_LIMIT, async || {
            let session = connect(&self.server, "postgres").await?;
            let row = session.client.query_one("show ssl", &[]).await?;
            ensure!(row.get::<_, &str>(0) == wanted, "it is not");
            Ok(())
        })
        .await
    }
}

/// Whether the connection that asks has TLS, as the server sees it.
const IS_TLS: &str = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";

/// Gives the server a certificate for its names, signed by a root that clients know.
fn certify(data: &Path, root: &Path) -> anyhow::Result<()> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // Not the name that certificates have by default: one that names itself as its issuer is taken for its own root.
    params.distinguished_name.push(DnType::CommonName, "root of the trial");
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    std::fs::write(root, issuer.pem())?;
    let key = KeyPair::generate()?;
    let names = vec![NAME.to_owned(), "127.0.0.1".to_owned()];
    let certificate = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
    let owner = std::fs::metadata(data)?;
    let files = [("server.crt", certificate.pem()), ("server.key", key.serialize_pem())];
    for (name, text) in files {
        let path = data.join(name);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        chown(&path, Some(owner.uid()), Some(owner.gid()))?;
    }
    Ok(())
}
