//! The dataplane: moves frames between guests and the host, and asks when it does not know.

mod clock;
mod driver;
pub mod egress;
pub mod engine;
pub mod forward;
pub mod guards;
pub mod leases;
pub mod link;
pub mod mac;
pub mod message;
pub mod metrics;
pub mod network;
