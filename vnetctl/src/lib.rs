//! `vnetctl` as a library: what its own binary, the tests and the demo share.
//!
//! [`sandbox`] makes guests out of namespaces, [`terminal`] stands between their command and the
//! user's terminal.

#[cfg(target_os = "linux")]
pub mod sandbox;
pub mod terminal;
