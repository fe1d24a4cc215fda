//! HTTP/1.1 on a connection that is kept, and HTTP/2 with many requests at once on one.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use weft_pgserver::reserve_loopback_port;

use super::{Server, Way, find_all};
use crate::mesh::local;
use crate::weft::program;

/// The service's port for HTTP/1.1.
pub(super) const PORT: u16 = 8080;
/// And for HTTP/2.
pub(super) const PORT_2: u16 = 8082;

/// Bytes of what is fetched.
const BYTES: usize = 300_000;

pub(super) struct Http {
    /// Of HTTP/1.1.
    pub(super) old: Server,
    /// Of HTTP/2.
    pub(super) new: Server,
    curl: PathBuf,
    h2load: PathBuf,
    body: Vec<u8>,
}

impl Http {
    pub(super) async fn start(dir: &Path) -> anyhow::Result<Option<Self>> {
        let programs = ["python3", "nghttpd", "curl", "h2load"];
        let Some([python, nghttpd, curl, h2load]) = find_all("HTTP", programs) else { return Ok(None) };
        let site = dir.join("site");
        std::fs::create_dir(&site)?;
        let body: Vec<u8> = (0..BYTES).map(|at| (at * 31 + at / 251).to_le_bytes()[0]).collect();
        std::fs::write(site.join("blob"), &body)?;

        let address = local(reserve_loopback_port()?);
        let mut command = program(python);
        // Its `--protocol` is newer than some Python 3.
        let serve = "import http.server as h, sys; h.SimpleHTTPRequestHandler.protocol_version = 'HTTP/1.1'; \
                     h.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), h.SimpleHTTPRequestHandler).serve_forever()";
        command.args(["-c", serve, &address.port().to_string()]).current_dir(&site);
        let old = Server::start(command, address, &dir.join("http1.log")).await?;

        let address = local(reserve_loopback_port()?);
        let mut command = program(nghttpd);
        command
            .args(["--no-tls", "--address=127.0.0.1", "--htdocs"])
            .arg(&site)
            .arg(address.port().to_string());
        let new = Server::start(command, address, &dir.join("http2.log")).await?;
        Ok(Some(Self { old, new, curl, h2load, body }))
    }

    pub(super) async fn through(&self, way: &Way) -> anyhow::Result<()> {
        self.fetch(way, PORT, &["--http1.1"], &["first", "second"], "1.1 200 1\n1.1 200 0\n").await?;
        // Once: some versions of curl send a second request of this kind wrongly, with and without a mesh. h2load sends many.
        self.fetch(way, PORT_2, &["--http2-prior-knowledge"], &["first"], "2 200 1\n").await?;
        let mut h2load = way.client(&self.h2load);
        h2load.args(["-n", "400", "-c", "4", "-m", "16"]);
        h2load.arg(format!("http://{}:{}/blob", way.host, way.port(PORT_2)));
        let said = way.ok(h2load).await?;
        ensure!(said.contains("400 succeeded, 0 failed, 0 errored, 0 timeout"), "{said}");
        Ok(())
    }

    /// Fetches the same into each file, on one connection.
    async fn fetch(
        &self,
        way: &Way,
        port: u16,
        flags: &[&str],
        files: &[&str],
        shown: &str,
    ) -> anyhow::Result<()> {
        let url = format!("http://{}:{}/blob", way.host, way.port(port));
        let dir = tempfile::Builder::new().prefix("weft-fetched-").tempdir()?;
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        let mut curl = way.client(&self.curl);
        curl.args(["-sS", "--max-time", "20"])
            .args(flags)
            .args(["-w", "%{http_version} %{http_code} %{num_connects}\n"]);
        for name in files {
            curl.arg("-o").arg(dir.path().join(name)).arg(&url);
        }
        let said = way.ok(curl).await?;
        ensure!(said == shown, "{said}");
        for name in files {
            ensure!(std::fs::read(dir.path().join(name))? == self.body, "other bytes came than there are");
        }
        Ok(())
    }
}
