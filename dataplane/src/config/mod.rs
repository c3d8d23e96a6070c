//! Configuration: flags in, one checked [`Config`] out. Every problem is found before anything is done,
//! and then nothing changes any more. Policy is not configuration; a policy that VMs bring along passes
//! through unread.

mod nat;
mod network;
mod problem;
mod settings;
#[cfg(test)]
mod tests;
mod url;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use vnet_proto::model::{Mode, Name, label_problem};

use crate::args::Args;
use crate::descriptors::{self, TooFew};
use crate::mac::Mac;
use crate::message::{Forward, OwnPolicy};
use crate::zone::Zone;
use url::{ListenUrl, Schemes, socket_path};

pub(crate) use settings::base64_text;

pub use problem::{Problem, Problems, write_lines};
pub use settings::{
    OwnListSettings, OwnPolicySettings, SettingsError, VmSettings, ZoneRecordSettings, ZoneSettings,
};
pub use url::{ListenAt, UrlError};

pub use crate::zone::ZONES_DEFAULT;

/// The subnet of guests.
pub const SUBNET_DEFAULT: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 127, 0), 24);
/// The IPv6 prefix of guests; passt's.
pub const IPV6_PREFIX_DEFAULT: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0), IPV6_PREFIX_LENGTH);
/// The length of that prefix: guests make the other half of an address themselves (RFC 4862, RFC 4291 §2.5.1).
pub const IPV6_PREFIX_LENGTH: u8 = 64;
/// The gateway's MAC address.
pub const GATEWAY_MAC_DEFAULT: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]);
/// MTU of guests' links, in bytes.
pub const MTU_BYTES_DEFAULT: u16 = 1500;
/// The least MTU: what every IPv4 host must take (RFC 791 §3.1).
pub const MTU_BYTES_MIN: u16 = 576;
/// The greatest MTU: what QEMU's and vfkit's sockets carry in one frame, aligned.
pub const MTU_BYTES_MAX: u16 = 65_520;
/// The name of VMs where nobody gives one.
pub const VM_NAME_DEFAULT: &str = "vm";
/// How long a VM's resolver waits where nobody says; its lookups are held no longer.
pub const RESOLVER_PATIENCE_DEFAULT: Duration = Duration::from_secs(4);
/// The longest resolver patience that is taken.
pub const RESOLVER_PATIENCE_MAX: Duration = Duration::from_secs(300);
/// Port of resolvers (RFC 1035 §4.2).
pub const DNS_PORT: u16 = 53;
/// Search domains that DHCP hands out at most; resolvers take no more.
pub const SEARCH_DOMAINS_MAX: usize = 6;
/// The longest prefix of a subnet: six addresses, of which guests get four.
pub const SUBNET_PREFIX_MAX: u8 = 29;
/// The shortest prefix of a subnet.
pub const SUBNET_PREFIX_MIN: u8 = 8;

/// A checked configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where the controlplane is.
    pub controlplane: ControlplaneUrl,
    /// This dataplane's name.
    pub name: String,
    /// The network that its guests are on.
    pub network: NetworkConfig,
    /// Sockets for guests.
    pub listeners: Vec<ListenConfig>,
    /// An inherited link, and its VM.
    pub link: Option<(RawFd, VmConfig)>,
    /// The VM on standard input and output.
    pub stdio: Option<VmConfig>,
    /// MAC addresses that HyperKit's VMs are told to have, by their UUIDs in lower case.
    pub vpnkit_macs: HashMap<String, Mac>,
    /// Forwards to open at the start.
    pub forwards: Vec<Forward>,
    /// One end of the channel to the front ([`crate::front`]).
    pub front_fd: Option<RawFd>,
    /// Guests are offered what the front serves on the gateway's port 80.
    pub guest_api: bool,
    /// A file to which all guests are captured.
    pub pcap_fd: Option<RawFd>,
    /// Bytes that it may have.
    pub pcap_limit_bytes: Option<u64>,
    /// Where daemons of vnet's listen over TCP beside those that the controlplane tells of: closed to guests.
    pub closed: Vec<SocketAddr>,
    /// The dataplane ends when the other end of this descriptor is closed.
    pub exit_with_fd: Option<RawFd>,
    /// Written to, and closed, when everything listens.
    pub ready_fd: Option<RawFd>,
}

