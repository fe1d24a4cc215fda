//! A sidecar that learns of a service when its app first connects to it.

use anyhow::ensure;
use serde_json::Value;
use weft_pgserver::reserve_loopback_port;
use weft_tests::blob::{self, Blob};
use weft_tests::mesh::{Mesh, local};
use weft_tests::programs;
use weft_tests::sidecar::{OwnSidecar, Place};

#[tokio::test]
async fn a_service_becomes_an_upstream_when_it_is_first_used() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("weft-story-").tempdir()?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    let programs = programs::built()?;
    let mut mesh = Mesh::open(&dir.path().join("home"), &programs, None).await?;
    mesh.start().await?;
    let blob = Blob::join(&mesh, &programs.proxy).await?;

    let listen = local(reserve_loopback_port()?);
    let place = Place::OnDemand { upstream: format!("default/blob:{}", blob::PORT), listen };
    let late = OwnSidecar::start(&mesh, &programs.proxy, "default/caller/late", &place).await?;
    let held = |config: &Value| config["endpoints"].as_array().map_or(0, Vec::len);
    ensure!(held(&late.config().await?.all) == 0, "it holds nothing of what its app does not use");

    blob.open_through(listen).await?.ping().await?;
    ensure!(held(&late.config().await?.all) == 1, "it is an upstream now");
    let added = mesh.weft.json(&["sql", "select actor from weft.event where type = 'UpstreamAdded'"]).await?;
    let by = added[0]["actor"].as_str().unwrap_or_default();
    ensure!(by.ends_with("/ns/default/svc/caller/inst/late"), "{added}");

    // Nothing is told of a service to whom no policy admits.
    let said = mesh.weft.apply(blob::DENY).await?;
    ensure!(said.status == Some(0), "{said}");
    let refused = local(reserve_loopback_port()?);
    let place = Place::OnDemand { upstream: format!("default/blob:{}", blob::PORT), listen: refused };
    let stranger = OwnSidecar::start(&mesh, &programs.proxy, "default/caller/stranger", &place).await?;
    ensure!(blob.open_through(refused).await.is_err(), "a refused service was reached");
    ensure!(held(&stranger.config().await?.all) == 0, "a refused service was told of");

    let said = mesh.weft.run(["verify"]).await?;
    ensure!(said.status == Some(0), "{said}");
    late.stop().await?;
    stranger.stop().await?;
    blob.stop().await?;
    mesh.stop().await
}
