//! Starting the two daemons from this one binary, by re-executing it. The only module that imports
//! their crates.
//!
//! - [`controlplane`] starts the user's own, once, however many first commands ask for it together;
//! - [`Dataplane`] is a child of `run` and `up` that ends with them, whatever ends them;
//! - the policy loader and the forms of flags that the daemons own are lent from here.

mod controlplane;
mod dataplane;
mod descriptors;
mod documents;

use std::ffi::OsString;
use std::path::PathBuf;

pub use vnet_dataplane::args::Args as DataplaneArgs;
pub use vnet_dataplane::config::{Config as DataplaneConfig, ListenAt, Transport};
pub use vnet_dataplane::forward::ForwardSpec;

pub use self::controlplane::{controlplane, own_server, session_url};
pub use self::dataplane::{Dataplane, DataplaneError, Settings};
pub use self::documents::{Document, check_document, check_own, read_document, warning_lines};

use crate::failure::Failure;

/// The first argument with which this binary is a controlplane.
pub(crate) const CONTROLPLANE_ROLE: &str = "__controlplane";
/// The first argument with which this binary is a dataplane.
pub(crate) const DATAPLANE_ROLE: &str = "__dataplane";

/// What this process should be, if it was started to be a daemon: takes the arguments, answers the
/// exit code.
pub fn role(arguments: &[OsString]) -> Option<u8> {
    let role = arguments.get(1)?.to_str()?;
    let daemon = || arguments.iter().enumerate().filter(|(index, _)| *index != 1).map(|(_, a)| a.clone());
    match role {
        CONTROLPLANE_ROLE => Some(controlplane::main(daemon().collect())),
        DATAPLANE_ROLE => Some(dataplane::main(daemon().collect())),
        _ => None,
    }
}

/// This very binary. On Linux by the kernel's own link, which works after the file was replaced.
fn own_executable() -> Result<PathBuf, Failure> {
    if cfg!(target_os = "linux") {
        return Ok(PathBuf::from("/proc/self/exe"));
    }
    std::env::current_exe().map_err(|e| Failure::Failed(format!("cannot find this program's own file: {e}")))
}
