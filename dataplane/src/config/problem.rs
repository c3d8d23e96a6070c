//! What can be wrong with a configuration. Each variant names the flag and what was found.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use vnet_proto::model::{NameError, PatternError};

use crate::causes::WithCauses;
use crate::config::url::UrlError;
use crate::forward::ForwardSpecError;
use crate::zone::ZoneProblem;

/// Everything that is wrong, in the order of the flags' table.
#[derive(Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl std::fmt::Display for Problems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write_lines(&self.0, f)
    }
}

/// Writes problems, a line each, with their causes.
///
/// # Errors
/// The formatter's.
pub fn write_lines<E: std::error::Error>(
    problems: &[E],
    f: &mut std::fmt::Formatter<'_>,
) -> std::fmt::Result {
    for (index, problem) in problems.iter().enumerate() {
        if index > 0 {
            f.write_str("\n")?;
        }
        // A problem's cause belongs to its line.
        write!(f, "{}", WithCauses(problem))?;
    }
    Ok(())
}

impl std::error::Error for Problems {}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(
    missing_docs,
    reason = "each message says what the variant and its fields are"
)]
pub enum Problem {
    #[error("--controlplane is not given (expected unix:///PATH of the controlplane's session socket)")]
    NoControlplane,
    #[error("--controlplane {0}: https is not built yet; use unix:///PATH")]
    HttpsControlplane(String),
    #[error("--controlplane {0}: a session over tcp needs TLS, which is not built yet; use unix:///PATH")]
    TcpControlplane(String),
    #[error("--controlplane {0}: expected unix:///PATH or fd://N")]
    Controlplane(String),
    #[error("--controlplane {found}")]
    ControlplanePath {
        found: String,
        #[source]
        source: UrlError,
    },
    #[error("{flag} {found:?} is not a name (expected 1 to 63 of letters, digits, '.', '_' and '-')")]
    Name { flag: &'static str, found: String },
    #[error("--label {found:?} {why}")]
    Label { found: String, why: &'static str },
    #[error("--label {0} is given twice with different values")]
    LabelTwice(String),
    #[error("{flag} {found}")]
    Url {
        flag: &'static str,
        found: String,
        #[source]
        source: UrlError,
    },
    #[error("{flag} {found}: name= is not a name (expected 1 to 63 of letters, digits, '.', '_' and '-')")]
    UrlName { flag: &'static str, found: String },
    #[error("{flag} {found}: another flag listens there too; give each a place of its own")]
    ListenTwice { flag: &'static str, found: String },
    #[error(
        "no guest can attach: give one of --listen, --listen-qemu, --listen-vfkit, --listen-bess, --listen-vpnkit \
         and --listen-stdio"
    )]
    NoLink,
    #[error("--listen-stdio is empty (expected any text, as accept)")]
    EmptyStdio,
    #[error("--listen-stdio is given {0} times (one guest has standard input and output)")]
    StdioTwice(usize),
    #[error("--vpnkit-mac {0:?} is not a VM's address (expected UUID=MAC)")]
    VpnkitMac(String),
    #[error("--vpnkit-mac {0} is given twice for this UUID")]
    VpnkitMacTwice(String),
    #[error("--mtu {0} is out of range (expected 576 to 65520)")]
    Mtu(String),
    #[error("--subnet {0} is not an IPv4 subnet (expected one as 192.168.127.0/24)")]
    Subnet(String),
    #[error("--subnet {found} has bits set beyond its prefix length (did you mean {meant}?)")]
    SubnetBits { found: String, meant: Ipv4Net },
    #[error("--subnet {0} is of no use for guests (expected /8 to /29)")]
    SubnetSize(Ipv4Net),
    #[error("--subnet {0} is loopback, link-local or multicast, which guests cannot have")]
    SubnetKind(Ipv4Net),
    #[error("--ipv6-prefix {0} is not an IPv6 prefix of 64 bits (expected one as fd00::/64, or off)")]
    Ipv6Prefix(String),
    #[error("--ipv6-prefix {found} has bits set beyond its prefix length (did you mean {meant}?)")]
    Ipv6PrefixBits { found: String, meant: Ipv6Net },
    #[error(
        "--ipv6-prefix {0} is loopback, link-local, multicast, or carries IPv4 addresses, which guests cannot have"
    )]
    Ipv6PrefixKind(Ipv6Net),
    #[error("--ipv6-prefix cannot be had with --mtu {0} (IPv6 needs 1280 at least)")]
    Ipv6Mtu(u16),
    #[error("{flag} {found} is not an IPv4 address{or}")]
    Address {
        flag: &'static str,
        found: String,
        or: &'static str,
    },
    #[error("{flag} {found} is not a guest address of subnet {subnet}")]
    NotInSubnet {
        flag: &'static str,
        found: Ipv4Addr,
        subnet: Ipv4Net,
    },
    #[error("{flag} {found} is the address of {owner} already")]
    AddressTaken {
        flag: &'static str,
        found: Ipv4Addr,
        owner: String,
    },
    #[error("--nat {0:?} is not a translation (expected ADDRESS=ADDRESS, as 192.168.127.253=127.0.0.1)")]
    Nat(String),
    #[error(
        "--nat {found}: {address} is no address that guests can send to (expected a unicast IPv4 address)"
    )]
    NatFrom { found: String, address: String },
    #[error(
        "--nat {found}: {address} is no address that can be dialled (expected a unicast address of the host or beyond)"
    )]
    NatTo { found: String, address: String },
    #[error("--nat {found}: {address} is an address for guests, and nat leads out of their network")]
    NatToGuest { found: String, address: IpAddr },
    #[error("--nat {found}: {address} may be an answer to a lookup ({range} is for synthetic addresses)")]
    NatFromSynthetic {
        found: String,
        address: Ipv4Addr,
        range: Ipv4Net,
    },
    #[error("--nat is given twice for {0}")]
    NatTwice(Ipv4Addr),
    #[error("{flag} is given {found} times (at most {most})")]
    AddressesMany {
        flag: &'static str,
        found: usize,
        most: usize,
    },
    #[error("--virtual-ip {0} is no address that guests can send to (expected a unicast IPv4 address)")]
    VirtualIp(Ipv4Addr),
    #[error("{flag} {found} is not a unicast MAC address (expected one as 5a:94:ef:00:00:02)")]
    Mac { flag: &'static str, found: String },
    #[error("--static-lease {0:?} is not a lease (expected MAC=ADDRESS)")]
    Lease(String),
    #[error("--static-lease {0} is given twice for this MAC address")]
    LeaseTwice(String),
    #[error(
        "--dns {0:?} is not an address (expected ADDRESS or ADDRESS:PORT, as 9.9.9.9 or [2620:fe::fe]:53)"
    )]
    Dns(String),
    #[error("--dns {0} is the gateway itself, which would ask itself for ever")]
    DnsLoop(IpAddr),
    #[error("--dns-search {found:?} is not a domain")]
    Search {
        found: String,
        #[source]
        source: NameError,
    },
    #[error("--dns-search is given {found} times (at most {most}, which is what resolvers take)")]
    SearchMany { found: usize, most: usize },
    #[error(
        "--dns-search host is the host's own search domains and stands alone; leave the others out, or write host. \
         for a domain of that name"
    )]
    SearchHost,
    #[error("VM settings: {0}")]
    BroughtZone(ZoneProblem),
    #[error("{found} zones are given (at most {most})")]
    ZoneMany { found: usize, most: usize },
    #[error("the zones have {found} patterns (at most {most})")]
    ZonePatterns { found: usize, most: usize },
    #[error("--zone {found:?}: pattern {part:?} cannot be used")]
    ZonePattern {
        found: String,
        part: String,
        #[source]
        source: PatternError,
    },
    #[error(
        "--zone {0:?} is not a zone (expected ZONE:NAME=ADDRESS,... with * for every other name, or /PATTERN/)"
    )]
    Zone(String),
    #[error("--zone {found:?}: {part:?} is not a name")]
    ZoneName {
        found: String,
        part: String,
        #[source]
        source: NameError,
    },
    #[error("--zone {found:?}: {part:?} is not an address")]
    ZoneAddress { found: String, part: String },
    #[error("--zone {0} is given twice")]
    ZoneTwice(String),
    #[error("--publish is wrong")]
    Publish(#[source] ForwardSpecError),
    #[error("--publish {found}: {guest} is not an address of subnet {subnet} that a guest can have")]
    PublishGuest {
        found: String,
        guest: IpAddr,
        subnet: IpNet,
    },
    #[error("--publish {0}: another --publish listens there too")]
    PublishTwice(String),
    #[error("--publish asks for {found} forwards (at most {most})")]
    PublishMany { found: usize, most: usize },
    #[error("--guest-api needs --front-fd: it is the front that serves it")]
    GuestApiWithoutFront,
    #[error("{flag} {found} is not a descriptor that can be inherited (expected 3 or above)")]
    Descriptor { flag: &'static str, found: i32 },
    #[error("{flag} {found} is the descriptor of {other} already")]
    DescriptorTwice {
        flag: &'static str,
        found: i32,
        other: &'static str,
    },
    #[error("VM settings: {0:?} is not a mode (expected enforce, ask, observe, block or quarantine)")]
    Mode(String),
    #[error("VM settings: policy {0:?} is empty (expected at least defaultAction: deny)")]
    EmptyPolicy(String),
    #[error("VM settings: a resolver patience of {0} ms is out of range (expected 1 to 300000)")]
    Patience(u64),
}
