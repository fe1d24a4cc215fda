//! Bytes: a database protocol, much data, and connections that end in either order.

use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, timeout};

use crate::app::Pair;
use crate::payload::{receive, send};
use crate::smoke::Bench;
use crate::sql;

/// What goes each way in the large transfer.
const LARGE_BYTES: u64 = 256 << 20;
/// What goes each way around a half-close: more than all the buffers between the two ends together.
const HALF_BYTES: u64 = 32 << 20;
/// How long bytes may take that are already sent.
const PASS_LIMIT: Duration = Duration::from_secs(50);

/// A real client asks the database, from where an `api` app asks it.
pub(super) async fn select(bench: &mut Bench) -> anyhow::Result<String> {
    let (outbound, inbound) = (bench.mesh.records("api-1"), bench.mesh.records("db-1"));
    let (outbound_mark, inbound_mark) = (outbound.mark()?, inbound.mark()?);
    let database = bench.mesh.database_through("api-1").await?;
    let answer =
        sql::query(&database, "select count(*) || ' orders, ' || current_database() from orders").await?;
    ensure!(answer.rows.ends_with(" orders, shop"), "another answer than was asked for: {:?}", answer.rows);

    let sent = outbound
        .find(outbound_mark, "the connection", |record| record.text("direction") == "outbound")
        .await?;
    let id = sent.text("connection_id").to_owned();
    let same = format!("connection {id}");
    let received = inbound.find(inbound_mark, &same, |record| record.text("connection_id") == id).await?;
    ensure!(sent.text("tls") == "TLSv1_3", "no TLS 1.3 between the sidecars: {sent:?}");
    ensure!(sent.number("bytes_down") == received.number("bytes_down"), "{sent:?} is not {received:?}");
    Ok(format!(
        "{} through api-1 and db-1: {}; {} {}, connection {id} in both records",
        answer.client,
        answer.rows,
        sent.text("tls"),
        sent.text("key_exchange"),
    ))
}

/// Much data in both directions at once.
pub(super) async fn transfer(bench: &mut Bench) -> anyhow::Result<String> {
    let Pair { mut client, mut server } = bench.blob.open().await?;
    let (mut client_read, mut client_write) = client.split();
    let (mut server_read, mut server_write) = server.split();
    let start = Instant::now();
    let up = async {
        let sent = send(&mut client_write, 1, LARGE_BYTES).await?;
        client_write.shutdown().await?;
        anyhow::Ok(sent)
    };
    let down = async {
        let sent = send(&mut server_write, 2, LARGE_BYTES).await?;
        server_write.shutdown().await?;
        anyhow::Ok(sent)
    };
    let received_up = async { anyhow::Ok(receive(&mut server_read).await?) };
    let received_down = async { anyhow::Ok(receive(&mut client_read).await?) };
    let all = timeout(PASS_LIMIT, async { tokio::try_join!(up, received_up, down, received_down) });
    let (up, received_up, down, received_down) = all.await.context("the data did not pass in time")??;
    ensure!(up == received_up, "up: sent {up:?}, received {received_up:?}");
    ensure!(down == received_down, "down: sent {down:?}, received {received_down:?}");
    let rate = 2.0 * mebibytes(LARGE_BYTES) / start.elapsed().as_secs_f64();
    Ok(format!(
        "up {}…, down {}…, both at once at {rate:.0} MiB/s together",
        up.short_digest(),
        down.short_digest()
    ))
}

/// Each side closes its direction first, and the other one still gets everything through.
pub(super) async fn half_close(bench: &mut Bench) -> anyhow::Result<String> {
    let records = bench.blob.client.records();
    for client_first in [true, false] {
        let mark = records.mark()?;
        let Pair { client, server } = bench.blob.open().await?;
        let (first, second) = if client_first { (client, server) } else { (server, client) };
        let passing = close_in_turn(first, second);
        let who = if client_first { "the client closes first" } else { "the server closes first" };
        timeout(PASS_LIMIT, passing).await.context("the data did not pass in time").flatten().context(who)?;
        let reason = if client_first { "client_fin" } else { "server_fin" };
        records
            .find(mark, reason, |record| {
                record.is(&[
                    ("direction", "outbound"),
                    ("destination", "default/blob"),
                    ("close_reason", reason),
                ])
            })
            .await?;
    }
    let size = mebibytes(HALF_BYTES);
    Ok(format!(
        "{size:.0} MiB each way, before and after the first end: client_fin, then server_fin in the records"
    ))
}

/// One end sends all and closes its direction; only when the other has seen that end does it send.
async fn close_in_turn(
    mut first: tokio::net::TcpStream,
    mut second: tokio::net::TcpStream,
) -> anyhow::Result<()> {
    let (mut first_read, mut first_write) = first.split();
    let (mut second_read, mut second_write) = second.split();
    let closing = async {
        let sent = send(&mut first_write, 3, HALF_BYTES).await?;
        first_write.shutdown().await?;
        anyhow::Ok(sent)
    };
    let (sent, received) = tokio::try_join!(closing, async { anyhow::Ok(receive(&mut second_read).await?) })?;
    ensure!(sent == received, "before: sent {sent:?}, received {received:?}");

    let answering = async {
        let sent = send(&mut second_write, 4, HALF_BYTES).await?;
        second_write.shutdown().await?;
        anyhow::Ok(sent)
    };
    let (sent, received) =
        tokio::try_join!(answering, async { anyhow::Ok(receive(&mut first_read).await?) })?;
    ensure!(sent == received, "after: sent {sent:?}, received {received:?}");
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "for people, and far below 2^52")]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
