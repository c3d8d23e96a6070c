//! The flags of `vnet-dataplane`, as text. What they mean is checked in [`crate::config`], all at once;
//! `vnetctl up` and `vnetctl run` take the same flags and add their own.

use std::net::SocketAddr;
use std::os::fd::RawFd;

/// Flags of a dataplane.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// Where the controlplane is: unix:///PATH, or fd://N for a connected stream that was inherited.
    #[arg(long, value_name = "URL")]
    pub controlplane: Option<String>,
    /// This dataplane's name among those of its controlplane [default: host name and process id].
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Name of the VM, where its socket gives none; further ones are NAME-2, NAME-3 [default: vm].
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
    /// Label of the VMs; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub labels: Vec<String>,

    /// Serve QEMU (`-netdev stream`): unix:///PATH, tcp://127.0.0.1:PORT, vsock://CID:PORT (vsock://:PORT), or
    /// fd://N for a connected socket that was inherited; with ?name= &mac= &ip= .
    #[arg(long, value_name = "URL")]
    pub listen_qemu: Vec<String>,
    /// Serve vfkit and krunkit (or QEMU's `-netdev dgram`), any number of VMs on one socket: unixgram:///PATH,
    /// or fd://N; with ?name= &mac= &ip= .
    #[arg(long, value_name = "URL")]
    pub listen_vfkit: Vec<String>,
    /// Serve gvforwarder and others that ask for /connect, and /tunnel: unix:///PATH, tcp://127.0.0.1:PORT or
    /// vsock://CID:PORT (vsock://:PORT), with ?name= &mac= &ip= .
    #[arg(long, value_name = "URL")]
    pub listen: Vec<String>,
    /// Serve BESS and User Mode Linux (Linux only): unixpacket:///PATH, or fd://N; with ?name= &mac= &ip= .
    #[arg(long, value_name = "URL")]
    pub listen_bess: Vec<String>,
    /// Serve HyperKit: unix:///PATH, tcp://127.0.0.1:PORT or vsock://CID:PORT, with ?name= &mac= &ip= .
    #[arg(long, value_name = "URL")]
    pub listen_vpnkit: Vec<String>,
    /// MAC address that HyperKit's VM of this UUID is told to have; may be repeated [default: a random one].
    #[arg(long = "vpnkit-mac", value_name = "UUID=MAC")]
    pub vpnkit_macs: Vec<String>,
    /// Serve the guest on standard input and output, and end with it; any text, as accept.
    #[arg(long, value_name = "TEXT")]
    pub listen_stdio: Vec<String>,
    /// Serve the guest behind this inherited TAP device or packet socket.
    #[arg(long, value_name = "N", hide = true)]
    pub link_fd: Option<RawFd>,

    /// MTU of the guests' links in bytes, 576 to 65520 [default: 1500].
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<String>,
    /// Subnet of the guests, /29 or larger [default: 192.168.127.0/24].
    #[arg(long, value_name = "CIDR")]
    pub subnet: Option<String>,
    /// Address of the gateway [default: the first of the subnet].
    #[arg(long, alias = "gatewayIP", value_name = "ADDRESS")]
    pub gateway: Option<String>,
    /// MAC address of the gateway [default: 5a:94:ef:e4:0c:dd].
    #[arg(long, value_name = "MAC")]
    pub gateway_mac: Option<String>,
    /// Address that leads to the host's 127.0.0.1, or none [default: the last of the subnet].
    #[arg(long, alias = "hostIP", value_name = "ADDRESS")]
    pub host_alias: Option<String>,
    /// Dial this destination of guests at another address instead, as 192.168.127.253=10.0.0.7; may be repeated. That
    /// of the host alias takes the place of 127.0.0.1.
    #[arg(long, value_name = "ADDRESS=ADDRESS")]
    pub nat: Vec<String>,
    /// Answer ARP for this address as for the gateway's, in the subnet or not; may be repeated.
    #[arg(long = "virtual-ip", value_name = "ADDRESS")]
    pub virtual_ips: Vec<String>,
    /// Address of the first guest: what DHCP gives before all others, and where forwards that name no guest lead
    /// [default: the first of the subnet that is free].
    #[arg(long, alias = "deviceIP", value_name = "ADDRESS")]
    pub first_guest: Option<String>,
    /// IPv6 prefix of the guests, a /64, or off [default: fd00::/64; off where the MTU is below 1280].
    #[arg(long, value_name = "CIDR|off")]
    pub ipv6_prefix: Option<String>,
    /// Address that DHCP gives to this MAC address; may be repeated.
    #[arg(long = "static-lease", value_name = "MAC=ADDRESS")]
    pub static_leases: Vec<String>,

    /// Resolver that lookups are forwarded to; may be repeated [default: the host's].
    #[arg(long, value_name = "ADDRESS[:PORT]")]
    pub dns: Vec<String>,
    /// Search domain for guests; may be repeated. `host` stands for those of the host's resolver, as they change.
    #[arg(long, value_name = "DOMAIN|host")]
    pub dns_search: Vec<String>,
    /// Local zone, as example.internal:db=192.168.127.9,/^app-/=192.168.127.3,*=192.168.127.2; /PATTERN/ is for the
    /// names that an expression matches, and NAME=upstream is looked up after all. May be repeated: the first that a name
    /// is in answers.
    #[arg(long = "zone", value_name = "ZONE:NAME=ADDRESS,...")]
    pub zones: Vec<String>,
    /// Serve no zones but those of --zone: neither containers.internal nor docker.internal.
    #[arg(long)]
    pub no_default_zones: bool,
    /// Forward a port of the host into a guest, as docker does: 8080:80, 127.0.0.1:5353:53/udp; a range of ports,
    /// 8000-8010:8000-8010; or a Unix socket, unix:///PATH:80. With +client at the end, as 8080:80+client, the guest sees
    /// a client's own address. May be repeated.
    #[arg(short = 'p', long = "publish", value_name = "HOST:GUEST")]
    pub publish: Vec<String>,

    /// Offer guests what the front serves on the gateway's port 80 (needs --front-fd).
    #[arg(long, hide = true)]
    pub guest_api: bool,
    /// Hand requests on --listen, and guests' to the gateway, to the process at the other end of this inherited
    /// socket, and open the tunnels that it asks for.
    #[arg(long, value_name = "N", hide = true)]
    pub front_fd: Option<RawFd>,
    /// Write a capture of all guests to this inherited file, from the start on.
    #[arg(long, value_name = "N", hide = true)]
    pub pcap_fd: Option<RawFd>,
    /// Bytes that the file of --pcap-fd may have; then the capture ends.
    #[arg(long, value_name = "BYTES", hide = true)]
    pub pcap_limit_bytes: Option<u64>,
    /// A daemon of vnet's listens there, over TCP, and no guest reaches it; may be repeated.
    #[arg(long, value_name = "ADDRESS:PORT", hide = true)]
    pub closed: Vec<SocketAddr>,
    /// Read what the VMs bring along (policy, mode, labels) from this inherited descriptor.
    #[arg(long, value_name = "N", hide = true)]
    pub vm_settings_fd: Option<RawFd>,
    /// End when the other end of this inherited descriptor is closed.
    #[arg(long, value_name = "N", hide = true)]
    pub exit_with_fd: Option<RawFd>,
    /// Write a line to this inherited descriptor, and close it, when everything listens.
    #[arg(long, value_name = "N", hide = true)]
    pub ready_fd: Option<RawFd>,
}

/// The command line of the program `vnet-dataplane`.
#[derive(Debug, Clone, clap::Parser)]
#[command(
    name = "vnet-dataplane",
    version,
    about = "Moves frames between VMs and the host, and asks the controlplane what it does not know"
)]
pub struct Cli {
    /// The flags.
    #[command(flatten)]
    pub args: Args,
}
