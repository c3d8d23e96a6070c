//! What makes this a drop-in for gvproxy: its command line and its configuration file, up to one checked
//! [`Config`].
//!
//! - [`Flags::parse`] reads the command line in Go's syntax;
//! - [`FileConfig::parse`] reads the YAML of `-config`, with places;
//! - [`Config::resolve`] puts both together, with gvproxy's defaults and its checks, and reports everything that
//!   is wrong;
//! - [`load`] does all of it from the files that are named.
//!
//! Nothing here opens a socket or writes a file. What the configuration means is told in `docs/gvproxy.md`.

pub mod config;
mod dns;
pub mod flags;
mod load;
pub mod origin;
pub mod yaml;

pub use config::Config;
pub use dns::host_search_domains;
pub use flags::{FlagError, Flags};
pub use load::{Loaded, load};
pub use yaml::FileConfig;
