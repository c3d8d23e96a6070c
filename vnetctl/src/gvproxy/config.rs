//! The command line and the file together: one checked [`Config`], with gvproxy's defaults, or everything that is
//! wrong.
//!
//! Pure: what it must know of the host is an argument. Which of flag and file wins is gvproxy's: flags do, but for the
//! subnet and the addresses, where the file does. Without `-config` a few more defaults hold (zones, search domains,
//! the forward to the guest's SSH, the first guest's lease).

mod endpoint;
mod problem;
mod ssh;
mod stack;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::Ipv4Net;
use vnet_proto::model::{Mode, Name};

pub use endpoint::{Endpoint, EndpointError, HostPort, HostPortError, Schemes};
pub use problem::{Problem, Problems, Warning};

use super::flags::Flags;
use super::origin::{Given, Origin};
use super::yaml::FileConfig;
use crate::launch::Mac;

/// The host's port that leads to the guest's SSH, without `-config`.
pub const SSH_PORT_DEFAULT: u16 = 2222;
/// The MAC address of the first guest, without `-config`.
pub const DEVICE_MAC_DEFAULT: Mac = Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee]);
/// The UUID that HyperKit's first guest says, without `-config`.
pub const VPNKIT_UUID_DEFAULT: &str = "c3d68012-0208-11ea-9fd7-f2189899ab08";

/// Problems, and warnings, that are told one by one.
const TOLD_MAX: usize = 100;

/// A checked configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Sockets with the services API and `/connect`.
    pub listen: Vec<Endpoint>,
    /// What asks for each socket of `listen`, `services`, `interfaces` and `forwards`.
    pub origins: HashMap<Endpoint, Origin>,
    /// A socket with the services API alone.
    pub services: Option<Endpoint>,
    /// What is logged.
    pub log_level: LogLevel,
    /// The network.
    pub stack: Stack,
    /// Sockets for hypervisors.
    pub interfaces: Interfaces,
    /// Sockets of the host that lead to some of the guest, over SSH.
    pub forwards: Vec<SshForward>,
    /// Where the process's id is written.
    pub pid_file: Option<Given<PathBuf>>,
    /// Where the log is written, rather than to stderr.
    pub log_file: Option<Given<PathBuf>>,
    /// The path of a socket that is told what happens.
    pub notification: Option<PathBuf>,
    /// The guests' mode: `ask` for `-secure-mode`, `block` for `stack.blockAllOutbound`.
    pub mode: Option<Mode>,
    /// The guests' policy.
    pub policy: Option<PolicySource>,
}

/// The network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// Whether level `debug` is logged.
    pub debug: bool,
    /// Where packets are captured.
    pub capture_file: Option<Given<PathBuf>>,
    /// MTU of guests' links.
    pub mtu_bytes: u16,
    /// Subnet of the guests, without host bits.
    pub subnet: Ipv4Net,
    /// The gateway.
    pub gateway_ip: Ipv4Addr,
    /// What the first guest is given.
    pub device_ip: Ipv4Addr,
    /// What leads to the host.
    pub host_ip: Ipv4Addr,
    /// The gateway's MAC address.
    pub gateway_mac: Mac,
    /// Local zones, in order of precedence; each name once.
    pub dns: Vec<Zone>,
    /// Search domains for guests.
    pub dns_search_domains: Vec<Name>,
    /// Whether those are the host's, and follow them as they change.
    pub dns_search_follows_host: bool,
    /// Ports of the host that lead into the network.
    pub forwards: Vec<Forward>,
    /// Destinations of guests that lead to others of the host.
    pub nat: BTreeMap<Ipv4Addr, Ipv4Addr>,
    /// Addresses that the gateway answers for beside its own.
    pub gateway_virtual_ips: Vec<Ipv4Addr>,
    /// Addresses that DHCP keeps.
    pub dhcp_static_leases: BTreeMap<Ipv4Addr, Mac>,
    /// MAC addresses of HyperKit's VMs, by UUID in lower case.
    pub vpnkit_uuid_macs: BTreeMap<String, Mac>,
    /// Whether guests reach 169.254.0.0/16.
    pub ec2_metadata_access: bool,
}

