//! The controlplane: decides, remembers and asks people; never touches a packet.
//!
//! A dataplane's miss comes in through [`session`], which hands it to the [`hub`]: the one owner of
//! what is known. The hub asks [`policy`], which is pure. An allow or deny goes back as a verdict;
//! a question joins a request in [`approval`], which people see and answer through [`api`]. An answer
//! makes a [`grant`], which the [`store`] keeps. Every change that can alter a decision raises the
//! epoch, revokes what was decided before, and cuts what is no longer allowed.
//!
//! [`Args`] are read into a [`Config`], and [`run`] serves it.

pub mod api;
pub mod approval;
pub mod clock;
pub mod config;
mod convert;
pub mod fleet;
pub mod grant;
pub mod hub;
pub mod listener;
pub mod lists;
pub mod metrics;
pub mod paths;
pub mod peer;
pub mod policy;
pub mod process;
pub mod refusal;
pub mod replay;
pub mod server;
pub mod session;
pub mod store;
pub mod suggest;
#[cfg(test)]
mod testing;
mod turned_away;
pub mod watch;

pub use config::{Args, Config, ConfigError};
pub use server::{Ended, RunError, run};

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

/// Runs as a process of its own: logs to stderr, and turns the end into an exit code (0 done, 1 failed,
/// 2 wrong usage).
pub fn main(args: Args) -> ExitCode {
    let config = match Config::try_from(args) {
        Ok(config) => config,
        Err(e) => {
            say(&e.to_string());
            return ExitCode::from(2);
        }
    };
    let filter = match tracing_subscriber::EnvFilter::try_new(&config.log_level) {
        Ok(filter) => filter,
        Err(e) => {
            say(&format!("--log-level {:?}: {e}", config.log_level));
            return ExitCode::from(2);
        }
    };
    // In-process users may have set one of their own.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // What cannot be written is lost. Its own complaint would be an `eprintln!`, which panics then.
        .log_internal_errors(false)
        .with_ansi(
            std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
        )
        .try_init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            say(&format!("no runtime can be had: {e}"));
            return ExitCode::from(1);
        }
    };
    match runtime.block_on(run(config)) {
        Ok(_) => ExitCode::SUCCESS,
        Err(e) => {
            let mut text = e.to_string();
            let mut cause = std::error::Error::source(&e);
            while let Some(next) = cause {
                let next_text = next.to_string();
                if !text.contains(&next_text) {
                    text = format!("{text}: {next_text}");
                }
                cause = next.source();
            }
            say(&text);
            ExitCode::from(1)
        }
    }
}

/// The last words. If nobody can read them, the exit code still says as much.
fn say(text: &str) {
    let _ = std::io::stderr().write_all(format!("vnet-controlplane: {text}\n").as_bytes());
}
