//! Generated from `vnet/v1/*.proto` at build time, otherwise untouched.

/// The `vnet.v1` package.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
pub mod v1 {
    tonic::include_proto!("vnet.v1");
}

/// The encoded `FileDescriptorSet` of the package, well-known types included.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.binpb"));
