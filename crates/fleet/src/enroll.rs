//! How a simulated sidecar becomes one of the mesh: as a real one does.

use std::sync::atomic::{AtomicUsize, Ordering};
use tonic::transport::Channel;
use weft_client::{ALPN, command, retry};
use weft_identity::credential::Credential;
use weft_identity::key::LeafKey;
use weft_identity::tls::join_config;
use weft_proto::v1;
use weft_proto::v1::identity_client::IdentityClient;

use crate::error::FleetError;
use crate::member::Member;
use crate::{Mesh, Shared};

/// Connections for those who have no identity yet. A controller takes some hundred of them.
const STRANGERS: usize = 8;
/// How long a token is good; it is used at once.
const TOKEN_TTL_SECONDS: u32 = 600;

/// Connections without a certificate, on which sidecars join.
#[derive(Debug)]
pub(crate) struct Strangers {
    channels: Vec<Channel>,
    next: AtomicUsize,
}

impl Strangers {
    pub(crate) fn new(mesh: &Mesh) -> Result<Self, FleetError> {
        let root = crate::root(mesh)?;
        let channel = |_| weft_client::channel(mesh.controllers.clone(), join_config(root, ALPN));
        Ok(Self { channels: (0..STRANGERS).map(channel).collect(), next: AtomicUsize::new(0) })
    }

    fn client(&self) -> IdentityClient<Channel> {
        let next = self.next.fetch_add(1, Ordering::Relaxed) % self.channels.len();
        IdentityClient::new(self.channels[next].clone())
    }
}

/// Joins, registers, and reports the instance healthy. The log's position then.
pub(crate) async fn enroll(
    shared: &Shared,
    strangers: &Strangers,
    member: &Member,
) -> Result<u64, FleetError> {
    member.become_somebody(join(shared, strangers, member).await?);
    member.register().await?;
    let healthy = member.report(v1::Health::Healthy).await?;
    Ok(healthy.version.map(|version| version.position).unwrap_or_default())
}

async fn join(shared: &Shared, strangers: &Strangers, member: &Member) -> Result<Credential, FleetError> {
    let request = v1::CreateJoinTokenRequest {
        meta: Some(command(crate::WHY)),
        service: member.instance.service.to_string(),
        instance: member.instance.instance.to_string(),
        ttl_seconds: TOKEN_TTL_SECONDS,
    };
    let token = retry(|| {
        let (mut operator, request) = (shared.operator.client.clone(), request.clone());
        async move { operator.create_join_token(request).await }
    });
    let token = token.await.map_err(FleetError::of("making a join token"))?.token;
    let unusable = |error: &dyn std::fmt::Display| FleetError::Identity(error.to_string());
    let key = LeafKey::generate().map_err(|error| unusable(&error))?;
    let request = v1::JoinRequest {
        meta: Some(command("a simulated sidecar starts")),
        token,
        instance: member.instance.to_string(),
        csr: key.csr_der().map_err(|error| unusable(&error))?.into(),
    };
    let leaf = retry(|| {
        let (mut client, request) = (strangers.client(), request.clone());
        async move { client.join(request).await }
    });
    let v1::LeafResponse { chain, roots, .. } = leaf.await.map_err(FleetError::of("joining"))?;
    let leaf = chain.first().ok_or_else(|| FleetError::Identity("a join brought no leaf".into()))?;
    let roots = roots.iter().map(|root| root.to_vec().into()).collect();
    Credential::new(leaf.to_vec().into(), key, roots).map_err(|error| unusable(&error))
}
