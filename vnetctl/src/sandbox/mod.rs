//! Guests made out of Linux namespaces: what `vnetctl run` and `vnetctl demo` start commands in.
//!
//! ```text
//! front (vnetctl run) ──spawns itself again──▶ helper ──forks──▶ init (PID 1) ──forks──▶ command
//!   owns the link's and the pty's descriptor     user, network,    mounts, pty,            own process
//!   hands them to dataplane and terminal         mount ... spaces  reaps, signals          group
//! ```
//!
//! [`spawn`] returns when the namespaces, the link and the mounts are ready and the command has not
//! been started yet, so that a dataplane can be attached first; [`Sandbox::start`] starts it. Each
//! process dies with the one to its left, whatever ends that one, and every process of the command's
//! dies with init: nothing is left behind, because nothing was ever placed on disk.
//!
//! The command has the files of the user who ran it ([`Spec::writable`] narrows where it may write) and nothing
//! of the host's network: its network namespace holds `lo` and one Ethernet interface whose other end is
//! [`Link`]. It reaches no Unix socket but its own and those of [`Spec::sockets`]. It has no capability, cannot
//! gain one, and inherits no descriptor above 2. IPv6 is switched off on its interface.
//!
//! What this leaves to others: what happens to the frames ([`Link`]'s reader), and which directories of
//! vnet's own are to be hidden ([`Spec::masks`]).
//!
//! [`stage`] makes, equally without privilege, a host and an internet for tests and the demo.

mod caps;
mod claims;
mod error;
mod front;
mod helper;
mod init;
mod link;
mod masks;
mod mounts;
mod netlink;
mod pins;
mod seccomp;
mod sockets;
pub mod stage;
mod sys;
mod userns;
mod wire;
mod writes;

use std::ffi::{OsStr, OsString};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::ExitCode;

use ipnet::{Ipv4Net, Ipv6Net};

pub use self::claims::Remote;
pub use self::error::SandboxError;
pub use self::front::{Event, Exit, Link, LinkKind, Sandbox, spawn};
pub use self::helper::guest_main;

/// The hidden first argument with which a front starts itself again as the helper.
pub const GUEST_ARGUMENT: &str = "__guest";

/// `env`'s exit code for a failure of its own.
pub const EXIT_FAILED: u8 = 125;
/// `env`'s exit code for a command that was found and cannot be executed.
pub const EXIT_CANNOT_EXECUTE: u8 = 126;
/// `env`'s exit code for a command that was not found.
pub const EXIT_NOT_FOUND: u8 = 127;

/// What a guest made out of namespaces is to be.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The program and its arguments; looked up in `PATH` like a shell does.
    pub command: Vec<OsString>,
    /// Where it starts; the caller's own directory when `None`.
    pub cwd: Option<PathBuf>,
    /// Added to the caller's environment.
    pub env: Vec<(OsString, OsString)>,
    /// The MTU of the guest's interface, 576 to 65521.
    pub mtu_bytes: u16,
    /// The guest's address and subnet.
    pub guest: Ipv4Net,
    /// Its default route and its name server.
    pub gateway: Ipv4Addr,
    /// Its IPv6 address and prefix, and its default route there. IPv6 is switched off when `None`.
    pub ipv6: Option<(Ipv6Net, Ipv6Addr)>,
    /// Its host name; the host's when `None`.
    pub hostname: Option<String>,
    /// Files and directories to hide, beside the built-in ones: vnet's own runtime and state
    /// directories. They should exist by now: what appears later in a directory that is not rebuilt
    /// (see `masks.rs`) is not hidden. Nothing can be put in their place, under the same name, from inside.
    pub masks: Vec<PathBuf>,
    /// Files that the command cannot change or replace: vnet's own programs.
    pub programs: Vec<PathBuf>,
    /// Files and directories, by their real paths, that alone may be written to, beside a `/tmp`, a `/var/tmp` and
    /// a `/dev/shm` of the command's own; whatever the user may write to when `None`.
    pub writable: Option<Vec<PathBuf>>,
    /// Unix sockets from outside that the command may connect to, streams only. It may connect to none but these
    /// and its own.
    pub sockets: Vec<PathBuf>,
    /// Which of stdin, stdout and stderr are replaced by a pseudo terminal of the guest's own. The
    /// others are inherited as they are. [`crate::terminal::standard_streams`] says which are terminals.
    pub pty: [bool; 3],
    /// The program that answers [`GUEST_ARGUMENT`] with [`guest_main`]; this program when `None`.
    pub program: Option<PathBuf>,
    /// Use a veth pair and a packet socket even where a TAP device could be had.
    pub force_packet_socket: bool,
}

impl Spec {
    /// The defaults of the design for this command.
    pub fn new<S: Into<OsString>>(command: impl IntoIterator<Item = S>) -> Spec {
        Spec {
            command: command.into_iter().map(Into::into).collect(),
            cwd: None,
            env: Vec::new(),
            mtu_bytes: 1500,
            guest: Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 127, 2), 24),
            gateway: Ipv4Addr::new(192, 168, 127, 1),
            ipv6: None,
            hostname: None,
            masks: Vec::new(),
            programs: Vec::new(),
            writable: None,
            sockets: Vec::new(),
            pty: [false; 3],
            program: None,
            force_packet_socket: false,
        }
    }
}

/// Runs the helper if these are its arguments. To be called before any thread or runtime is started.
pub fn dispatch(mut arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let hidden = arguments.nth(1)?;
    (hidden == OsStr::new(GUEST_ARGUMENT)).then(|| guest_main(arguments.collect()))
}