/// Where the controlplane is, not yet opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlplaneUrl {
    /// Listens at this path.
    Unix(PathBuf),
    /// At the other end of this inherited stream.
    Fd(RawFd),
}

/// One network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Its name: the dataplane's, as it has one network.
    pub name: String,
    /// Subnet of its guests.
    pub subnet: Ipv4Net,
    /// IPv6 prefix of its guests, unless it carries no IPv6.
    pub ipv6: Option<Ipv6Net>,
    /// The gateway.
    pub gateway: Ipv4Addr,
    /// The gateway's MAC address.
    pub gateway_mac: Mac,
    /// Stands for the host: what the default zones call `host`. Leads to its 127.0.0.1, unless `nat` says otherwise.
    pub host_alias: Option<Ipv4Addr>,
    /// Destinations of guests, and where they are dialled instead; the host alias is among them.
    pub nat: BTreeMap<Ipv4Addr, IpAddr>,
    /// What the gateway answers ARP for beside its own address and those of `nat` in the subnet.
    pub virtual_ips: Vec<Ipv4Addr>,
    /// What a guest is given that asks for no address, while it is free; forwards that name no guest lead there.
    pub first_guest: Ipv4Addr,
    /// MTU of guests' links.
    pub mtu_bytes: u16,
    /// Resolvers that lookups are forwarded to; empty for the host's.
    pub resolvers: Vec<SocketAddr>,
    /// Search domains for guests.
    pub search: SearchDomains,
    /// Local zones, in order of precedence: those that were brought, or those of flags and then the default ones, which
    /// only a zone that is the root comes behind.
    pub zones: Vec<Zone>,
    /// Addresses that DHCP keeps for a MAC address.
    pub static_leases: Vec<(Mac, Ipv4Addr)>,
}

impl NetworkConfig {
    /// What the gateway answers ARP for beside its own address. No guest may have one of these.
    pub fn answered(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        let inside = self.nat.keys().filter(|address| self.subnet.contains(*address));
        inside.chain(&self.virtual_ips).copied()
    }

    /// Whether a destination is dialled at the host's 127.0.0.1.
    pub fn is_loopback(&self, address: Ipv4Addr) -> bool {
        self.nat.get(&address) == Some(&IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    /// What is dialled at other addresses beside the host alias that leads to 127.0.0.1.
    pub fn other_nat(&self) -> Vec<(Ipv4Addr, IpAddr)> {
        let nat = self.nat.iter().map(|(from, to)| (*from, *to));
        nat.filter(|(from, _)| !(Some(*from) == self.host_alias && self.is_loopback(*from)))
            .collect()
    }
}

/// Search domains for guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SearchDomains {
    /// These.
    These(Vec<Name>),
    /// Those of the host's resolver, as they change.
    Host,
}

/// How frames are framed on a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A stream; each frame behind its length.
    Qemu,
    /// Datagrams; each one frame.
    Vfkit,
    /// Records; each one frame.
    Bess,
    /// A stream; each frame behind its length, all behind a handshake.
    Vpnkit,
    /// A stream of a request, which may be for a guest's link: each frame behind its length, all behind the request.
    Connect,
}

