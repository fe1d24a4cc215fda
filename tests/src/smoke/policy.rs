//! Who may connect to whom: a refusal, a deny that comes while a connection is open, and the way back.

use std::io::ErrorKind;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::blob;
use crate::records::Record;
use crate::smoke::Bench;
use crate::sql::Session;
use crate::wait::until;

/// How long a refusal, a cut or a permission may take to be felt. The mesh's own bound is a second.
const FELT_LIMIT: Duration = Duration::from_secs(10);

/// `web` may not query `db`: the client is cut off, and both ends of the connection recorded the same reason.
pub(super) async fn refusal(bench: &mut Bench) -> anyhow::Result<String> {
    let (outbound, inbound) = refused_connection(bench).await?;
    Ok(format!(
        "connection {}: {} rule {:?} in the records of web-1 and db-1, at {} and {}",
        outbound.text("connection_id"),
        outbound.text("close_reason"),
        outbound.text("rule"),
        outbound.text("config_version"),
        inbound.text("config_version"),
    ))
}

/// Tries to reach `db` from `web`, and returns the records of both sidecars.
pub(super) async fn refused_connection(bench: &Bench) -> anyhow::Result<(Record, Record)> {
    let (outbound, inbound) = (bench.mesh.records("web-1"), bench.mesh.records("db-1"));
    let (outbound_mark, inbound_mark) = (outbound.mark()?, inbound.mark()?);
    let refused = async {
        let mut answer = Vec::new();
        let mut stream = match TcpStream::connect(bench.db_from_web).await {
            // The sidecar may be done with it before we see that it was accepted.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(answer),
            connected => connected.context("web-1 takes no connection for db")?,
        };
        // What the client wants to say must not pass; how it is cut off shows as one or the other error.
        let _ = stream.write_all(b"anything").await;
        let _ = stream.read_to_end(&mut answer).await;
        anyhow::Ok(answer)
    };
    let answer = timeout(FELT_LIMIT, refused).await.context("the connection stays open")??;
    ensure!(answer.is_empty(), "db answered web: {answer:?}");

    let reason = "policy_denied";
    let outbound = outbound
        .find(outbound_mark, "the refusal", |record| {
            record.is(&[("direction", "outbound"), ("destination", "default/db"), ("close_reason", reason)])
        })
        .await?;
    let id = outbound.text("connection_id").to_owned();
    let inbound = inbound
        .find(inbound_mark, &format!("connection {id}"), |record| record.text("connection_id") == id)
        .await?;
    ensure!(inbound.is(&[("direction", "inbound"), ("close_reason", reason)]), "db-1 recorded {inbound:?}");
    ensure!(!outbound.text("rule").is_empty(), "no rule in {outbound:?}");
    ensure!(inbound.text("rule") == outbound.text("rule"), "{inbound:?} has another rule than {outbound:?}");
    ensure!(
        inbound.text("source_identity").contains("/svc/web/"),
        "db-1 does not know who it was: {inbound:?}"
    );
    Ok((outbound, inbound))
}

/// The command line gives the verdict that the sidecar gave, with the same rule, and the other one for `api`.
pub(super) async fn why(bench: &mut Bench) -> anyhow::Result<String> {
    let (outbound, _) = refused_connection(bench).await?;
    let weft = &bench.mesh.weft;
    let refused = weft.run(["why", "web", "db:5432", "-o", "json"]).await?;
    ensure!(refused.status == Some(2), "a refusal has exit status 2: {refused}");
    let answer = refused.json()?;
    ensure!(answer["permitted"] == false, "the sidecar refused, but: {answer}");
    ensure!(
        answer["reason"] == outbound.text("close_reason"),
        "the sidecar recorded {outbound:?}, but: {answer}"
    );
    let rule = outbound.text("rule");
    ensure!(answer.to_string().contains(rule), "the sidecar recorded rule {rule:?}, but: {answer}");

    let database = bench.mesh.database_through("api-1").await?;
    Session::open(&database).await.context("api may query db")?;
    let permitted = weft.json(&["why", "api", "db:5432"]).await?;
    ensure!(permitted["permitted"] == true, "the sidecar let it pass, but: {permitted}");
    Ok(format!("web: {}; api: {}", text(&answer["summary"]), text(&permitted["summary"])))
}

/// A deny cuts what it forbids, and only that.
pub(super) async fn deny_cuts(bench: &mut Bench) -> anyhow::Result<String> {
    let mut pair = bench.blob.open().await?;
    pair.ping().await?;
    let bystander = Session::open(&bench.mesh.database_through("api-1").await?).await?;
    let backend = bystander.query("select pg_backend_pid()").await?;
    let (outbound, inbound) = (bench.blob.client.records(), bench.blob.server.records());
    let (outbound_mark, inbound_mark) = (outbound.mark()?, inbound.mark()?);

    // Both at once: the cut may be felt before the command has ended.
    let cut = timeout(FELT_LIMIT, async {
        let mut byte = [0];
        match pair.client.read(&mut byte).await {
            Ok(0) => Ok((Instant::now(), "an end")),
            Ok(_) => bail!("the application sent something"),
            Err(_) => Ok((Instant::now(), "a reset")),
        }
    });
    let applied = async {
        let said = bench.mesh.weft.apply(blob::DENY).await?;
        ensure!(said.status == Some(0), "{said}");
        Ok((Instant::now(), said))
    };
    let (cut, applied) = tokio::join!(cut, applied);
    let (acknowledged, _) = applied?;
    let (cut, how) = cut.context("the connection stays open")??;
    let after = match cut.checked_duration_since(acknowledged) {
        Some(after) => format!("{} ms after", after.as_millis()),
        None => format!("{} ms before", acknowledged.duration_since(cut).as_millis()),
    };

    let cut_off = |record: &Record| record.text("close_reason") == "policy_changed";
    let inbound = inbound.find(inbound_mark, "the cut", cut_off).await?;
    let id = inbound.text("connection_id").to_owned();
    outbound.find(outbound_mark, "the cut", |record| record.text("connection_id") == id).await?;
    ensure!(inbound.text("rule").contains("caller-is-cut-off"), "another rule cut it: {inbound:?}");
    ensure!(bench.blob.open().await.is_err(), "a new connection still passes");
    let same = bystander
        .query("select pg_backend_pid()")
        .await
        .context("the connection of api to db was cut too")?;
    ensure!(backend == same, "the connection of api to db is another one");
    Ok(format!(
        "cut {after} `weft apply` had ended, seen as {how}; policy_changed, rule {:?}, at {}; a SQL session stayed",
        inbound.text("rule"),
        inbound.text("config_version"),
    ))
}

/// The old policy as a new version: connections pass again, and the version has risen.
pub(super) async fn rollback(bench: &mut Bench) -> anyhow::Result<String> {
    let before = bench.blob.server.config().await?.version;
    let said = bench.mesh.weft.apply(blob::ALLOW).await?;
    ensure!(said.status == Some(0), "{said}");
    let acknowledged = Instant::now();
    let mut pair = until("caller to reach blob again", FELT_LIMIT, async || bench.blob.open().await).await?;
    let felt = acknowledged.elapsed();
    pair.ping().await?;
    let after = bench.blob.server.config().await?.version;
    ensure!(after > before, "the version did not rise: {before}, then {after}");
    Ok(format!(
        "config version {before} → {after}; a connection passed {} ms after the apply",
        felt.as_millis()
    ))
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
