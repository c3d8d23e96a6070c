//! The contract of vnet: what the dataplane, the controlplane and every client mean by the same words.
//!
//! [`v1`] is generated from `vnet/v1/*.proto` and stays at the edges (sessions and APIs). [`model`]
//! holds the checked types that everything else works with; conversions go both ways and refuse
//! every malformed message with a named reason. What a match means is written once, in
//! [`model::FlowMatch::matches`] and [`model::LookupMatch::matches`], so that the planes cannot disagree.

mod generated;
pub mod model;

pub use generated::{DESCRIPTORS, v1};
