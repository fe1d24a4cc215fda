//! The controller's gRPC services. The wire ends here: requests become commands and questions of the model, answers and
//! errors become messages.
//!
//! [`commands`] decides and appends; [`mesh`] answers operators and takes what sidecars report; [`discovery`] tells
//! sidecars what to run; [`identity`] hands out leaves; [`flaps`] counts what only flaps. [`caller`] says who may call what, [`convert`] maps wire and
//! model, [`status`] maps errors to codes: each of the three is the only place that does.
//!
//! Deliberately absent: sockets and TLS (the controller's listener puts a [`caller::Peer`] beside every request), what a
//! command means (`weft-model`, `weft-routing`), folding (`weft-projector`).
//!
//! Invariants: a name is believed only if it comes from the peer's leaf (I7); what a sidecar is told was committed by a
//! projector before; whatever a peer sends is bounded before it is kept.

pub mod acks;
pub mod caller;
pub mod commands;
pub mod convert;
pub mod discovery;
pub mod flaps;
mod health;
pub mod history;
pub mod identity;
mod joins;
mod log;
pub mod mesh;
pub mod outlet;
mod past;
pub mod pull;
mod reads;
pub mod rollouts;
pub mod status;
pub mod telling;
pub mod witness;

use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use tonic::service::{InterceptorLayer, Routes};
use tonic::{Request, Status};
use weft_eventlog::{Appender, Reader};
use weft_identity::ca::CertificateAuthority;
use weft_model::Timestamp;
use weft_projector::{Store, View};
use weft_proto::v1::discovery_server::DiscoveryServer;
use weft_proto::v1::identity_server::IdentityServer;
use weft_proto::v1::mesh_server::MeshServer;

use acks::Acks;
use commands::Commands;
use discovery::Discovery;
use flaps::Flaps;
use identity::Identity;
use mesh::Mesh;
use past::Past;
use rollouts::Rollouts;
use witness::Witnesses;

/// Largest request. The largest honest one applies a thousand resources; the log takes at most as much at once.
pub const REQUEST_BYTES_MAX: usize = 4 << 20;

/// Reads the wall clock; the binary's business.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// What the services work with.
#[derive(Clone)]
pub struct Context {
    /// The mesh in memory.
    pub view: View,
    /// Appends to the log.
    pub appender: Appender,
    /// Reads the log.
    pub reader: Reader,
    /// The projection's tables.
    pub store: Store,
    /// Issues leaves.
    pub authority: Arc<CertificateAuthority>,
    /// Tells the time.
    pub clock: Clock,
    /// What sidecars say is kept here until it is written.
    pub acks: Arc<Acks>,
    /// What sidecars report while their endpoints flap is counted here.
    pub flaps: Arc<Flaps>,
    /// What canaries say of the running rollout.
    pub rollouts: Arc<Rollouts>,
    /// What sidecars have seen of the log.
    pub witnesses: Arc<Witnesses>,
    /// Ends streams when the controller shuts down.
    pub drain: CancellationToken,
}

/// An interceptor.
type Intercept = fn(Request<()>) -> Result<Request<()>, Status>;

/// What every request passes before [`routes`]: whose call it is, of several on one connection.
#[must_use]
pub fn layer() -> InterceptorLayer<Intercept> {
    InterceptorLayer::new(caller::speak_as)
}

/// All services, health and reflection included. For a server with the [`layer`].
///
/// # Errors
/// If the embedded protobuf descriptors do not decode, which is a fault of this program.
pub fn routes(context: &Context) -> Result<Routes, tonic_reflection::server::Error> {
    let commands = Commands::new(context);
    let any_member = caller::any_member(Arc::clone(&context.clock));
    let past = Arc::new(Past::new(context.reader.clone(), context.store.clone()));
    let mesh = Mesh::new(context.clone(), commands.clone(), past);
    let discovery = Discovery::new(context.clone());
    let identity = Identity::new(context.clone(), commands);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(weft_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let mut routes = Routes::builder();
    routes
        .add_service(MeshServer::new(mesh).max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(DiscoveryServer::new(discovery).max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(IdentityServer::new(identity).max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(health::service(context.view.clone()))
        .add_service(tonic::service::interceptor::InterceptedService::new(reflection, any_member));
    Ok(routes.routes())
}
