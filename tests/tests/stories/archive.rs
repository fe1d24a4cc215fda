//! History that was sealed: every answer about it is the one from before, and the mesh goes on.

use anyhow::{Context, ensure};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use weft_eventlog::{ArchiveConfig, archive};
use weft_pgserver::ClusterConfig;
use weft_tests::mesh::{Mesh, WEB_MAY_QUERY};
use weft_tests::weft::Weft;
use weft_tests::{postgres, programs};

/// Puts the rows of a log that nobody appends to into ranges of sixteen positions, as if it had always had such: a range of a
/// million takes more than a story.
const SMALL_RANGES_SQL: &str = "begin;
    alter table weft.event detach partition weft.event_1;
    alter table weft.event_1 rename to whole;
    alter table weft.event detach partition weft.event_1048577;
    drop table weft.event_1048577;
    alter table weft.log_partition disable trigger append_only;
    delete from weft.log_partition;
    alter table weft.log_partition enable always trigger append_only;
    update weft.log_layout set partition_events = 16;
    select weft.make_partitions();
    insert into weft.event select * from weft.whole;
    drop table weft.whole;
    commit";

#[tokio::test]
async fn sealed_history_answers_as_before_and_the_mesh_goes_on() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("weft-story-").tempdir()?;
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711))?;
    let server = postgres::start(ClusterConfig::new(dir.path().join("pg"))).await?;
    let (programs, home) = (programs::built()?, dir.path().join("home"));
    let mut mesh = Mesh::open(&home, &programs, Some(server.url("postgres"))).await?;
    mesh.start().await?;
    let before_change = head(&mesh.weft).await?.to_string();
    ensure!(mesh.weft.apply(WEB_MAY_QUERY).await?.status == Some(0), "the change was not taken");
    let events = mesh.weft.json_lines(&["log", "-n", "0"]).await?;
    let past = mesh.weft.json(&["get", "security", "default/db", "--at", &before_change]).await?;
    let owner = mesh.local.home().secret("controller.url");
    mesh.stop().await?;

    postgres::connect(&server, "weft").await?.client.batch_execute(SMALL_RANGES_SQL).await?;
    let connect = server.url("weft").parse()?;
    // No command of a mesh that is stopped is repeated.
    let config = ArchiveConfig { connect, older_than: Duration::ZERO, forget_outcomes: true };
    let sealed = archive(&config, |_| ()).await?;
    ensure!(sealed.sealed.0 >= 16 && sealed.tables == sealed.sealed.0 / 16, "{sealed:?}");

    let mut mesh = Mesh::open(&home, &programs, Some(server.url("postgres"))).await?;
    mesh.start().await?;
    let weft = &mesh.weft;
    let again = weft.json_lines(&["log", "-n", "0"]).await?;
    ensure!(again.get(..events.len()) == Some(&events[..]), "the log is not what it was");
    let one = weft.json(&["log", "3"]).await?;
    ensure!(one["payload"] == events[2]["payload"] && one["hash"] == events[2]["hash"], "{one}");
    ensure!(weft.json(&["get", "security", "default/db", "--at", &before_change]).await? == past, "{past}");
    let refused = weft.run(["why", "web", "db:5432", "--at", &before_change]).await?;
    ensure!(refused.status == Some(2), "the past permits what it did not: {refused}");
    let spans = weft.json(&["sql", "select sum(events)::bigint as events from audit.sealed"]).await?;
    ensure!(spans[0]["events"] == sealed.sealed.0, "{spans}");
    weft.ok(["verify"]).await?;

    // What is to come is recorded and decided as ever; a start brought the sample's own policy back.
    ensure!(weft.run(["why", "web", "db:5432"]).await?.status == Some(2), "the sample lets web query db");
    ensure!(weft.apply(WEB_MAY_QUERY).await?.status == Some(0), "no change is taken any more");
    ensure!(
        weft.ok(["why", "web", "db:5432"]).await?.contains("web-may-query"),
        "the change is not in force"
    );

    // As an operator seals: what may still be repeated is not, and what is too young is said.
    let owner = owner.to_str().context("a path that is no text")?;
    let archive = ["log", "archive", "--database-url-file", owner, "--older-than"];
    let nothing = weft.ok(archive.iter().chain(&["74h"])).await?;
    ensure!(nothing.contains("nothing to seal"), "{nothing}");
    let young = weft.run(archive.iter().chain(&["1h"])).await?;
    ensure!(young.status == Some(1) && young.stderr.contains("--older-than 74h"), "{young}");

    mesh.stop().await?;
    tokio::task::spawn_blocking(move || server.stop().map(drop)).await??;
    Ok(())
}

async fn head(weft: &Weft) -> anyhow::Result<u64> {
    let rows = weft.json(&["sql", "select head from status.log"]).await?;
    rows[0]["head"].as_u64().with_context(|| format!("no head in {rows}"))
}