/// A local zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zone {
    /// Its name; `None` for the root, which is every name.
    pub name: Option<Name>,
    /// Its records, in order: the first that matches answers.
    pub records: Vec<Record>,
    /// What every other name in it answers with.
    pub default_ip: Option<IpAddr>,
}

/// A record. At least one of name and pattern is given, and either matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The name without the zone's.
    pub name: Option<Name>,
    /// A pattern somewhere in the name without the zone's, in the syntax of the crate `regex`; checked.
    pub regexp: Option<String>,
    /// What it answers with; `None`: the name is looked up upstream.
    pub ip: Option<IpAddr>,
}

/// A port of the host that leads into the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// Whether it is UDP rather than TCP.
    pub is_udp: bool,
    /// Where on the host; port 0 for any that is free.
    pub listen: HostPort,
    /// Where in the network.
    pub guest: SocketAddr,
}

/// Sockets for hypervisors.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interfaces {
    /// HyperKit's.
    pub vpnkit: Option<Endpoint>,
    /// QEMU's.
    pub qemu: Option<Endpoint>,
    /// User Mode Linux's and BESS's.
    pub bess: Option<Endpoint>,
    /// What asks for a guest on stdin and stdout, if anything does.
    pub stdio: Option<Origin>,
    /// vfkit's and krunkit's.
    pub vfkit: Option<Endpoint>,
}

/// A socket of the host that leads to one of the guest, over SSH.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshForward {
    /// The host's.
    pub socket: PathBuf,
    /// The guest's; absolute.
    pub dest: String,
    /// The guest's user.
    pub user: String,
    /// The file with the private key.
    pub identity: PathBuf,
}

/// Where the guests' policy is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicySource {
    /// In a file of its own; `-` is standard input.
    File(PathBuf),
    /// In the configuration file.
    Inline {
        /// That file, as it was named.
        file: Arc<str>,
        /// The document, at the lines and columns that it has there.
        text: String,
    },
}

/// What is logged: this and what is worse.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Nothing that is used.
    Panic,
    /// What ends the process.
    Fatal,
    /// Errors.
    Error,
    /// Warnings.
    Warning,
    /// What happens.
    #[default]
    Info,
    /// How.
    Debug,
    /// Everything.
    Trace,
}

/// What the resolution must know of the host.
pub struct Host<'a> {
    /// Search domains of its resolver.
    pub search_domains: &'a [Name],
    /// Whether there is a file at a path.
    pub exists: &'a dyn Fn(&Path) -> io::Result<bool>,
    /// Whether there is surely no directory at a path.
    pub is_no_directory: &'a dyn Fn(&Path) -> bool,
}

