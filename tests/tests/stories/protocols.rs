//! Real protocols, by real clients and servers, through two sidecars and every way in. In a network namespace of its own, since
//! services' names and rules of the kernel are ways in; that needs root.

use weft_tests::{network, protocols};

#[test]
fn clients_and_servers_do_not_notice_the_mesh() -> anyhow::Result<()> {
    network::leave()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        network::with_a_way_out().await?;
        protocols::run().await
    })
}
