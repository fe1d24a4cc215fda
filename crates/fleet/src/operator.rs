//! What a fleet's operator does: it changes the mesh, however many changes that takes.

use futures_util::stream::{self, StreamExt, TryStreamExt};
use tonic::transport::Channel;
use weft_client::{ALPN, command, retry};
use weft_identity::tls::ExpectedPeer;
use weft_proto::v1;
use weft_proto::v1::change::Change as Wire;
use weft_proto::v1::mesh_client::MeshClient;

use crate::Mesh;
use crate::error::FleetError;

/// Changes in one command, which the API bounds.
const CHANGES_MAX: usize = 1_000;
/// Commands under way.
const COMMANDS: usize = 4;

/// An operator of a mesh. Clones share a connection, which is made when it is first needed.
#[derive(Clone, Debug)]
pub struct Operator {
    pub(crate) client: MeshClient<Channel>,
}

impl Operator {
    /// The operator of this mesh.
    #[must_use]
    pub fn of(mesh: &Mesh) -> Self {
        let tls = mesh.operator.client_config(ExpectedPeer::Controller, ALPN);
        Self { client: MeshClient::new(weft_client::channel(mesh.controllers.clone(), tls)) }
    }

    /// Applies changes, all or none of them. `why` is recorded.
    ///
    /// # Errors
    /// A controller refuses, or none answers.
    pub async fn apply(&self, why: &str, changes: Vec<Wire>) -> Result<v1::ApplyResponse, FleetError> {
        let changes = changes.into_iter().map(|change| v1::Change { expected: None, change: Some(change) });
        let request =
            v1::ApplyRequest { meta: Some(command(why)), changes: changes.collect(), ..Default::default() };
        let applied = retry(|| {
            let (mut client, request) = (self.client.clone(), request.clone());
            async move { client.apply(request).await }
        });
        applied.await.map_err(FleetError::of("a change"))
    }

    /// Applies changes that do not rest on each other, so many at a time.
    ///
    /// # Errors
    /// A controller refuses, or none answers; then some of them may be applied.
    pub async fn apply_all(&self, why: &str, changes: &[Wire]) -> Result<(), FleetError> {
        let commands = changes.chunks(CHANGES_MAX).map(|changes| self.apply(why, changes.to_vec()));
        stream::iter(commands).buffer_unordered(COMMANDS).try_collect::<Vec<_>>().await.map(drop)
    }
}