impl Config {
    /// Puts flags and file together. Where no `-config` is among the flags, the defaults of that case hold.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn resolve(
        flags: &Flags,
        file: FileConfig,
        host: &Host<'_>,
    ) -> Result<(Self, Vec<Warning>), Problems> {
        let mut check = Check {
            host,
            problems: Vec::new(),
            warnings: Vec::new(),
            listeners: HashMap::new(),
        };
        if let Some(word) = flags.rest.first() {
            check
                .warnings
                .push(Warning::Rest(word.to_string_lossy().into_owned()));
        }
        let log_level = check.log_level(flags, file.log_level);
        let (mode, policy) = check.policy(flags, &file.stack);
        let ec2_metadata_access =
            flags.ec2_metadata_access || file.ec2_metadata_access || file.stack.ec2_metadata_access;
        let stack = check.stack(flags, file.stack, log_level, ec2_metadata_access);

        let listen = if flags.listen.is_empty() {
            file.listen
        } else {
            flags
                .listen
                .iter()
                .map(|url| Given::flag("listen", url.clone()))
                .collect()
        };
        let listen: Vec<Endpoint> = listen
            .into_iter()
            .filter_map(|given| check.listener(given, Schemes::Stream))
            .collect();
        let services = over("services", &flags.services, file.services);
        let services = services.and_then(|given| check.listener(given, Schemes::Stream));
        let keys = file.interfaces;
        let stdio = over("listen-stdio", &flags.listen_stdio, keys.stdio);
        if let (Some(PolicySource::File(path)), Some(stdio)) = (&policy, &stdio)
            && path == Path::new("-")
        {
            check.problems.push(Problem::PolicyFromFrames(stdio.from.clone()));
        }
        let interfaces = check.interfaces(
            over("listen-vpnkit", &flags.listen_vpnkit, keys.vpnkit),
            over("listen-qemu", &flags.listen_qemu, keys.qemu),
            over("listen-bess", &flags.listen_bess, keys.bess),
            over("listen-vfkit", &flags.listen_vfkit, keys.vfkit),
            stdio.map(|given| given.from),
        );
        if listen.is_empty() && interfaces == Interfaces::default() {
            check.warnings.push(Warning::NoLink);
        }
        let mut path = |name, flag: &Option<PathBuf>, key: Option<Given<String>>| {
            let flag = flag.clone().map(|value| Given::flag(name, value));
            let given = flag.or_else(|| key.map(|key| key.map(PathBuf::from)))?;
            check.directory(given.from.clone(), &given.value);
            Some(given)
        };
        let pid_file = path("pid-file", &flags.pid_file, file.pid_file);
        let log_file = path("log-file", &flags.log_file, file.log_file);
        let forwards = check.ssh_forwards(flags, file.forwards);
        let config = Self {
            listen,
            origins: std::mem::take(&mut check.listeners),
            services,
            log_level,
            interfaces,
            forwards,
            pid_file,
            log_file,
            notification: check.notification(flags, file.notification),
            mode,
            policy,
            stack,
        };
        if check.problems.is_empty() {
            Ok((config, cut(check.warnings, Warning::More)))
        } else {
            Err(Problems(cut(check.problems, Problem::More)))
        }
    }
}

/// As many as a person reads, and how many more there are.
fn cut<T>(mut told: Vec<T>, more: fn(usize) -> T) -> Vec<T> {
    if told.len() > TOLD_MAX {
        let rest = told.split_off(TOLD_MAX);
        told.push(more(rest.len()));
    }
    told
}

/// A flag's value, else the file's.
fn over(name: &'static str, flag: &Option<String>, key: Option<Given<String>>) -> Option<Given<String>> {
    flag.clone().map(|value| Given::flag(name, value)).or(key)
}

/// What is collected on the way.
struct Check<'a> {
    host: &'a Host<'a>,
    problems: Vec<Problem>,
    warnings: Vec<Warning>,
    /// What listens where.
    listeners: HashMap<Endpoint, Origin>,
}

