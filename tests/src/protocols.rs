//! Real servers behind one sidecar, real clients before others, one for each way in: whatever protocol they speak, and whoever
//! speaks first, the mesh is not noticed.
//!
//! [`run`] is to be read from top to bottom. Each protocol is a module below this one: how its server is started, and what its clients
//! do. Servers and clients are the machine's; `cargo xtask test` installs them where it can. One that is not there is left out,
//! and said so; only PostgreSQL, which the mesh itself needs, never is.

mod http;
mod mail;
mod mariadb;
mod postgres;
mod redis;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, Command};
use weft_pgserver::reserve_loopback_port;

use crate::mesh::{Mesh, local};
use crate::sidecar::{LEASH, OwnSidecar, Place};
use crate::wait::until;
use crate::weft::{Said, program};
use crate::{programs, weft};

/// How long a server may take to be there.
const START_LIMIT: Duration = Duration::from_secs(20);

/// The service of all servers: a port of its own for each protocol.
const SERVICE: &str = "default/servers";
/// Its name for apps.
const NAME: &str = "servers.default.weft";

/// Where the name's sidecar answers what address it has.
const NAMESERVER: &str = "127.0.0.53";
/// Where the sidecar of redirected connections listens.
const REDIRECTED: u16 = 15_002;
/// Where it answers redirected queries.
const REDIRECTED_QUERIES: u16 = 15_053;
/// Whose connections are redirected.
const USER: &str = "nobody";

/// A way in, as a client sees it.
struct Way {
    name: &'static str,
    host: &'static str,
    /// Where the service's ports are reached, if not at their own numbers.
    elsewhere: Vec<(u16, u16)>,
    /// What a client's command line begins with.
    wrapped: Vec<String>,
}

impl Way {
    fn port(&self, port: u16) -> u16 {
        let found = self.elsewhere.iter().find(|(of, _)| *of == port);
        found.map_or(port, |(_, at)| *at)
    }

    /// A client's command, in no home, so that nobody's settings change what it does.
    fn client(&self, client: impl AsRef<Path>) -> Command {
        let words = self.wrapped.iter().map(String::as_str).chain(["env", "HOME=/nonexistent"]);
        let mut words = words.collect::<Vec<_>>().into_iter();
        let mut command = program(words.next().unwrap_or_default());
        command.args(words).arg(client.as_ref());
        command
    }

    /// Runs a client to its end, which must be a good one. Returns what it printed.
    async fn ok(&self, client: Command) -> anyhow::Result<String> {
        let said = self.said(client).await?;
        ensure!(said.status == Some(0), "{said}");
        Ok(said.stdout)
    }

    async fn said(&self, client: Command) -> anyhow::Result<Said> {
        weft::run(client).await
    }

    /// What a server says to a client that says nothing.
    async fn greeting(&self, port: u16, bytes: usize) -> anyhow::Result<Vec<u8>> {
        let mut bash = self.client("bash");
        let script =
            format!("exec 3<>/dev/tcp/{}/{} && head -c {bytes} <&3 | base64", self.host, self.port(port));
        bash.args(["-c", &script]);
        let said = self.ok(bash).await?;
        ensure!(!said.trim().is_empty(), "the server said nothing");
        Ok(said.into_bytes())
    }
}

/// A server that ends with this process.
struct Server {
    _process: Child,
    _hold: ChildStdin,
    address: SocketAddr,
}

impl Server {
    /// Starts what listens on the address, and waits until it does. What it prints goes to `log`.
    async fn start(command: Command, address: SocketAddr, log: &Path) -> anyhow::Result<Self> {
        let command = command.into_std();
        let mut leashed = program("/bin/sh");
        leashed.args(["-c", LEASH, "sh"]).arg(command.get_program()).args(command.get_args());
        if let Some(dir) = command.get_current_dir() {
            leashed.current_dir(dir);
        }
        let output = std::fs::File::create(log)?;
        leashed.stdin(Stdio::piped()).stdout(output.try_clone()?).stderr(output).process_group(0);
        let mut process = leashed.spawn()?;
        let hold = process.stdin.take().context("the server has no leash")?;
        until(&format!("a server on {address}"), START_LIMIT, async || {
            drop(TcpStream::connect(address).await?);
            Ok(())
        })
        .await
        .with_context(|| std::fs::read_to_string(log).unwrap_or_default())?;
        Ok(Self { _process: process, _hold: hold, address })
    }
}