impl Transport {
    /// The flag of its sockets.
    pub fn flag(self) -> &'static str {
        match self {
            Self::Qemu => "--listen-qemu",
            Self::Vfkit => "--listen-vfkit",
            Self::Bess => "--listen-bess",
            Self::Vpnkit => "--listen-vpnkit",
            Self::Connect => "--listen",
        }
    }

    /// What hypervisors call it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Vfkit => "vfkit",
            Self::Bess => "bess",
            Self::Vpnkit => "vpnkit",
            Self::Connect => "connect",
        }
    }

    /// The scheme of its sockets' paths.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::Qemu | Self::Vpnkit | Self::Connect => "unix",
            Self::Vfkit => "unixgram",
            Self::Bess => "unixpacket",
        }
    }

    fn schemes(self) -> Schemes {
        match self {
            Self::Qemu => Schemes::StreamOrFd,
            Self::Vfkit => Schemes::Datagram,
            Self::Bess => Schemes::Records,
            Self::Vpnkit | Self::Connect => Schemes::Stream,
        }
    }
}

/// A socket for guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenConfig {
    /// Framing.
    pub transport: Transport,
    /// Where.
    pub at: ListenAt,
    /// The VM that connects.
    pub vm: VmConfig,
}

impl ListenConfig {
    /// Where, as a URL without parameters.
    pub fn url(&self) -> String {
        match &self.at {
            ListenAt::Unix(path) => format!("{}://{}", self.transport.scheme(), path.display()),
            ListenAt::Tcp(address) => format!("tcp://{address}"),
            at @ (ListenAt::Vsock { .. } | ListenAt::Fd(_)) => at.to_string(),
        }
    }
}

/// A VM, as the host's side knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    /// Its name; further guests on one socket are NAME-2, NAME-3.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// A policy that it brings along.
    pub own_policy: Option<OwnPolicy>,
    /// A mode that it brings along.
    pub mode: Option<Mode>,
    /// Whether 169.254.0.0/16 is open to it.
    pub ec2_metadata_access: bool,
    /// How long its resolver waits.
    pub resolver_patience: Duration,
    /// The only MAC address that it may have.
    pub mac: Option<Mac>,
    /// The only IPv4 address that it may have; DHCP gives it.
    pub address: Option<Ipv4Addr>,
}

impl Config {
    /// Whether hypervisors have a way in that takes no requests.
    pub fn has_hypervisors(&self) -> bool {
        let is_theirs = |listener: &ListenConfig| listener.transport != Transport::Connect;
        self.link.is_some() || self.stdio.is_some() || self.listeners.iter().any(is_theirs)
    }

    /// Whether a process that may have `limit` descriptors can serve all of it.
    ///
    /// # Errors
    /// [`TooFew`].
    pub fn check_descriptors(&self, limit: usize) -> Result<(), TooFew> {
        let inherited = usize::from(self.link.is_some()) + usize::from(self.stdio.is_some());
        descriptors::check(limit, self.listeners.len() + inherited, self.forwards.len())
    }

    /// Checks flags, and what VMs bring along. `default_name` is this dataplane's name where `--name`
    /// gives none; see [`default_name`].
    ///
    /// # Errors
    /// Every problem there is.
    pub fn new(args: &Args, mut settings: VmSettings, default_name: &str) -> Result<Self, Problems> {
        let mut problems = Vec::new();
        let zones = settings.zones.take();
        let controlplane = controlplane(args, &mut problems);
        let name = args.name.as_deref().unwrap_or(default_name);
        if !is_name(name) {
            problems.push(Problem::Name {
                flag: "--name",
                found: name.to_owned(),
            });
        }
        let vm = vm_config(args, settings, &mut problems);
        let network = network::check(args, name, zones.as_deref(), &mut problems);
        let listeners = listeners(args, &vm, &network, &mut problems);
        let has_stdio = stdio(args, &mut problems);
        let vpnkit_macs = vpnkit_macs(args, &mut problems);
        let asked_for_a_link = args.listen_qemu.len()
            + args.listen_vfkit.len()
            + args.listen.len()
            + args.listen_bess.len()
            + args.listen_vpnkit.len()
            + args.listen_stdio.len();
        // One with a front serves what that asks for, guests or not.
        if asked_for_a_link == 0 && args.link_fd.is_none() && args.front_fd.is_none() {
            problems.push(Problem::NoLink);
        }
        let forwards = network::forwards(args, &network, &mut problems);
        if args.guest_api && args.front_fd.is_none() {
            problems.push(Problem::GuestApiWithoutFront);
        }
        descriptors(args, controlplane.as_ref(), &listeners, &mut problems);

        match (controlplane, problems.is_empty()) {
            (Some(controlplane), true) => Ok(Self {
                controlplane,
                name: name.to_owned(),
                network,
                listeners,
                link: args.link_fd.map(|fd| (fd, vm.clone())),
                stdio: has_stdio.then_some(vm),
                vpnkit_macs,
                forwards,
                front_fd: args.front_fd,
                guest_api: args.guest_api,
                pcap_fd: args.pcap_fd,
                pcap_limit_bytes: args.pcap_limit_bytes,
                closed: args.closed.clone(),
                exit_with_fd: args.exit_with_fd,
                ready_fd: args.ready_fd,
            }),
            _ => Err(Problems(problems)),
        }
    }
}