impl Check<'_> {
    fn log_level(&mut self, flags: &Flags, key: Option<Given<String>>) -> LogLevel {
        if flags.debug {
            return LogLevel::Debug;
        }
        let Some(given) = key else {
            return LogLevel::default();
        };
        let level = LogLevel::parse(&given.value);
        level.unwrap_or_else(|| {
            self.warnings.push(Warning::LogLevel {
                from: given.from,
                found: given.value,
            });
            LogLevel::default()
        })
    }

    fn policy(
        &mut self,
        flags: &Flags,
        keys: &super::yaml::StackKeys,
    ) -> (Option<Mode>, Option<PolicySource>) {
        let mode = match &keys.block_all_outbound {
            Some(key) if flags.secure_mode => {
                self.problems.push(Problem::Modes(key.clone()));
                None
            }
            Some(_) => Some(Mode::Block),
            None => flags.secure_mode.then_some(Mode::Ask),
        };
        if let (Some(policy), Some(_)) = (&keys.network_policy, &keys.outbound_allow) {
            self.problems.push(Problem::Policies(policy.from.clone()));
        }
        let inline = keys.network_policy.as_ref().or(keys.outbound_allow.as_ref());
        if let Some(path) = &flags.network_policy {
            if let Some(given) = inline {
                self.warnings.push(Warning::PolicyReplaced(given.from.clone()));
            }
            return (mode, Some(PolicySource::File(path.clone())));
        }
        let policy = inline.map(|given| PolicySource::Inline {
            file: match &given.from {
                Origin::Key { place, .. } => place.file.clone(),
                other => other.to_string().into(),
            },
            text: given.value.clone(),
        });
        (mode, policy)
    }

    /// What is to be made at a path needs its directory.
    fn directory(&mut self, from: Origin, path: &Path) {
        if let Some(directory) = path.parent()
            && !directory.as_os_str().is_empty()
            && (self.host.is_no_directory)(directory)
        {
            let (path, directory) = (path.to_owned(), directory.to_owned());
            self.problems.push(Problem::NoDirectory {
                from,
                path,
                directory,
            });
        }
    }

    /// A socket, which nothing else may listen at.
    fn listener(&mut self, given: Given<String>, schemes: Schemes) -> Option<Endpoint> {
        let from = given.from;
        let endpoint = match Endpoint::parse(&given.value, schemes) {
            Ok(endpoint) => endpoint,
            Err(source) => {
                let found = given.value;
                self.problems.push(Problem::Endpoint { from, found, source });
                return None;
            }
        };
        if let Some(path) = endpoint.path() {
            self.directory(from.clone(), path);
        }
        if let Some(other) = self.listeners.get(&endpoint) {
            self.problems.push(Problem::ListenTwice {
                from,
                at: endpoint.clone(),
                other: other.clone(),
            });
        } else {
            self.listeners.insert(endpoint.clone(), from);
        }
        Some(endpoint)
    }

    fn interfaces(
        &mut self,
        vpnkit: Option<Given<String>>,
        qemu: Option<Given<String>>,
        bess: Option<Given<String>>,
        vfkit: Option<Given<String>>,
        stdio: Option<Origin>,
    ) -> Interfaces {
        for (one, other) in [(&vpnkit, &qemu), (&vpnkit, &bess), (&qemu, &bess)] {
            if let (Some(one), Some(other)) = (one, other) {
                self.problems.push(Problem::Exclusive {
                    first: one.from.clone(),
                    second: other.from.clone(),
                });
            }
        }
        let mut socket = |given: Option<Given<String>>, schemes, is_new: bool| {
            let from = given.as_ref()?.from.clone();
            let endpoint = self.listener(given?, schemes)?;
            // One that cannot be asked for is told when it is bound.
            if let Some(path) = endpoint.path()
                && is_new
                && (self.host.exists)(path).unwrap_or(false)
            {
                let path = path.to_owned();
                let by = None;
                self.problems.push(Problem::Exists { from, path, by });
            }
            Some(endpoint)
        };
        Interfaces {
            vpnkit: socket(vpnkit, Schemes::Stream, false),
            qemu: socket(qemu, Schemes::Stream, true),
            bess: socket(bess, Schemes::Packet, true),
            vfkit: socket(vfkit, Schemes::Datagram, true),
            stdio,
        }
    }

    fn notification(&mut self, flags: &Flags, key: Option<Given<String>>) -> Option<PathBuf> {
        let given = match over("notification", &flags.notification, key)? {
            // The file has the path alone.
            given if matches!(given.from, Origin::Key { .. }) && !given.value.starts_with("unix:") => {
                return Some(given.value.into());
            }
            given => given,
        };
        match Endpoint::parse(&given.value, Schemes::Unix) {
            Ok(endpoint) => endpoint.path().map(Path::to_owned),
            Err(source) => {
                self.problems.push(Problem::Endpoint {
                    from: given.from,
                    found: given.value,
                    source,
                });
                None
            }
        }
    }
}

impl LogLevel {
    /// The level of a word, whatever its case.
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word.to_ascii_lowercase().as_str() {
            "panic" => Self::Panic,
            "fatal" => Self::Fatal,
            "error" => Self::Error,
            "warn" | "warning" => Self::Warning,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => return None,
        })
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Panic => "panic",
            Self::Fatal => "fatal",
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = if self.is_udp { "udp:" } else { "" };
        write!(f, "{protocol}{} to {}", self.listen, self.guest)
    }
}

#[cfg(test)]
mod tests;
