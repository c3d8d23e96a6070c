//! The dataplane: moves frames between guests and the host, and asks when it does not know.

pub mod engine;
pub mod mac;
pub mod message;