/// Says of a protocol that it is not tried, and why.
fn left_out(protocol: &str, program: &str) {
    eprintln!(
        "LEFT OUT: {protocol}, since this machine has no `{program}`; `cargo xtask test` installs it where it can"
    );
}

/// A program of the machine, in the folders of root's PATH too.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders =
        std::env::split_paths(&path).chain(["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// All programs of a protocol; none if one is absent, which is said.
fn find_all<const N: usize>(protocol: &str, programs: [&str; N]) -> Option<[PathBuf; N]> {
    let absent = programs.iter().find(|program| find(program).is_none());
    if let Some(program) = absent {
        left_out(protocol, program);
        return None;
    }
    let found: Vec<_> = programs.iter().filter_map(|program| find(program)).collect();
    found.try_into().ok()
}

/// Servers that are there.
struct Servers {
    postgres: postgres::Postgres,
    mariadb: Option<mariadb::MariaDb>,
    redis: Option<redis::Redis>,
    mail: Option<mail::Mail>,
    http: Option<http::Http>,
}

impl Servers {
    async fn start(dir: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            postgres: postgres::Postgres::start(dir).await.context("PostgreSQL")?,
            mariadb: mariadb::MariaDb::start(dir).await.context("MariaDB")?,
            redis: redis::Redis::start(dir).await.context("Redis")?,
            mail: mail::Mail::start(dir).await.context("SMTP")?,
            http: http::Http::start(dir).await.context("HTTP")?,
        })
    }

    /// Ports of the service, and what listens behind them.
    fn apps(&self) -> Vec<(u16, SocketAddr)> {
        let mut apps = vec![(postgres::PORT, self.postgres.address())];
        apps.extend(self.mariadb.as_ref().map(|it| (mariadb::PORT, it.server.address)));
        apps.extend(self.redis.as_ref().map(|it| (redis::PORT, it.server.address)));
        apps.extend(self.mail.as_ref().map(|it| (mail::PORT, it.server.address)));
        apps.extend(self.http.as_ref().map(|it| (http::PORT, it.old.address)));
        apps.extend(self.http.as_ref().map(|it| (http::PORT_2, it.new.address)));
        apps
    }

    async fn through(&self, way: &Way) -> anyhow::Result<()> {
        self.postgres.through(way).await.context("PostgreSQL")?;
        if let Some(mariadb) = &self.mariadb {
            mariadb.through(way).await.context("MariaDB")?;
        }
        if let Some(redis) = &self.redis {
            redis.through(way).await.context("Redis")?;
        }
        if let Some(mail) = &self.mail {
            mail.through(way).await.context("SMTP")?;
        }
        if let Some(http) = &self.http {
            http.through(way).await.context("HTTP")?;
        }
        Ok(())
    }
}

/// Every protocol through every way in. To be called in a network of its own (see [`network`](crate::network)).
///
/// # Errors
///
/// A client notices the mesh.
pub async fn run() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("weft-protocols-").tempdir()?;
    // Servers and clients run as other users too.
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let programs = programs::built()?;
    let mut mesh = Mesh::open(&dir.path().join("home"), &programs, None).await?;
    mesh.start().await?;
    let servers = Servers::start(dir.path()).await?;
    let apps = servers.apps();
    let said = mesh.weft.apply(&resources(&apps)).await?;
    ensure!(said.status == Some(0), "{said}");

    let told = apps.iter().flat_map(|(port, app)| ["--app".to_owned(), format!("{port}={app}")]);
    let before = Place::Told(told.collect());
    let instance = format!("{SERVICE}/servers-1");
    let behind = OwnSidecar::start(&mesh, &programs.proxy, &instance, &before).await?;
    let ways = ways(dir.path(), &apps)?;
    let mut guests = Vec::new();
    for (number, (way, told)) in ways.into_iter().enumerate() {
        let instance = format!("default/guest/guest-{number}");
        let sidecar = OwnSidecar::start(&mesh, &programs.proxy, &instance, &Place::Told(told)).await?;
        guests.push((way, sidecar));
    }
    redirect(&programs.proxy).await?;

    for (way, sidecar) in &guests {
        let began = tokio::time::Instant::now();
        let tried = servers.through(way).await.with_context(|| way.name);
        tried.with_context(|| format!("the records: {:?}", sidecar.records().after(0)))?;
        // It was the sidecar that clients spoke to, and not the server.
        for (port, _) in &apps {
            let what = format!("a connection to port {port}");
            let went = sidecar.records().find(0, &what, |record| {
                record.text("destination") == SERVICE
                    && record.number("port") == Some((*port).into())
                    && !record.text("tls").is_empty()
            });
            went.await?;
        }
        eprintln!("{}: {} protocols, {:.1} s", way.name, apps.len(), began.elapsed().as_secs_f32());
    }
    for (_, sidecar) in guests {
        sidecar.stop().await?;
    }
    behind.stop().await?;
    drop(servers);
    mesh.stop().await
}

