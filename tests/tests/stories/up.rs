//! `weft up`, its end in every way, and its next start.

use anyhow::ensure;
use nix::sys::signal::Signal;
use weft_tests::http;
use weft_tests::up::Folder;
use weft_tests::weft::{program, run};

/// Killed without a word, it leaves nothing behind, and the next start goes on with the same log. Then it is stopped from
/// another terminal.
#[tokio::test]
async fn a_killed_up_leaves_nothing_and_the_next_one_resumes() -> anyhow::Result<()> {
    let folder = Folder::new()?;
    let mut up = folder.up().await?;
    ensure!(up.footprint.processes() > 10, "a mesh has more than {} processes", up.footprint.processes());
    let head = folder.log_head().await?;
    up.end(Signal::SIGKILL).await?;
    up.gone().await?;

    let mut up = folder.up().await?;
    let first = folder.weft().json_lines(&["log", "-n", "0", "--at", &head.to_string()]).await?;
    ensure!(first.len() as u64 == head, "{} events up to {head}", first.len());
    ensure!(
        folder.weft().run(["verify"]).await?.status == Some(0),
        "the log or what follows from it is damaged"
    );

    let down = folder.weft().run(["down", "--home", &folder.home().dir().to_string_lossy()]).await?;
    ensure!(down.status == Some(0), "{down}");
    ensure!(up.ended().await?.success(), "`weft up` ended with a fault");
    up.gone().await
}

/// What is printed when everything is up works when pasted, and Ctrl-C ends it well.
#[tokio::test]
async fn the_printed_lines_work_when_pasted() -> anyhow::Result<()> {
    let folder = Folder::new()?;
    let mut up = folder.up().await?;

    let mut pasted = 0;
    let lines: Vec<&str> = up.introduction.lines().map(str::trim).collect();
    for pair in lines.windows(2) {
        let [what, line] = pair else { continue };
        if line.contains("psql ") && weft_tests::sql::psql().is_some() {
            let said = paste(&folder, line).await?;
            if what.contains("refused") {
                ensure!(said.status != Some(0), "{what}: {said}");
            } else {
                ensure!(said.status == Some(0) && said.stdout.contains("yarn"), "{what}: {said}");
            }
            pasted += 1;
        } else if let Some(url) = line.strip_prefix("curl -s http://") {
            // The machine may have no curl; what it would ask is asked.
            let (address, path) = url.split_once('/').unwrap_or((url, ""));
            let answer = http::body(address.parse()?, &format!("/{path}")).await?;
            ensure!(answer.contains("\"instance\":\"api-"), "{what}: {answer}");
            pasted += 1;
        }
    }
    let expected = if weft_tests::sql::psql().is_some() { 4 } else { 2 };
    ensure!(pasted == expected, "{pasted} of {expected} lines found in:\n{}", up.introduction);

    ensure!(up.end(Signal::SIGINT).await?.success(), "Ctrl-C is no fault");
    up.gone().await
}

/// Runs a line in a shell, in the folder, as somebody who pastes it there does.
async fn paste(folder: &Folder, line: &str) -> anyhow::Result<weft_tests::weft::Said> {
    let mut shell = program("/bin/sh");
    shell.args(["-c", line]).current_dir(folder.path());
    if let Some(psql) = weft_tests::sql::psql().and_then(|psql| psql.parent().map(ToOwned::to_owned)) {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(std::env::split_paths(&path).chain([psql]))?;
        shell.env("PATH", path);
    }
    run(shell).await
}
