//! The dataplane: moves frames between guests and the host, and asks when it does not know.

pub mod args;
pub mod config;
pub mod forward;
pub mod guards;
pub mod inherit;
pub mod message;
pub mod metrics;
pub mod session;
