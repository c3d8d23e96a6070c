//! Starting the two daemons from this one binary, by re-executing it. The only module that imports
//! their crates.
//!
//! - [`controlplane`] starts the user's own, once, however many first commands ask for it together;
//! - [`Dataplane`] is a child of `run` and `up` that ends with them, whatever ends them;
//! - the policy loader, its YAML and the forms of flags that the daemons own are lent from here.

mod controlplane;
mod dataplane;
mod descriptors;
mod documents;
mod pcap;
pub mod presets;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use vnet_controlplane::paths;

pub use vnet_controlplane::paths::{SESSION_SOCKET, absolute, home_dir};
pub use vnet_controlplane::policy::{nearest, yaml};
pub use vnet_dataplane::args::Args as DataplaneArgs;
pub use vnet_dataplane::capture::pcapng::{
    Direction as CaptureDirection, PacketBlock, Pcapng, SNAP_BYTES_DEFAULT as CAPTURE_SNAP_BYTES_MAX,
    STATISTICS_BYTES as CAPTURE_STATISTICS_BYTES,
};
pub use vnet_dataplane::causes::WithCauses;
pub use vnet_dataplane::config::{
    Config as DataplaneConfig, GATEWAY_MAC_DEFAULT, ListenAt, ListenConfig, MTU_BYTES_DEFAULT, MTU_BYTES_MAX,
    MTU_BYTES_MIN, NAME_CHARACTERS_MAX, SEARCH_DOMAINS_MAX, SUBNET_DEFAULT, SUBNET_PREFIX_MAX,
    SUBNET_PREFIX_MIN, Transport, ZONES_DEFAULT, ZoneRecordSettings, ZoneSettings, is_name, write_lines,
};
pub use vnet_dataplane::egress::resolver::host::{HostResolver, RESOLV_CONF};
pub use vnet_dataplane::egress::stream::{AsyncStream, HostStream};
pub use vnet_dataplane::forward::{
    FORWARDS_MAX, ForwardSpec, Holder, holder_of as holder_of_port, look as look_at_forward,
};
pub use vnet_dataplane::front::{self, FrontMessage, FrontReceiver, FrontSender, NotSent};
pub use vnet_dataplane::link::listen::is_stale as is_stale_socket;
pub use vnet_dataplane::link::listen::{SocketFile, StreamListener, remedy as how_to_listen};
pub use vnet_dataplane::mac::Mac;
pub use vnet_dataplane::message::Forward;
pub use vnet_dataplane::requests::tunnel_target;

pub use self::controlplane::{controlplane, own_log, own_server, session_url};
pub use self::dataplane::{Dataplane, DataplaneError, DataplaneLog, Settings};
pub use self::documents::{
    Document, check_document, check_own, document, policy_schema, read_document, test_document, warning_lines,
};
pub use self::pcap::{PcapError, open_pcap};

use crate::failure::{EXIT_USAGE, Failure};

/// The first argument with which this binary is a controlplane.
pub(crate) const CONTROLPLANE_ROLE: &str = "__controlplane";
/// The first argument with which this binary is a dataplane.
pub(crate) const DATAPLANE_ROLE: &str = "__dataplane";

/// What this process is, if it was started to be something else than a command. To be asked before
/// any thread or runtime is started: a guest's helper must be a single thread.
pub fn role(arguments: &[OsString]) -> Option<ExitCode> {
    #[cfg(target_os = "linux")]
    if arguments
        .get(1)
        .is_some_and(|role| role == crate::cmd::demo::FETCH_ROLE)
    {
        return Some(crate::cmd::demo::fetch_main(arguments));
    }
    #[cfg(target_os = "linux")]
    if let Some(code) = crate::sandbox::dispatch(arguments.iter().cloned()) {
        return Some(code);
    }
    let main = match arguments.get(1)?.to_str()? {
        CONTROLPLANE_ROLE => controlplane::main,
        DATAPLANE_ROLE => dataplane::main,
        _ => return None,
    };
    let of_the_daemon = arguments.iter().enumerate().filter(|(index, _)| *index != 1);
    Some(main(
        of_the_daemon.map(|(_, argument)| argument.clone()).collect(),
    ))
}

/// Raises this process's limit of open files as far as the host permits, as the runtime of Go does, and
/// checks that it is enough for a dataplane, which inherits it.
///
/// # Errors
/// What it is, what is needed, and how it is raised.
pub fn enough_descriptors(config: &DataplaneConfig) -> Result<(), Failure> {
    config
        .check_descriptors(vnet_dataplane::descriptors::raise_limit())
        .map_err(|error| Failure::Failed(error.to_string()))
}

/// Vnet's own directories: sockets, and state. Neither is made.
pub fn own_directories() -> Vec<PathBuf> {
    std::iter::once(paths::runtime_dir())
        .chain(paths::state_dir().ok())
        .collect()
}

/// Vnet's own programs: this one, by its real path and by the one it was called by, and those that lie beside it.
pub fn own_programs() -> Vec<PathBuf> {
    let mut programs = Vec::new();
    for own in std::env::current_exe().into_iter().chain(called_as()) {
        programs
            .extend(["vnetctl", "vnet-controlplane", "vnet-dataplane"].map(|name| own.with_file_name(name)));
        programs.push(own);
    }
    programs.retain(|path| path.is_file());
    programs.sort();
    programs.dedup();
    programs
}

/// The path by which this program was called: as typed, or where a shell finds it.
fn called_as() -> Option<PathBuf> {
    let name = PathBuf::from(std::env::args_os().next()?);
    if name.components().count() > 1 {
        return std::path::absolute(name).ok();
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(&name))
        .find(|file| file.is_file())
}

/// Parses a daemon's arguments and runs it. What is wrong with them is said as the daemon would.
fn parsed<A: clap::Parser>(arguments: Vec<OsString>, run: impl FnOnce(A) -> ExitCode) -> ExitCode {
    match A::try_parse_from(arguments) {
        Ok(args) => run(args),
        Err(error) => {
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(EXIT_USAGE))
        }
    }
}

/// This very binary. On Linux by the kernel's own link, which works after the file was replaced.
fn own_executable() -> Result<PathBuf, Failure> {
    if cfg!(target_os = "linux") {
        return Ok(PathBuf::from("/proc/self/exe"));
    }
    std::env::current_exe().map_err(|e| Failure::Failed(format!("cannot find this program's own file: {e}")))
}
