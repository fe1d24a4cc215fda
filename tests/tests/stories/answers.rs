//! Questions to a mesh, in the form that programs read, about now and about the past.

use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use weft_tests::mesh::WEB_MAY_QUERY;
use weft_tests::up::Folder;

#[tokio::test]
async fn every_question_has_an_answer_for_programs_and_the_past_stays() -> anyhow::Result<()> {
    let folder = Folder::new()?;
    let mut up = folder.up().await?;
    let weft = folder.weft();
    let before = folder.log_head().await?;

    // Now.
    let status = weft.json(&["status"]).await?;
    let names = |list: &Value, field: &str| -> Vec<String> {
        let items = list.as_array().cloned().unwrap_or_default();
        items.iter().filter_map(|item| item[field].as_str().map(ToOwned::to_owned)).collect()
    };
    ensure!(names(&status["services"], "name") == ["default/api", "default/db", "default/web"], "{status}");
    ensure!(status["sidecars"].as_array().is_some_and(|sidecars| sidecars.len() == 4), "{status}");
    for kind in ["services", "instances", "traffic", "security"] {
        let found = weft.json(&["get", kind]).await?;
        ensure!(found.as_array().is_some_and(|list| !list.is_empty()), "{kind}: {found}");
    }
    let described = weft.json(&["describe", "service", "db"]).await?;
    ensure!(described["resource"]["name"] == "default/db", "{described}");
    ensure!(described["events"].as_array().is_some_and(|events| !events.is_empty()), "{described}");
    let log = weft.json_lines(&["log", "-n", "5"]).await?;
    ensure!(log.len() == 5 && log.iter().all(|event| event["hash"].is_string()), "{log:?}");
    let sidecars = weft.json(&["sql", "select * from status.sidecars"]).await?;
    ensure!(names(&sidecars, "instance").len() == 4, "{sidecars}");
    let leader = weft.json(&["sql", "select holder from status.leader where alive"]).await?;
    ensure!(leader[0]["holder"] == status["leader"]["holder"], "{leader} is not {}", status["leader"]);

    // A change, and the verdict before and after it.
    let permitted = async |args: &[&str]| {
        let said =
            weft.run(["why", "web", "db:5432", "-o", "json"].into_iter().chain(args.iter().copied())).await?;
        let answer = said.json()?;
        let permitted = answer["permitted"].as_bool().with_context(|| format!("no verdict in {answer}"))?;
        ensure!(said.status == Some(if permitted { 0 } else { 2 }), "{said}");
        anyhow::Ok(permitted)
    };
    ensure!(!permitted(&[]).await?, "web may query db from the start");
    let applied = weft.apply(WEB_MAY_QUERY).await?;
    ensure!(applied.status == Some(0), "{applied}");
    ensure!(permitted(&[]).await?, "web may not query db after the change");
    let (past, epoch_past) = (before.to_string(), format!("1.{before}"));
    ensure!(!permitted(&["--at", &past]).await?, "the change is seen before it happened");
    ensure!(!permitted(&["--at", &epoch_past]).await?, "the change is seen before it happened");

    // The past of everything else.
    let rules = async |args: &[&str]| {
        let args: Vec<&str> = ["get", "security", "default/db"].iter().chain(args).copied().collect();
        let found = weft.json(&args).await?;
        anyhow::Ok(found[0]["rules"].as_array().map_or(0, Vec::len))
    };
    ensure!(
        (rules(&[]).await?, rules(&["--at", &past]).await?) == (2, 1),
        "`get --at` does not show the past"
    );
    let then = weft.json(&["status", "--at", &past]).await?;
    ensure!(then["as_of"] == format!("1.{before}"), "{then}");
    let described = weft.json(&["describe", "security", "default/db", "--at", &past]).await?;
    ensure!(described["resource"]["version"] == 1, "{described}");

    // For people, the same questions have answers in words.
    for (args, says) in [
        (vec!["status"], "up to date"),
        (vec!["log", "-n", "3"], "SecurityPolicySet"),
        (vec!["get", "services"], "default/web"),
        (vec!["why", "api", "db:5432"], "api-may-query"),
        (vec!["sql", "select service from status.services order by 1"], "default/api"),
        (vec!["check"], "check: "),
    ] {
        let answer = weft.ok(&args).await?;
        ensure!(answer.contains(says), "`weft {}` does not say {says:?}:\n{answer}", args.join(" "));
    }

    // A fleet of simulated sidecars comes, is measured, and leaves no trace but in the log.
    let fleet = ["sim", "--sidecars", "6", "--endpoints", "2", "--changes", "2", "--per-connection", "3"];
    let measured = weft.json(&fleet).await?;
    let profiles = measured["profiles"].as_array().cloned().unwrap_or_default();
    ensure!(profiles.len() == 5 && profiles.iter().all(|profile| profile["faults"] == 0), "{measured}");
    let left = weft.json(&["status"]).await?;
    ensure!(names(&left["services"], "name") == ["default/api", "default/db", "default/web"], "{left}");

    ensure!(up.end(Signal::SIGTERM).await?.success(), "SIGTERM is no fault");
    up.gone().await
}
