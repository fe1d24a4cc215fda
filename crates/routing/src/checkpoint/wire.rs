//! The messages of a checkpoint. Each is written with its length before it. Zero stands for what is not there.

use prost::Message;

/// What comes first.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Header {
    #[prost(uint32, tag = "1")]
    pub(super) fold_version: u32,
    #[prost(uint64, tag = "2")]
    pub(super) epoch: u64,
    #[prost(uint64, tag = "3")]
    pub(super) position: u64,
    #[prost(sint64, tag = "4")]
    pub(super) at_ms: i64,
    /// The event that last set the mesh's default action.
    #[prost(uint64, tag = "5")]
    pub(super) mesh_security_version: u64,
    #[prost(uint64, tag = "6")]
    pub(super) mesh_security_position: u64,
    /// The last event that touched the trust bundle.
    #[prost(uint64, tag = "7")]
    pub(super) trust_position: u64,
    /// How many records follow.
    #[prost(uint64, tag = "8")]
    pub(super) records: u64,
}

/// One scope that has events.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Record {
    #[prost(string, tag = "1")]
    pub(super) scope: String,
    #[prost(uint64, tag = "2")]
    pub(super) version: u64,
    #[prost(uint64, tag = "3")]
    pub(super) position: u64,
    #[prost(sint64, tag = "4")]
    pub(super) at_ms: i64,
    #[prost(string, tag = "5")]
    pub(super) actor: String,
    /// JSON.
    #[prost(string, tag = "6")]
    pub(super) state: String,
    /// Of a service: its loopback address.
    #[prost(fixed32, tag = "7")]
    pub(super) address: u32,
    /// Of a service: the last event that touched its endpoints.
    #[prost(uint64, tag = "8")]
    pub(super) endpoints_position: u64,
    /// Of a service: the last event that touched its inbound policy.
    #[prost(uint64, tag = "9")]
    pub(super) inbound_position: u64,
    /// Of a membership: the event that put the instance into its class.
    #[prost(uint64, tag = "10")]
    pub(super) since: u64,
    /// Of a membership: the last event that said how the instance is reached, if that is not `position`.
    #[prost(uint64, tag = "15")]
    pub(super) placed: u64,
    /// Of a membership: how the endpoint is damped, as JSON; empty if it never got points.
    #[prost(string, tag = "14")]
    pub(super) damping: String,
    /// Of a health: what the data plane sees; 1 is healthy, 2 unhealthy.
    #[prost(uint32, tag = "11")]
    pub(super) seen: u32,
    /// The observation that made it so.
    #[prost(uint64, tag = "12")]
    pub(super) seen_version: u64,
    #[prost(uint64, tag = "13")]
    pub(super) seen_position: u64,
}
