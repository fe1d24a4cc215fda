//! The wire: what controllers, sidecars and the command line say to each other. The words are explained in the
//! `.proto` files; how they map to the model is in `weft-api`.

/// Version 1 of the protocol.
#[expect(missing_docs, unused_qualifications, reason = "generated; the documentation is in the .proto files")]
#[allow(clippy::all, clippy::allow_attributes_without_reason, clippy::wildcard_imports, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("weft.v1");
}

/// The protobuf descriptors of every service here, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/weft_descriptor.bin"));
