//! The dataplane: moves frames between guests and the host, and asks when it does not know.

mod admission;
pub mod args;
pub mod capture;
pub mod causes;
pub mod claims;
mod clock;
pub mod config;
pub mod descriptors;
mod driver;
pub mod egress;
pub mod engine;
pub mod forward;
pub mod front;
pub mod guards;
mod inbox;
pub mod inherit;
pub mod leases;
pub mod link;
pub mod mac;
pub mod message;
pub mod metrics;
pub mod network;
mod outlet;
pub mod requests;
pub mod run;
pub mod session;
pub mod zone;

pub use run::main;
