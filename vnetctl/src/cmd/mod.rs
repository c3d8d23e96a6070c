//! The commands, one file per noun: their options, the RPC behind each, and what people see of it.

pub mod answer;
pub mod attend;
pub mod capture;
pub mod dataplane;
pub mod demo;
pub mod dns;
pub mod events;
pub mod flows;
pub mod forward;
pub mod grants;
pub mod matching;
pub mod pending;
pub mod policy;
pub mod questions;
pub mod run;
pub mod select;
pub mod treat;
pub mod up;
pub mod vm;

#[cfg(test)]
pub(crate) mod tests;

use crate::client::Connection;
use crate::failure::Failure;
use crate::output::{self, Output};

/// What every command works with.
pub struct Context {
    /// Where the controlplane is.
    pub connection: Connection,
    /// Where data goes.
    pub output: Output,
}

/// Does something for each id. One that fails does not keep the others from being done: each
/// failure is said, and the whole has failed.
async fn each(
    ids: Vec<String>,
    mut act: impl AsyncFnMut(String) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let only = ids.len() == 1;
    let mut failed = None;
    for id in ids {
        match act(id).await {
            Ok(()) => {}
            Err(error @ (Failure::OutputClosed | Failure::Usage(_))) => return Err(error),
            Err(error) if only => return Err(error),
            Err(error) => {
                if let Some(message) = error.message() {
                    output::say(message);
                }
                failed = Some(Failure::Code(error.exit_code()));
            }
        }
    }
    failed.map_or(Ok(()), Err)
}
