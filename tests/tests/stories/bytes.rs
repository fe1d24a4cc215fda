//! Bytes over a rough line between two sidecars. `cargo xtask torture bytes` does the same with more.

use anyhow::ensure;
use weft_tests::bytes::{self, Plan};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_byte_arrives_once_and_in_its_stream() -> anyhow::Result<()> {
    let outcome = bytes::run(Plan { bytes: 256 << 20, streams: 600, seed: 1 }).await?;
    ensure!(outcome.tunnels <= 64, "{} tunnels for 8 streams at a time", outcome.tunnels);
    Ok(())
}
