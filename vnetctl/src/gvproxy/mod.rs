//! What makes this a drop-in for gvproxy: its command line and its configuration file, up to one checked
//! [`Config`].
//!
//! - [`Flags::parse`] reads the command line in Go's syntax;
//! - [`FileConfig::parse`] reads the YAML of `-config`, with places;
//! - [`Config::resolve`] puts both together, with gvproxy's defaults and its checks, and reports everything that
//!   is wrong;
//! - [`load`] does all of it from the files that are named.
//!
//! None of these opens a socket or writes a file. [`program`] is the process that runs it, with what [`own`] says that
//! no command line does; [`services`] is the HTTP API, over connections that others accept, and [`ssh`] serves sockets
//! that lead into a guest over SSH. What the configuration means is told in `docs/gvproxy.md`.

pub mod config;
mod dns;
pub mod flags;
mod load;
pub mod origin;
pub mod own;
pub mod program;
mod seldom;
pub mod services;
pub mod ssh;
mod tunnels;
pub mod yaml;

pub use config::Config;
pub use dns::host_search_domains;
pub use flags::{FlagError, Flags};
pub use load::{Loaded, load};
pub use tunnels::Tunnels;
pub use yaml::FileConfig;
