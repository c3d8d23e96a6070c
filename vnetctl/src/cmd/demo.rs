//! `demo`: the whole story in a minute, offline: a held request, a yes, a no, a name, a blocked name,
//! and the history.
//!
//! Everything is real but the internet: a stage of namespaces holds a host and, across a wire, a server
//! of pages and names (`internet`). What a user would type is typed, as further processes of this
//! program, and every step is checked; the first that did not happen ends the demo with an error.

#[cfg(target_os = "linux")]
mod fetch;
#[cfg(target_os = "linux")]
mod internet;
#[cfg(target_os = "linux")]
mod story;

#[cfg(target_os = "linux")]
pub use self::fetch::{FETCH_ROLE, main as fetch_main};

use crate::failure::Failure;

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  vnetctl demo")]
pub struct DemoArgs {}

/// Tells the story.
///
/// # Errors
/// The first step that did not happen.
pub fn execute(_: DemoArgs) -> Result<(), Failure> {
    #[cfg(target_os = "linux")]
    return story::execute();
    #[cfg(not(target_os = "linux"))]
    Err(Failure::Failed("the demo needs Linux's namespaces".to_owned()))
}
