//! `vnetctl`: what a user types.
//!
//! [`cli`] reads the line; [`cmd`] holds the commands, one file per noun, each a client of the
//! contract (`client`) that prints tables or the contract's JSON ([`output`]). `run` and `up` also
//! start a dataplane, and the user's controlplane if none answers, by re-executing this binary
//! ([`launch`]). [`sandbox`] makes `run`'s guest out of namespaces, [`terminal`] stands between its
//! command and the user's terminal. [`gvproxy`] reads what gvproxy takes: its command line and its configuration.

pub mod cli;
pub mod client;
pub mod cmd;
pub mod failure;
pub mod gvproxy;
pub mod launch;
pub mod output;
#[cfg(target_os = "linux")]
pub mod sandbox;
pub mod signals;
pub mod terminal;
