//! SMTP, whose server speaks first and whose client waits for that.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use weft_pgserver::reserve_loopback_port;

use super::{Server, Way, find_all};
use crate::mesh::local;
use crate::weft::program;

/// The service's port.
pub(super) const PORT: u16 = 2525;

/// Lines of a letter.
const LINES: usize = 10_000;

pub(super) struct Mail {
    pub(super) server: Server,
    curl: PathBuf,
    dir: PathBuf,
}

impl Mail {
    pub(super) async fn start(dir: &Path) -> anyhow::Result<Option<Self>> {
        let Some([server, curl]) = find_all("SMTP", ["aiosmtpd", "curl"]) else { return Ok(None) };
        let address = local(reserve_loopback_port()?);
        let mut command = program(server);
        command.args([
            "--nosetuid",
            "--listen",
            &address.to_string(),
            "--class",
            "aiosmtpd.handlers.Mailbox",
        ]);
        command.arg(dir.join("mail"));
        let server = Server::start(command, address, &dir.join("mail.log")).await?;
        Ok(Some(Self { server, curl, dir: dir.to_owned() }))
    }

    pub(super) async fn through(&self, way: &Way) -> anyhow::Result<()> {
        way.greeting(PORT, 3).await?;
        let subject = format!("by way of {}", way.name);
        let lines: String = (0..LINES).map(|line| format!("line {line}\r\n")).collect();
        let letter = self.dir.join("letter");
        std::fs::write(&letter, format!("Subject: {subject}\r\n\r\n{lines}"))?;
        let mut curl = way.client(&self.curl);
        curl.args([
            "-sS",
            "--max-time",
            "20",
            "--mail-from",
            "a@mesh.example",
            "--mail-rcpt",
            "b@mesh.example",
            "-T",
        ]);
        curl.arg(&letter).arg(format!("smtp://{}:{}", way.host, way.port(PORT)));
        way.ok(curl).await?;
        let mut whole = 0;
        for file in std::fs::read_dir(self.dir.join("mail/new"))? {
            let text = std::fs::read_to_string(file?.path())?;
            let last = format!("line {}", LINES - 1);
            whole += usize::from(text.contains(&subject) && text.lines().any(|line| line == last));
        }
        ensure!(whole == 1, "{whole} letters came");
        Ok(())
    }
}