fn resources(apps: &[(u16, SocketAddr)]) -> String {
    let ports: Vec<_> = apps.iter().map(|(port, _)| format!("{{ name: p{port}, port: {port} }}")).collect();
    let numbers: Vec<_> = apps.iter().map(|(port, _)| port.to_string()).collect();
    format!(
        "kind: Service
name: {SERVICE}
ports: [{}]
---
kind: Service
name: default/guest
ports: [{{ name: any, port: 9000 }}]
---
kind: SecurityPolicy
scope: {SERVICE}
default: deny
rules:
  - {{ name: guests, action: allow, from: {{ services: [default/guest] }}, ports: [{}] }}
",
        ports.join(", "),
        numbers.join(", ")
    )
}

/// The ways in, and what a sidecar is told for each.
fn ways(dir: &Path, apps: &[(u16, SocketAddr)]) -> anyhow::Result<Vec<(Way, Vec<String>)>> {
    let upstreams = |at: &dyn Fn(u16) -> String| {
        apps.iter()
            .flat_map(|(port, _)| ["--upstream".to_owned(), format!("{SERVICE}:{port}{}", at(*port))])
            .collect()
    };
    let with = |args: &[&str]| {
        let mut told: Vec<String> = upstreams(&|_| String::new());
        told.extend(args.iter().map(|arg| (*arg).to_owned()));
        told
    };
    let mut elsewhere = Vec::new();
    for (port, _) in apps {
        elsewhere.push((*port, reserve_loopback_port()?));
    }
    let explicit = Way { name: "explicit port", host: "127.0.0.1", elsewhere, wrapped: Vec::new() };
    let told = upstreams(&|port| format!("={}", local(explicit.port(port))));

    let nameservers = dir.join("resolv.conf");
    std::fs::write(&nameservers, format!("nameserver {NAMESERVER}\n"))?;
    let mount = format!("mount --bind {} /etc/resolv.conf && exec \"$@\"", nameservers.display());
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let name = Way {
        name: "name",
        host: NAME,
        elsewhere: Vec::new(),
        wrapped: words(&["unshare", "--mount", "sh", "-c", &mount, "sh"]),
    };
    let listen = format!("{NAMESERVER}:53");
    let told_name = with(&["--loopback-addresses", "--dns-listen", &listen, "--dns-upstream", "192.0.2.1"]);

    let redirect = Way {
        name: "redirect",
        host: NAME,
        elsewhere: Vec::new(),
        wrapped: words(&["setpriv", &format!("--reuid={USER}"), "--clear-groups"]),
    };
    let (four, six) = (local(REDIRECTED), format!("[::1]:{REDIRECTED}"));
    let told_redirect = with(&[
        "--redirect-listen",
        &format!("{four},{six}"),
        "--dns-listen",
        &local(REDIRECTED_QUERIES).to_string(),
        "--dns-upstream",
        "192.0.2.1",
    ]);
    Ok(vec![(explicit, told), (name, told_name), (redirect, told_redirect)])
}

/// Leads one user's connections and queries to the sidecar.
async fn redirect(weft_proxy: &Path) -> anyhow::Result<()> {
    let mut install = program(weft_proxy);
    install.args(["redirect", "install", "--only-uid", USER]);
    install.args(["--proxy-port", &REDIRECTED.to_string(), "--dns-port", &REDIRECTED_QUERIES.to_string()]);
    let said = weft::run(install).await?;
    ensure!(said.status == Some(0), "{said}");
    Ok(())
}
