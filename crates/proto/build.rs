//! Compiles the protobuf files with a compiler written in Rust, so that no system protoc is needed.

use prost::Message;
use std::error::Error;
use std::path::PathBuf;

const FILES: [&str; 3] = ["weft/v1/mesh.proto", "weft/v1/discovery.proto", "weft/v1/identity.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    let out: PathBuf = std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?.into();
    std::fs::write(out.join("weft_descriptor.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").btree_map(".").compile_fds(descriptors)?;
    Ok(())
}