/// The descriptors of guests that the flags name, in no order, as far as they can be read.
pub fn inherited(args: &Args) -> impl Iterator<Item = RawFd> {
    let urls = [&args.listen_qemu, &args.listen_vfkit, &args.listen_bess];
    let read = |url: &String| {
        let number = url.strip_prefix("fd://")?;
        number.split('?').next()?.parse().ok()
    };
    urls.into_iter().flatten().filter_map(read)
}

/// The name of a dataplane that was given none: host name and process id.
pub fn default_name() -> String {
    let host = nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_default();
    let pid = std::process::id();
    let host: String = host
        .chars()
        .filter(|c| is_name_character(*c))
        .take(NAME_CHARACTERS_MAX - 12)
        .collect();
    if host.is_empty() {
        format!("dataplane-{pid}")
    } else {
        format!("{host}-{pid}")
    }
}

fn controlplane(args: &Args, problems: &mut Vec<Problem>) -> Option<ControlplaneUrl> {
    let Some(url) = &args.controlplane else {
        problems.push(Problem::NoControlplane);
        return None;
    };
    let problem = match url.split_once("://") {
        Some(("unix", path)) => match socket_path("unix", path) {
            Ok(path) => return Some(ControlplaneUrl::Unix(path)),
            Err(source) => Problem::ControlplanePath {
                found: url.clone(),
                source,
            },
        },
        Some(("fd", number)) => match number.parse() {
            Ok(fd) => return Some(ControlplaneUrl::Fd(fd)),
            Err(_) => Problem::Controlplane(url.clone()),
        },
        Some(("https", _)) => Problem::HttpsControlplane(url.clone()),
        Some(("tcp" | "http", _)) => Problem::TcpControlplane(url.clone()),
        _ => Problem::Controlplane(url.clone()),
    };
    problems.push(problem);
    None
}

