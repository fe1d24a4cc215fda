//! The pages of `docs/ways-in`: every command of theirs is run as it stands there, on a mesh like theirs, and what they show is what is
//! expected. All in a network namespace of its own, since the pages name ports and change rules; that needs root.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::process::Command;
use tokio::time::timeout;
use weft_tests::mesh::Mesh;
use weft_tests::weft::program;
use weft_tests::{network, programs};

/// In the order in which they are run: the preparation first.
const PAGES: [(&str, &str); 6] = [
    ("README.md", include_str!("../../../docs/ways-in/README.md")),
    ("explicit-port.md", include_str!("../../../docs/ways-in/explicit-port.md")),
    ("names.md", include_str!("../../../docs/ways-in/names.md")),
    ("redirect.md", include_str!("../../../docs/ways-in/redirect.md")),
    ("gate.md", include_str!("../../../docs/ways-in/gate.md")),
    ("standard-client.md", include_str!("../../../docs/ways-in/standard-client.md")),
];
/// The controller of the pages.
const CONTROLLER: &str = "127.0.0.1:7400";
/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn the_pages_do_what_they_say() -> anyhow::Result<()> {
    network::leave()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(pages())
}

async fn pages() -> anyhow::Result<()> {
    network::with_a_way_out().await?;
    let dir = tempfile::Builder::new().prefix("weft-story-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let programs = programs::built()?;
    let mut mesh = Mesh::open(&dir.path().join("home"), &programs, None).await?;
    mesh.start().await?;

    let desk = dir.path().join("desk");
    std::fs::create_dir(&desk)?;
    std::os::unix::fs::symlink(mesh.local.home().dir(), desk.join(".weft"))?;
    let controller = mesh.local.controller_addresses().join(",");
    let blocks: Vec<_> = PAGES.iter().flat_map(|(page, text)| blocks(page, text)).collect();
    let script = script(&blocks).replace(CONTROLLER, &controller);
    let mut bash = program("bash");
    let bin = programs.proxy.parent().context("programs are in a folder")?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths([bin.to_owned()].into_iter().chain(std::env::split_paths(&path)))?;
    bash.args(["-c", &script]).current_dir(&desk).env("PATH", path);
    bash.env("WEFT_CONTEXT", mesh.local.home().context());
    let ended = ran(bash).await;
    let told = blocks.iter().enumerate().try_for_each(|(index, block)| block.told(&output(&desk, index)));
    if let Err(error) = ended {
        let last = blocks.iter().enumerate().rfind(|(index, _)| output(&desk, *index).exists());
        let place = last.map_or_else(String::new, |(index, block)| {
            let text = std::fs::read_to_string(output(&desk, index)).unwrap_or_default();
            format!("{}: {}\n{text}\n{}", block.page, block.commands, records(&desk))
        });
        return Err(error.context(place));
    }
    told?;
    mesh.stop().await
}

/// The connection records of the pages' sidecars, which say why.
fn records(desk: &Path) -> String {
    let files = std::fs::read_dir(desk).into_iter().flatten().flatten().map(|file| file.path());
    let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    logs.filter_map(|path| std::fs::read_to_string(path).ok()).collect()
}

async fn ran(mut bash: Command) -> anyhow::Result<()> {
    let mut child = bash.stdin(Stdio::null()).kill_on_drop(true).spawn().context("bash could not be run")?;
    let status = timeout(LIMIT, child.wait()).await.context("the pages' commands do not end")??;
    ensure!(status.success(), "the pages' commands ended with {status}");
    Ok(())
}

/// Commands of a page, and lines that they print.
struct Block {
    page: &'static str,
    commands: String,
    shown: Vec<String>,
}

impl Block {
    fn told(&self, output: &Path) -> anyhow::Result<()> {
        let text =
            std::fs::read_to_string(output).with_context(|| format!("{} was not run", self.commands))?;
        let mut lines = text.lines();
        for shown in &self.shown {
            ensure!(
                lines.any(|line| line == shown),
                "{}: {}\nprints no line {shown:?}, at least not in the order shown, but:\n{text}",
                self.page,
                self.commands
            );
        }
        Ok(())
    }
}

/// Blocks of `sh` are commands; a block of `text` is what the commands before it print.
fn blocks(page: &'static str, text: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(kind) = line.strip_prefix("```") else { continue };
        let body: Vec<_> = lines.by_ref().take_while(|line| *line != "```").collect();
        match (kind, blocks.last_mut()) {
            ("sh", _) => blocks.push(Block { page, commands: body.join("\n"), shown: Vec::new() }),
            ("text", Some(block)) => block.shown = body.iter().map(|line| (*line).to_owned()).collect(),
            _ => {}
        }
    }
    blocks
}

/// One shell runs all, as a person's would; whatever a block prints goes to a file of its own.
fn script(blocks: &[Block]) -> String {
    let runs = blocks
        .iter()
        .enumerate()
        .map(|(index, block)| format!("{{\n{}\n}} >output.{index} 2>&1\n", block.commands));
    format!("set -eu -o pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || :' EXIT\n{}", runs.collect::<String>())
}

fn output(desk: &Path, index: usize) -> std::path::PathBuf {
    desk.join(format!("output.{index}"))
}

#[test]
fn every_page_has_commands_and_what_they_print() -> anyhow::Result<()> {
    for (page, text) in PAGES {
        let blocks = blocks(page, text);
        ensure!(!blocks.is_empty(), "{page} has no commands");
        ensure!(
            page == "README.md" || blocks.iter().any(|block| !block.shown.is_empty()),
            "{page} shows nothing"
        );
    }
    let pages = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ways-in");
    for page in std::fs::read_dir(pages)? {
        let name = page?.file_name();
        ensure!(PAGES.iter().any(|(page, _)| name == *page), "{} is run by nobody", name.display());
    }
    Ok(())
}

#[test]
fn the_compose_file_is_as_the_page_on_the_gate_shows_it() -> anyhow::Result<()> {
    let compose = include_str!("../../../compose.yaml");
    let page = PAGES.iter().find(|(page, _)| *page == "gate.md").map(|(_, text)| *text).unwrap_or_default();
    let Some((_, rest)) = page.split_once("```yaml\n") else {
        bail!("the page shows nothing of the compose file")
    };
    let shown = rest.split("```").next().unwrap_or_default();
    ensure!(shown.contains("gate") && compose.contains(shown), "compose.yaml has no such lines:\n{shown}");
    Ok(())
}
