//! local
pub mod egress;
pub mod engine;
pub mod leases;
pub mod mac;
pub mod message;