fn vm_config(args: &Args, settings: VmSettings, problems: &mut Vec<Problem>) -> VmConfig {
    let name = args.vm.as_deref().unwrap_or(VM_NAME_DEFAULT);
    if !is_name(name) {
        problems.push(Problem::Name {
            flag: "--vm",
            found: name.to_owned(),
        });
    }
    let patience = settings.resolver_patience();
    if let Some(patience) = patience
        && (patience.is_zero() || patience > RESOLVER_PATIENCE_MAX)
    {
        problems.push(Problem::Patience(
            u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
        ));
    }
    let mode = settings.mode.and_then(|text| match text.parse() {
        Ok(mode) => Some(mode),
        Err(_) => {
            problems.push(Problem::Mode(text));
            None
        }
    });
    let mut labels: BTreeMap<String, String> = BTreeMap::new();
    let given = args
        .labels
        .iter()
        .map(|text| text.split_once('=').ok_or(text.clone()));
    let brought = settings
        .labels
        .iter()
        .map(|(key, value)| Ok((key.as_str(), value.as_str())));
    for label in given.chain(brought) {
        let (key, value) = match label {
            Ok(label) => label,
            Err(found) => {
                problems.push(Problem::Label {
                    found,
                    why: "has no value (expected KEY=VALUE)",
                });
                continue;
            }
        };
        if let Some(why) = label_problem(key, value) {
            problems.push(Problem::Label {
                found: format!("{key}={value}"),
                why,
            });
        } else if labels
            .insert(key.to_owned(), value.to_owned())
            .is_some_and(|before| before != value)
        {
            problems.push(Problem::LabelTwice(key.to_owned()));
        }
    }
    if let Some(own) = &settings.own_policy {
        // On the wire an empty document is none: what was given must not become nothing on its way.
        let is_empty = |document: &String| document.trim().is_empty();
        if own.document.as_ref().is_some_and(is_empty) || (own.document.is_none() && own.rules.is_empty()) {
            problems.push(Problem::EmptyPolicy(own.source.clone()));
        }
    }
    VmConfig {
        name: name.to_owned(),
        labels,
        own_policy: settings.own_policy.map(Into::into),
        mode,
        ec2_metadata_access: settings.ec2_metadata_access,
        resolver_patience: patience.unwrap_or(RESOLVER_PATIENCE_DEFAULT),
        mac: None,
        address: None,
    }
}

fn listeners(
    args: &Args,
    vm: &VmConfig,
    network: &NetworkConfig,
    problems: &mut Vec<Problem>,
) -> Vec<ListenConfig> {
    let given = [
        (Transport::Qemu, &args.listen_qemu),
        (Transport::Vfkit, &args.listen_vfkit),
        (Transport::Bess, &args.listen_bess),
        (Transport::Vpnkit, &args.listen_vpnkit),
        (Transport::Connect, &args.listen),
    ];
    let given = given
        .iter()
        .flat_map(|(transport, urls)| urls.iter().map(|url| (*transport, url)));
    let mut listeners: Vec<ListenConfig> = Vec::new();
    for (transport, found) in given {
        let flag = transport.flag();
        let url = match ListenUrl::parse(found, transport.schemes()) {
            Ok(url) => url,
            Err(source) => {
                problems.push(Problem::Url {
                    flag,
                    found: found.clone(),
                    source,
                });
                continue;
            }
        };
        let may_repeat = match url.at {
            ListenAt::Tcp(address) => address.port() == 0,
            // Looked at among all descriptors.
            ListenAt::Fd(_) => true,
            ListenAt::Unix(_) | ListenAt::Vsock { .. } => false,
        };
        if !may_repeat && listeners.iter().any(|l| l.at == url.at) {
            problems.push(Problem::ListenTwice {
                flag,
                found: found.clone(),
            });
        }
        if url.name.as_deref().is_some_and(|name| !is_name(name)) {
            problems.push(Problem::UrlName {
                flag,
                found: found.clone(),
            });
        }
        if let Some(address) = url.ip {
            network::check_guest_address(flag, address, network, problems);
            if listeners.iter().any(|l| l.vm.address == Some(address)) {
                problems.push(Problem::AddressTaken {
                    flag,
                    found: address,
                    owner: "another VM".to_owned(),
                });
            }
        }
        let vm = VmConfig {
            name: url.name.unwrap_or_else(|| vm.name.clone()),
            mac: url.mac,
            address: url.ip,
            ..vm.clone()
        };
        listeners.push(ListenConfig {
            transport,
            at: url.at,
            vm,
        });
    }
    listeners
}

/// Whether a guest is on standard input and output.
fn stdio(args: &Args, problems: &mut Vec<Problem>) -> bool {
    if args.listen_stdio.iter().any(String::is_empty) {
        problems.push(Problem::EmptyStdio);
    }
    if args.listen_stdio.len() > 1 {
        problems.push(Problem::StdioTwice(args.listen_stdio.len()));
    }
    !args.listen_stdio.is_empty()
}

