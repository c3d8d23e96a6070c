//! `up`: a dataplane for VMs, in the foreground, and the user's controlplane if none answers.

use std::ffi::OsString;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::attend::{Attendant, Seen, command_line, dataplane_name, say};
use super::questions::Questions;
use super::treat::{TreatArgs, Treatment};
use crate::client::Connection;
use crate::failure::Failure;
use crate::launch::{Dataplane, Settings, session_socket};
use crate::output::text::safe;

/// Arguments of `up`.
#[derive(Debug, Args)]
#[command(
    long_about = "Serve VMs: a dataplane, and your controlplane if none answers.\n\n\
        Each guest that connects gets an address by DHCP, the gateway's DNS, and the way out that its \
        policy leaves open. What is given here applies to this dataplane's VMs alone. Runs until \
        interrupted, then removes its sockets.",
    after_help = "Examples:\n  vnetctl up --listen-qemu unix:///tmp/qemu.sock --secure-mode\n  \
        vnetctl up --listen-vfkit unixgram:///tmp/vfkit.sock --vm mac -p 2222:22\n  \
        vnetctl up --listen-qemu 'unix:///tmp/a.sock?name=a' --listen-qemu 'unix:///tmp/b.sock?name=b' --allow 'tcp 192.0.2.7:443'\n\n\
        QEMU connects with: -netdev stream,id=n0,addr.type=unix,addr.path=/tmp/qemu.sock -device virtio-net,netdev=n0"
)]
pub struct UpArgs {
    /// Listen for QEMU's `-netdev stream`: unix:///PATH or tcp://127.0.0.1:PORT; may be repeated
    #[arg(long, value_name = "URL", required_unless_present = "listen_vfkit")]
    pub listen_qemu: Vec<String>,
    /// Listen for vfkit, or QEMU's `-netdev dgram`: unixgram:///PATH; may be repeated
    #[arg(long, value_name = "URL")]
    pub listen_vfkit: Vec<String>,
    /// The VM's name; further guests on one URL are NAME-2, NAME-3 (`?name=` on a URL goes before)
    #[arg(long, value_name = "NAME", default_value = "vm")]
    pub vm: String,
    /// How the guests are treated.
    #[command(flatten)]
    pub treat: TreatArgs,
    /// The largest packet the guests may send, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 1500, value_parser = clap::value_parser!(u32).range(576..=65520))]
    pub mtu: u32,
}
