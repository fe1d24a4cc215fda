//! Redis: many commands before the first answer, and answers that nobody asked for.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, ensure};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{ChildStdout, Command};
use tokio::time::timeout;
use weft_pgserver::reserve_loopback_port;

use super::{START_LIMIT, Server, Way, find, find_all, left_out};
use crate::mesh::local;
use crate::weft::program;

/// The service's port.
pub(super) const PORT: u16 = 6379;

/// Commands in a row, without waiting for an answer.
const COMMANDS: usize = 20_000;

pub(super) struct Redis {
    pub(super) server: Server,
    client: PathBuf,
    benchmark: PathBuf,
    commands: PathBuf,
}

impl Redis {
    pub(super) async fn start(dir: &Path) -> anyhow::Result<Option<Self>> {
        // Debian's checker of files is the server under another name, and comes without a service that starts by itself.
        let Some(program_file) = find("redis-server").or_else(|| find("redis-check-rdb")) else {
            left_out("Redis", "redis-server");
            return Ok(None);
        };
        let Some([client, benchmark]) = find_all("Redis", ["redis-cli", "redis-benchmark"]) else {
            return Ok(None);
        };
        let server = dir.join("redis-server");
        std::os::unix::fs::symlink(program_file, &server)?;
        let address = local(reserve_loopback_port()?);
        let mut command = program(server);
        command.args(["--bind", "127.0.0.1", "--port", &address.port().to_string(), "--save", ""]);
        command.args(["--appendonly", "no", "--dir"]).arg(dir);
        let server = Server::start(command, address, &dir.join("redis.log")).await?;
        let commands = dir.join("redis.commands");
        let text = (0..COMMANDS).fold(String::new(), |mut text, number| {
            let _ = write!(text, "RPUSH list {number}\r\n");
            text
        });
        std::fs::write(&commands, text)?;
        Ok(Some(Self { server, client, benchmark, commands }))
    }

    fn client(&self, way: &Way) -> Command {
        let mut client = way.client(&self.client);
        client.args(["-h", way.host, "-p", &way.port(PORT).to_string()]);
        client
    }

    async fn ask(&self, way: &Way, words: &[&str]) -> anyhow::Result<String> {
        let mut client = self.client(way);
        client.args(words);
        Ok(way.ok(client).await?.trim().to_owned())
    }

    pub(super) async fn through(&self, way: &Way) -> anyhow::Result<()> {
        self.ask(way, &["del", "list"]).await?;
        let mut piped = way.client("sh");
        piped.args(["-c", "exec \"$1\" -h \"$2\" -p \"$3\" --pipe < \"$4\"", "sh"]).arg(&self.client);
        piped.args([way.host, &way.port(PORT).to_string()]).arg(&self.commands);
        let said = way.ok(piped).await?;
        ensure!(said.contains(&format!("errors: 0, replies: {COMMANDS}")), "{said}");
        let last = self.ask(way, &["lindex", "list", "-1"]).await?;
        ensure!(last == (COMMANDS - 1).to_string(), "the last of the list is {last}");

        let mut benchmark = way.client(&self.benchmark);
        benchmark.args(["-h", way.host, "-p", &way.port(PORT).to_string()]);
        benchmark.args(["-P", "16", "-c", "8", "-n", "5000", "-q", "-t", "set,get"]);
        let said = way.ok(benchmark).await?;
        ensure!(!said.contains("rror"), "{said}");
        self.news(way).await
    }

    /// What somebody publishes is what who subscribed hears, who says nothing more.
    async fn news(&self, way: &Way) -> anyhow::Result<()> {
        let mut client = self.client(way);
        client.args(["subscribe", "news"]).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut subscriber = client.spawn()?;
        let mut heard = BufReader::new(subscriber.stdout.take().context("no output")?).lines();
        hears(&mut heard, "subscribe").await?;
        for word in ["first", "second"] {
            let heard_by = self.ask(way, &["publish", "news", word]).await?;
            ensure!(heard_by == "1", "{heard_by} heard the news");
            hears(&mut heard, word).await?;
        }
        subscriber.kill().await?;
        Ok(())
    }
}

async fn hears(heard: &mut Lines<BufReader<ChildStdout>>, word: &str) -> anyhow::Result<()> {
    timeout(START_LIMIT, async {
        while let Some(line) = heard.next_line().await? {
            if line == word {
                return Ok(());
            }
        }
        anyhow::bail!("the subscriber ended")
    })
    .await
    .with_context(|| format!("the subscriber hears no {word}"))?
}