fn vpnkit_macs(args: &Args, problems: &mut Vec<Problem>) -> HashMap<String, Mac> {
    let mut macs = HashMap::new();
    for found in &args.vpnkit_macs {
        let Some((uuid, mac)) = found.split_once('=').filter(|(uuid, _)| is_uuid(uuid)) else {
            problems.push(Problem::VpnkitMac(found.clone()));
            continue;
        };
        let Some(mac) = parse_mac(mac) else {
            problems.push(Problem::Mac {
                flag: "--vpnkit-mac",
                found: mac.to_owned(),
            });
            continue;
        };
        if macs.insert(uuid.to_ascii_lowercase(), mac).is_some() {
            problems.push(Problem::VpnkitMacTwice(uuid.to_owned()));
        }
    }
    macs
}

/// Whether a text is a UUID as it is written (RFC 9562 §4).
fn is_uuid(text: &str) -> bool {
    let groups = [8, 4, 4, 4, 12];
    let is_hex = |part: &str| part.bytes().all(|b| b.is_ascii_hexdigit());
    text.split('-').map(str::len).eq(groups) && text.split('-').all(is_hex)
}

fn descriptors(
    args: &Args,
    controlplane: Option<&ControlplaneUrl>,
    listeners: &[ListenConfig],
    problems: &mut Vec<Problem>,
) {
    let stream = match controlplane {
        Some(ControlplaneUrl::Fd(fd)) => Some(*fd),
        _ => None,
    };
    let mut taken: HashMap<RawFd, &'static str> = HashMap::new();
    let connected = listeners.iter().map(|listener| {
        let fd = match listener.at {
            ListenAt::Fd(fd) => Some(fd),
            ListenAt::Unix(_) | ListenAt::Tcp(_) | ListenAt::Vsock { .. } => None,
        };
        (listener.transport.flag(), fd)
    });
    let flags = [
        ("--controlplane", stream),
        ("--link-fd", args.link_fd),
        ("--front-fd", args.front_fd),
        ("--pcap-fd", args.pcap_fd),
        ("--vm-settings-fd", args.vm_settings_fd),
        ("--exit-with-fd", args.exit_with_fd),
        ("--ready-fd", args.ready_fd),
    ];
    for (flag, fd) in flags.into_iter().chain(connected) {
        let Some(found) = fd else { continue };
        if found < FIRST_INHERITED {
            problems.push(Problem::Descriptor { flag, found });
        } else if let Some(other) = taken.insert(found, flag) {
            problems.push(Problem::DescriptorTwice { flag, found, other });
        }
    }
}

/// Whether a text may name a VM, dataplane or network.
pub fn is_name(text: &str) -> bool {
    (1..=NAME_CHARACTERS_MAX).contains(&text.len()) && text.chars().all(is_name_character)
}

fn is_name_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

/// Reads a unicast MAC address.
fn parse_mac(text: &str) -> Option<Mac> {
    let hex = text.bytes().all(|b| b.is_ascii_hexdigit() || b == b':');
    text.parse().ok().filter(|mac: &Mac| hex && mac.is_unicast())
}

/// The known word that `found` was perhaps meant to be.
fn nearest(found: &str, known: &[&'static str]) -> Option<&'static str> {
    known
        .iter()
        .map(|word| (strsim::damerau_levenshtein(found, word), *word))
        .min()
        .filter(|(distance, word)| *distance * 2 <= word.len().max(found.len()))
        .map(|(_, word)| word)
}

/// An address without the mapping that hides its family.
fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// Characters of a name.
pub const NAME_CHARACTERS_MAX: usize = 63;
/// Below are standard input, output and error.
const FIRST_INHERITED: RawFd = 3;
